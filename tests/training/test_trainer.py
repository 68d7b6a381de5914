"""From batches to what a step is given, and what a validation says, each computed once more from the store."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from support.stores import add_volume, make_store, synthetic_hu

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.models.latent import LatentStatistics, mean_over_crop, shuffled
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.patches import patchify, tokens_at
from maesil.training.setup import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = RunConfig(
    ModelConfig(crop=16, patch=4, width=16, depth=1, decoder_width=16, decoder_depth=1),
    train=TrainConfig(
        steps=8, batch=4, min_body=0.05, flips="zyx", window_jitter=0.2, validation_crops=7, validation=0.5, ema=0.5,
        picture_head_every=3, device="cpu", threads=1,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two patients of unequal brightness whose scans are wedges: valid and body shares differ, and have no mirror."""
    store = make_store(tmp_path_factory.mktemp("trainer") / "s", [], superpatch=32)
    for number, shape in enumerate([(40, 44, 48), (48, 40, 40)]):
        z, y, x = np.indices(shape)
        valid = x + z // 2 + y // 3 > 20
        hu = np.where(valid, synthetic_hu(shape, number) + 200 * number, -1024).astype(np.int16)
        add_volume(store, hu, name=f"patient {number}", valid=valid, body=valid & (hu > -500))
    return store


@pytest.fixture
def trainer(store, tmp_path):
    made = prepare([store.path], CONFIG, tmp_path / "r", resume=False, console=Console(file=io.StringIO()))
    made.averaged.init_weights(torch.Generator().manual_seed(5))  # another model than the one that learns
    return made


def dealt(trainer, config=CONFIG, step=3):
    trainer = replace(trainer, config=config)
    with trainer.loader() as loader:
        (prepared,) = trainer.prepared(loader.batches(step, step + 1))
    return prepared


def voxels(reader, volume, origin, name):
    cells = reader.read_map_region(volume.volume_id, name, origin, (16, 16, 16))
    return np.kron(cells, np.ones((8, 8, 8))) / 255


def test_a_patch_counts_if_it_is_valid_as_a_whole_where_the_model_sees_it(trainer):
    flips = set()
    for step in range(6):
        prepared = dealt(trainer, step=step)
        (micro_batch,) = prepared.micro_batches
        for number, draw in enumerate(prepared.draws):
            reader = trainer.sampler.readers[draw.store]
            axes = [axis for axis, on in enumerate(draw.flip) if on]
            valid = np.flip(voxels(reader, draw.volume, draw.origin, "valid"), axes).copy()
            whole = (patchify(torch.from_numpy(valid)[None], 4) == 1).all(dim=-1).double()
            expected = whole.gather(1, micro_batch.inputs.masks.ids_masked[number : number + 1])[0]
            torch.testing.assert_close(micro_batch.weight_BS[number].double(), expected, rtol=0, atol=1e-6)
            mask = make_masks(CONFIG.mask, CONFIG.model.grid, [draw.mask_seed]).mask[0]
            assert torch.equal(micro_batch.inputs.masks.mask[number], mask)
            hu = np.flip(reader.read_region(draw.volume.volume_id, draw.origin, (16, 16, 16)), axes).copy()
            lo, hi = (end + 0.2 * 2000 * by for end, by in zip((-1000, 1000), draw.window_shift, strict=True))
            windowed = (np.clip(hu.astype(float), lo, hi) - lo) / (hi - lo)
            value = torch.from_numpy((windowed - trainer.intensity.mean) / trainer.intensity.std)
            truth = tokens_at(patchify(value[None], 4), micro_batch.inputs.targets[number, None])
            inputs = micro_batch.inputs.of(slice(number, number + 1))
            torch.testing.assert_close(inputs.patches(inputs.targets, torch.float64), truth, rtol=0, atol=1e-4)
            flips |= {draw.flip} if expected.min() < expected.max() else set()
    assert len(flips) > 3, "hardly a crop at the edge of the scan was mirrored: this test shows less than it says"


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_every_third_crop_is_pictured_however_the_step_is_dealt_out(trainer, accumulate):
    config = replace(CONFIG, train=replace(CONFIG.train, accumulate=accumulate))
    at_once = 4 // accumulate
    pictured = []
    for number, one in enumerate(dealt(trainer, config).micro_batches):
        assert one.picture_weight_BS.shape == one.weight_BS[one.inputs.pictured].shape
        if one.picture_weight_BS.any():
            torch.testing.assert_close(one.picture_weight_BS, one.weight_BS[one.inputs.pictured])
            pictured += [number * at_once + i for i in range(at_once)[one.inputs.pictured]]
    assert pictured == [0, 3]


def test_a_validation_is_the_loss_of_the_averaged_model_on_all_held_out_crops(trainer):
    """Crop by crop, each under the mask of its number; hidden patches that are valid as a whole count."""
    model, sums = copy.deepcopy(trainer.averaged).eval(), torch.zeros(3, dtype=torch.float64)
    statistics = LatentStatistics()
    assert len(trainer.validation) == 7
    (reader,) = {reader for reader, _ in trainer.sampler.volumes}
    for number, crop in enumerate(trainer.validation):
        masks = make_masks(CONFIG.mask, CONFIG.model.grid, [number])
        inputs = MaskedInput(torch.from_numpy(crop.hu)[None], masks, trainer.intensity, 4)
        valid = torch.from_numpy(voxels(reader, reader.volumes[crop.volume_id], crop.origin, "valid"))
        weight = (patchify(valid[None], 4) == 1).all(dim=-1).double().gather(1, masks.ids_masked)
        truth = inputs.patches(masks.ids_masked, torch.float32)
        with torch.no_grad(), model.latent_changed(statistics):
            prediction = model(inputs)
        errors = [(one - truth).square().mean(dim=-1) for one in (prediction.patches_BSV, prediction.pictured_BSV)]
        sums += torch.stack([(one * weight).sum() for one in errors] + [weight.sum()])
    tokens, shown, total = sums.tolist()
    found = trainer.validate()
    assert trainer.model.training
    assert found["validation_loss"] == pytest.approx(tokens / total, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(statistics.effective_rank, rel=1e-3)
    for name, error in (("validation_psnr", shown), ("validation_psnr_tokens", tokens)):
        assert found[name] == pytest.approx(-10 * np.log10(error / total * trainer.intensity.std**2), abs=1e-4)


def test_a_gain_is_what_the_score_loses_when_the_tokens_are_replaced(trainer):
    score, gains = trainer.validate()["validation_psnr"], trainer.encoder_gains()
    for name, change in (("encoder_gain_db", mean_over_crop), ("encoder_gain_shuffled_db", shuffled)):
        with trainer.averaged.latent_changed(change):
            _, without = trainer._validation_errors()
        assert gains[name] == pytest.approx(score + 10 * np.log10(without * trainer.intensity.std**2), abs=1e-4)
    assert abs(gains["encoder_gain_db"] - gains["encoder_gain_shuffled_db"]) > 1e-3
