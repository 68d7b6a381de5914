"""Crops and patches that are no cubes: all commands, all kinds of model, on real stores."""

from __future__ import annotations

import io
import json
import tomllib
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from support.command_line import fails, run
from support.labelled import labelled_store
from support.lanes import slow_but
from support.runs import save_run
from support.stores import make_store

import maesil
from maesil.config.schema import HEADS, MODEL_KINDS, MaskConfig, ModelConfig, RunConfig, TrainConfig
from maesil.data.crops import read_crop
from maesil.data.split import Split
from maesil.downstream.finetune import FinetuneBudget, finetune
from maesil.downstream.monai import load_into_monai_vit
from maesil.downstream.probe import _features, probe
from maesil.errors import EXIT_USAGE, UsageError
from maesil.evaluation.cost import measure_cost
from maesil.evaluation.predict import make_predictors, reconstruct
from maesil.models.encoders import encoder_of
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.patches import patchify, tokens_at, unpatchify
from maesil.models.registry import make_model
from maesil.store.reader import SuperpatchReader
from maesil.training.checkpoint import content_sha256, load_run
from maesil.training.log import read_metrics
from maesil.training.train import train
from maesil.types import Intensity

pytestmark = pytest.mark.usefixtures("one_thread")
CROP, PATCH = (32, 48, 64), (4, 8, 8)
SMALL = ModelConfig(
    crop=CROP, patch=PATCH, width=48, depth=1, decoder_width=48, decoder_depth=1, channels=4, latent=16, codes=16
)
TRAIN = TrainConfig(steps=2, batch=2, validation_crops=2, device="cpu", threads=1)
SHAPES = [(64, 96, 128), (40, 60, 100), (70, 90, 64)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store, and a run made by the command line: crop by commas, patch by crosses."""
    folder = tmp_path_factory.mktemp("boxes")
    store = make_store(folder / "s.zarr", SHAPES, superpatch=192)
    sizes = ("width=48", "depth=1", "decoder_width=48", "decoder_depth=1", "crop=32,48,64", "patch=4x8x8")
    options = [word for size in sizes for word in ("--set", f"model.{size}")]
    options += ["--device", "cpu", "--set", "train.threads=1", "--set", "train.validation_crops=2"]
    code, _, err = run("train", store.path, "--out", folder / "run", *options, "--steps", 2, "--batch", 2)
    assert code == 0, err
    return folder, store


def test_a_run_notes_three_edges_and_goes_on(world):
    folder, store = world
    config = load_run(folder / "run").config
    assert (config.model.crop, config.model.patch, config.model.grid) == (CROP, PATCH, (8, 6, 8))
    document = tomllib.loads((folder / "run" / "config.toml").read_text())
    assert (document["model"]["crop"], document["model"]["patch"]) == ([32, 48, 64], [4, 8, 8])
    command = ("train", store.path, "--out", folder / "run", "--resume")
    assert "model.patch" in fails(EXIT_USAGE, *command, "--set", "model.patch=8,8,4")
    assert run(*command, "--steps", 3)[0] == 0
    assert (folder / "run" / "pictures").exists()


def test_it_is_evaluated_reconstructed_exported_and_used(world):
    folder, store = world
    code, _, err = run("evaluate", folder / "run", store.path, "--device", "cpu", "--json", folder / "scores.json")
    assert code == 0, err
    rows = json.loads((folder / "scores.json").read_text())["rows"]
    assert {row["model"] for row in rows} >= {"maesil", "mean", "interpolation"}
    assert all(np.isfinite(row["psnr_hidden"]) for row in rows)
    assert all(row["border_ratio"] > 0 for row in rows if row["model"] == "maesil")

    name = store.volumes()[0].volume_id
    code, _, err = run("reconstruct", folder / "run", store.path, name, "--device", "cpu", "--out", folder / "whole")
    assert code == 0, err
    assert run("export", folder / "run", "--out", folder / "encoder")[0] == 0
    card = json.loads((folder / "encoder" / "config.json").read_text())
    assert (card["input"]["edge_voxels"], card["input"]["patch_voxels"]) == ([32, 48, 64], [4, 8, 8])
    readme = (folder / "encoder" / "README.md").read_text()
    assert "crops of 32 x 48 x 64 (z, y, x) voxels" in readme and "4 x 8 x 8 (z, y, x) voxels" in readme

    encoder, trained = maesil.load_encoder(folder / "encoder"), load_run(folder / "run")
    volume = torch.randint(-900, 900, (1, *CROP), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder(volume), encoder_of(trained.model, trained.intensity)(volume))
        assert encoder(volume[:, :8]).shape == (1, 2 * 6 * 8, 48)
    with pytest.raises(ValueError, match="multiples of 4x8x8"):
        encoder(volume[:, :, :4])


def test_one_embedding_a_superpatch_where_those_are_whole_crops(world, tmp_path):
    folder, store = world
    code, _, err = run("features", folder / "run", store.path, "--device", "cpu", "--out", tmp_path / "f.parquet")
    assert code == 0, err
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.num_rows == 3 and all(len(vector) == 48 for vector in table["embedding"].to_pylist())
    other = make_store(tmp_path / "s", SHAPES[1:2], superpatch=128)
    line = fails(EXIT_USAGE, "features", folder / "run", other.path, "--device", "cpu", "--out", tmp_path / "g.parquet")
    assert "whole crops of 32x48x64 voxels, found an edge of 128; take a store of another --superpatch" in line
    assert line.endswith("such as 192")


def test_crops_are_no_larger_than_a_superpatch_and_need_not_divide_it(world, tmp_path):
    folder, _ = world
    small = make_store(tmp_path / "small", SHAPES[:1], superpatch=48)
    command = ("train", small.path, "--out", tmp_path / "r", "--config", folder / "run" / "config.toml")
    line = fails(EXIT_USAGE, *command)
    assert "an edge of 48 voxels, less than model.crop=32x48x64; set model.crop to 48 or 24 or 16" in line
    between = make_store(tmp_path / "between", SHAPES[:2], superpatch=72)
    train([between.path], RunConfig(SMALL, train=TRAIN), tmp_path / "q", console=Console(file=io.StringIO()))
    assert load_run(tmp_path / "q").step == 2


@pytest.mark.parametrize("offsets", slow_but(("across", "inside"), ("across",)))
def test_crops_are_the_same_from_disk_and_from_the_device(world, tmp_path, offsets):
    _, store = world
    losses = []
    for resident in (False, True):
        settings = replace(TRAIN, steps=3, device_resident=resident, offsets=offsets, flips="zyx", thin="pad")
        out = tmp_path / str(resident)
        train([store.path], RunConfig(SMALL, train=settings), out, console=Console(file=io.StringIO()))
        losses.append([record["loss"] for record in read_metrics(out / "metrics.jsonl")])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_three_equal_edges_are_a_cube_to_the_bit(tmp_path):
    store = make_store(tmp_path / "s", [(64, 64, 70), (72, 64, 64)], superpatch=64)
    cube = replace(SMALL, crop=64, patch=8)
    box = replace(SMALL, crop=(64, 64, 64), patch=(8, 8, 8))
    assert box == cube and (box.crop, box.patch) == (64, 8)
    found = []
    for number, model in enumerate((cube, box)):
        out = tmp_path / str(number)
        train([store.path], RunConfig(model, train=TRAIN), out, console=Console(file=io.StringIO()))
        kept = load_run(out)
        found.append((content_sha256(kept.last_weights), (out / "config.toml").read_bytes()))
    assert found[0] == found[1]
    assert b"crop = 64\n" in found[0][1]


VARIANTS = {
    **{kind: {"kind": kind} for kind in MODEL_KINDS},
    **{f"head {head}": {"head": head} for head in HEADS},
    "cross": {"decoder": "cross"},
    "thin voxels": {"patch": (1, 8, 4), "crop": (8, 32, 16)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_predicts_learns_and_sees_no_hidden_voxel(name):
    config = replace(SMALL, crop=(16, 48, 32)) if "patch" not in VARIANTS[name] else SMALL
    config = replace(config, **VARIANTS[name])
    model = make_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    volume = torch.randint(-1024, 1500, (2, *config.crop_zyx), generator=torch.Generator().manual_seed(1)).short()
    masks = make_masks(MaskConfig(), config.grid, [3, 4])
    inputs = MaskedInput(volume, masks, Intensity((-500.0, 700.0), 0.4, 0.3), config.patch)
    prediction = model(inputs)
    assert prediction.shown.shape == (*masks.ids_masked.shape, config.patch_voxels)
    loss = inputs.loss(prediction.patches_BSV) + inputs.loss(prediction.shown)
    loss.backward()
    assert loss.isfinite() and sum(one.grad is not None for one in model.parameters()) > 5
    model.eval()
    everything = model.predict_all(inputs)
    torch.testing.assert_close(model(inputs).shown, tokens_at(everything, masks.ids_masked), atol=1e-4, rtol=1e-4)
    hidden = torch.ones(2, config.tokens, 1).mul(masks.mask[..., None]).expand(-1, -1, config.patch_voxels) > 0
    blanked = torch.where(unpatchify(hidden, config.grid, config.patch), torch.zeros_like(volume), volume)
    again = model.predict_all(replace(inputs, crops=blanked))
    assert torch.equal(again, everything)
    assert measure_cost(model, RunConfig(config), inputs.intensity).gflop > 0


@pytest.mark.parametrize("kind", ["maesil", "mae2d", "ae", "vae"])
def test_an_encoder_gives_the_latent_tokens_of_its_model(kind):
    config, seen = replace(SMALL, crop=(16, 48, 32), kind=kind), []
    model = make_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    intensity = Intensity((-500.0, 700.0), 0.4, 0.3)
    volume = torch.randint(-1024, 1500, (2, *config.crop_zyx), generator=torch.Generator().manual_seed(1)).short()
    masks = make_masks(MaskConfig(kind="none"), config.grid, [0, 1])
    with torch.no_grad(), model.eval().latent_changed(lambda tokens: (seen.append(tokens), tokens)[1]):
        model(MaskedInput(volume, masks, intensity, config.patch))
        tokens = encoder_of(model, intensity)(volume)
    latent = seen[0]
    if kind == "mae2d":  # slice by slice: a token is the mean over the slices of its patch
        gz, gy, gx = config.grid
        latent = latent.reshape(2, gz, 4, gy * gx, -1).mean(dim=2).flatten(1, 2)
    torch.testing.assert_close(tokens, latent, atol=1e-5, rtol=1e-5)


def test_an_evaluation_hides_whole_patches_and_the_baselines_fill_them(world):
    folder, store = world
    trained, reader, volume = load_run(folder / "run"), SuperpatchReader(store), store.volumes()[0]
    for predictor in make_predictors(trained):
        result = reconstruct(reader, volume, predictor, trained.config, 0, torch.device("cpu"))
        whole = result.hidden[: volume.shape[0] // 4 * 4, : volume.shape[1] // 8 * 8, : volume.shape[2] // 8 * 8]
        of_patches = patchify(whole[None], PATCH)
        assert torch.equal(of_patches.all(dim=2), of_patches.any(dim=2))
        assert 0.6 < of_patches[..., 0].float().mean() < 0.9
        if predictor.name == "interpolation":
            crop = torch.from_numpy(read_crop(reader, volume.volume_id, (0, 0, 0), CROP).hu).clamp(-1000, 1000)
            seen = ~result.hidden[:32, :48, :64]
            assert torch.equal(result.predicted[:32, :48, :64][seen], crop.float()[seen])


def test_monai_s_vit_gives_the_same_tokens_and_another_patch_is_refused(tmp_path):
    run_dir = save_run(tmp_path / "run", Split(("a" * 32,), ()), replace(SMALL, width=64))
    trained = load_run(run_dir)
    encoder = encoder_of(trained.model, trained.intensity)

    def vit(patch):
        from monai.networks.nets import ViT  # takes seconds

        return ViT(
            1, CROP, patch, hidden_size=64, mlp_dim=256, num_layers=1, num_heads=1, proj_type="perceptron",
            qkv_bias=True,
        )  # fmt: skip

    volume = torch.randint(-1000, 1000, (2, *CROP), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    image = (((volume.float() + 1000) / 2000 - 0.4) / 0.3)[:, None]
    loaded = load_into_monai_vit(encoder, vit(PATCH)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(image)[0], encoder(volume), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"patch_size=\(4, 8, 8\), found \(8, 8, 4\)"):
        load_into_monai_vit(encoder, vit((8, 8, 4)))


@pytest.mark.slow
def test_probe_and_finetune_take_them(tmp_path):
    store, labels, _ = labelled_store(tmp_path, 3)
    model = replace(SMALL, crop=(16, 32, 24), patch=PATCH, width=16, decoder_width=16)
    run_dir = save_run(tmp_path / "run", Split(("patient-0",), ()), model)
    other = save_run(tmp_path / "ae", Split(("patient-0",), ()), replace(model, kind="ae"))
    trained, volume = load_run(run_dir), store.volumes()[0]
    encoder, places = encoder_of(trained.model, trained.intensity), np.argwhere(np.ones((4, 4, 6)))
    found = _features(SuperpatchReader(store), volume, places, {"maesil": encoder})
    hu = SuperpatchReader(store).read_region(volume.volume_id, (0, 0, 0), (16, 32, 48))
    expected = ((patchify(torch.from_numpy(hu)[None].float().clamp(-1000, 1000), PATCH)[0] + 1000) / 2000 - 0.4) / 0.3
    torch.testing.assert_close(torch.from_numpy(found["voxels"]), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        tokens = encoder(torch.from_numpy(hu[None, :, :, 24:].copy()))[0]
    behind = torch.from_numpy(found["maesil"][places[:, 2] >= 3])
    torch.testing.assert_close(behind, tokens, atol=1e-5, rtol=1e-5)

    report = probe(run_dir, store.path, labels, against=[other], device="cpu", patches=600)
    assert {row["encoder"] for row in report.rows} == {"maesil", "untrained", "ae", "voxels"}
    assert any(row["r2"] is not None for row in report.rows)
    budget = FinetuneBudget(steps=2, batch=2, seeds=1)
    tuned = finetune(run_dir, store.path, labels, tmp_path / "out", budget=budget, device="cpu")
    assert {row["start"] for row in tuned.rows} == {"pretrained", "scratch"}
