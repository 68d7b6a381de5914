"""A real store, a real (tiny, untrained) run, the whole evaluation."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import save_run
from support.slow_scores import volume_rows
from support.stores import add_volume, make_store, synthetic_hu
from support.training import plainly

from maesil.config.schema import MaskConfig
from maesil.data.crops import grid_crops
from maesil.data.known_scans import SCANS, record_scans
from maesil.data.split import Split
from maesil.errors import CheckpointError, NoInputError, StoreError, UsageError
from maesil.evaluation.evaluate import choose_volumes, evaluate, taken
from maesil.evaluation.predict import ModelPredictor, Reconstruction, make_predictors, mask_seed, reconstruct
from maesil.evaluation.reconstruct import reconstruct_volume
from maesil.evaluation.scores import as_json_has_it
from maesil.evaluation.volume import score_volume, score_volumes
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.patches import expand_cells
from maesil.store.index import patients
from maesil.store.reader import SuperpatchReader
from maesil.training.checkpoint import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

ROW_KEYS = {
    "model", "table", "input", "region", "mask", "seed", "window", "psnr_hidden", "psnr_whole", "psnr_pasted",
    "ssim_3d", "ssim_axial", "lpips", "mae_hu", "border_ratio", "volumes",
    "encoder_gain_db", "encoder_gain_shuffled_db", "effective_rank",
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def undrawn():
    """Pictures are half of what an evaluation of small volumes takes."""
    with plainly():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of four volumes of three patients, a run trained on the first, and its report on the others."""
    folder = tmp_path_factory.mktemp("evaluate")
    store = make_store(folder / "store", [(40, 48, 45), (33, 40, 64)], superpatch=64)
    # A third patient with two scans: below z 24 the second one holds no scan, only what padding may hold.
    add_volume(store, synthetic_hu((40, 40, 40), 5), name="third a", group="third", spacing=(3.0, 1.0, 1.0))
    valid = np.ones((40, 40, 40), dtype=bool)
    valid[:24] = False
    add_volume(
        store, synthetic_hu((40, 40, 40), 6), name="third b", group="third", valid=valid, spacing=(5.0, 1.0, 1.0)
    )
    volumes = store.volumes()
    trained = next(volume for volume in volumes if volume.group != "third")
    run = save_run(folder / "run", Split(train=(trained.group,), validation=()))
    report = evaluate(run, folder / "store", device="cpu", json_path=folder / "out" / "scores.json")
    return folder, store, run, report, trained


@pytest.mark.parametrize("kind", ["dual", "none"])
def test_scores_taken_together_are_those_taken_one_by_one(world, tmp_path, kind):
    """Shared passes, shared statistics of the reference, fields in place: the figures as they were first written.

    Float32 is added up in another order. The 30 steps of the spline do not converge, so that moves it by a little more.
    """
    _, store, run, *_ = world
    if kind == "none":
        run = save_run(tmp_path / "run", Split((), ()), mask=MaskConfig(kind="none"))
    loaded, reader, volume = load_run(run), SuperpatchReader(store), store.volumes()[-1]
    expected = [as_json_has_it(row) for row in volume_rows(loaded, reader, volume, seed=3)]
    found = score_volumes(loaded, reader, [volume], make_predictors(loaded), seed=3)
    assert len(found) == len(expected) == (32 if kind == "dual" else 12)
    for one, other in zip(found, expected, strict=True):
        assert {name: one[name] for name in other if isinstance(other[name], str)}.items() <= other.items()
        for name, value in other.items():
            if isinstance(value, float | list):
                in_db, exact = name.endswith("_db") or name.startswith("psnr"), one["model"] != "interpolation"
                tolerance = {"abs": 1e-4 if exact else 0.005} if in_db else {"rel": 1e-4 if exact else 3e-3}
                assert one[name] == pytest.approx(value, **tolerance), (name, other)
            else:
                assert one[name] == value, name


def of(rows, **wanted):
    (row,) = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return row


def test_rows_are_those_of_the_protocol(world):
    folder, _, run, report, trained = world
    document = json.loads((folder / "out" / "scores.json").read_text())
    assert document == json.loads((run / "evaluation" / "scores.json").read_text())
    assert document["rows"] == report.rows
    found = [(row["region"], row["model"]) for row in report.rows]
    assert found == [
        (region, model)
        for region in ("body", "whole")
        for model in ("maesil", "maesil_tokens", "mean", "interpolation")
    ]
    for row in report.rows:
        assert set(row) == ROW_KEYS
        assert (row["table"], row["input"], row["mask"], row["seed"]) == ("A", "masked", "dual", 0)
        assert row["window"] == [-1000, 1000] and row["lpips"] is None and row["volumes"] == 3
        assert (row["border_ratio"] is None) == (row["model"] == "mean")
        assert all(isinstance(row[name], float) for name in ("psnr_hidden", "psnr_whole", "psnr_pasted", "mae_hu"))
        assert row["psnr_pasted"] > row["psnr_hidden"] and -1 <= row["ssim_3d"] <= 1
    assert trained.volume_id not in {row["volume_id"] for row in report.per_volume}


def test_interpolation_beats_the_mean_and_an_untrained_model(world):
    rows = world[3].rows
    for region in ("body", "whole"):
        best = of(rows, region=region, model="interpolation")
        for model in ("mean", "maesil"):
            assert best["psnr_hidden"] > of(rows, region=region, model=model)["psnr_hidden"] + 2


def test_rows_are_means_over_volumes_of_independent_sums(world):
    """The mean baseline, once more, by NumPy, from crops and maps alone."""
    _, store, run, report, trained = world
    reader, config = SuperpatchReader(store), load_run(run).config
    scores = []
    for volume in store.volumes():
        if volume.volume_id == trained.volume_id:
            continue
        errors = []
        for crop in grid_crops(reader, [volume.volume_id], 32):
            masks = make_masks(config.mask, (4, 4, 4), [mask_seed(0, volume.volume_id, crop.origin)])
            hidden = expand_cells(masks.mask.view(4, 4, 4), 8).numpy() > 0
            valid = np.kron(crop.valid == 255, np.ones((8, 8, 8), dtype=bool))
            body = np.kron(crop.body >= 128, np.ones((8, 8, 8), dtype=bool)) & valid
            hu = np.clip(crop.hu.astype(np.float64), -1000, 1000)
            known = hu[valid & ~hidden]
            errors.append(hu[body & hidden] - (known.mean() if known.size else -1000))
        squared = np.concatenate(errors) ** 2
        scores.append(10 * np.log10(2000**2 / squared.mean()))
    assert of(report.rows, region="body", model="mean")["psnr_hidden"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert of(report.rows, region="body", model="mean")["volumes"] == len(scores)


def test_other_rows_split_hidden_body_voxels(world):
    others = world[3].rows_other
    thickness = {row["group_name"] for row in others if row["group_by"] == "slice_thickness"}
    assert thickness == {"<= 2 mm", "2-3.5 mm", "> 3.5 mm"}
    for row in others:
        assert set(row) == ROW_KEYS | {"group_by", "group_name"}
    columns = [of(others, group_by="column", group_name=name, model="interpolation", region="body")
               for name in ("hidden everywhere", "partly visible")]  # fmt: skip
    assert columns[0]["psnr_hidden"] < columns[1]["psnr_hidden"]  # further from anything visible
    lung = of(others, group_by="hu_class", group_name="lung", model="mean", region="body")
    assert lung["volumes"] == 3 and lung["ssim_3d"] is None


def test_pictures_and_table(world):
    from rich.console import Console

    report = world[3]
    assert len(report.pictures) == 6 and all(path.stat().st_size > 10_000 for path in report.pictures)
    console = Console(width=160, file=io.StringIO())
    console.print(report.table())
    text = console.file.getvalue()
    assert "interpolation" in text and "±" in text and "3 volumes" in text
    shown = f"{of(report.rows, region='whole', model='maesil')['psnr_hidden']:.2f}"
    assert shown in text


def test_equal_seeds_give_equal_scores_and_voxels_outside_the_scan_do_not_count(undrawn, world, tmp_path):
    _, _, run, report, _ = world
    again = make_store(tmp_path / "store", [(40, 48, 45), (33, 40, 64)], superpatch=32)
    hu = synthetic_hu((40, 40, 40), 6)
    noise = np.random.default_rng(0).integers(-1024, 3000, hu.shape).astype(np.int16)
    valid = np.ones(hu.shape, dtype=bool)
    valid[:24] = False
    body = (hu > -950) & valid
    add_volume(again, np.where(valid, hu, noise), name="third b", group="third", valid=valid, body=body)
    (volume,) = [volume for volume in again.volumes() if volume.group == "third"]
    second = evaluate(run, tmp_path / "store", out=tmp_path / "out", device="cpu", volumes=[volume.volume_id[:12]])
    for model in ("mean", "interpolation"):
        before = of(report.per_volume, volume_id=volume.volume_id, region="body", model=model)
        after = of(second.per_volume, volume_id=volume.volume_id, region="body", model=model)
        for name in ("psnr_hidden", "psnr_whole", "ssim_3d", "ssim_axial", "mae_hu"):
            assert after[name] == pytest.approx(before[name], rel=1e-5), (model, name)


def test_what_is_put_out_where_the_model_saw_counts_in_the_score_of_all_voxels_alone(tmp_path):
    """Perfect where hidden, wild where visible: all scores but that of the whole output are perfect."""
    run = load_run(save_run(tmp_path / "run", Split(("a",), ())))
    reference = torch.from_numpy(synthetic_hu((32, 32, 32), 1))
    hidden = expand_cells(make_masks(run.config.mask, (4, 4, 4), [7]).mask.view(4, 4, 4) > 0, 8)
    predicted = torch.where(hidden, reference.float(), reference.float().flip(2))
    everywhere = torch.ones(reference.shape) > 0
    result = Reconstruction(predicted, hidden, torch.zeros(reference.shape) > 0)
    (rows,) = score_volume(reference, [result], {"body": everywhere, "whole": everywhere}, run)
    for row in rows:
        if "group_by" not in row:
            assert (row["psnr_hidden"], row["psnr_pasted"], row["mae_hu"]) == (np.inf, np.inf, 0)
            assert [row[name] for name in ("ssim_3d", "ssim_axial", "border_ratio")] == pytest.approx([1, 1, 1])
            error = (reference.float().clamp(-1000, 1000) - predicted.clamp(-1000, 1000)).square().mean().item()
            assert row["psnr_whole"] == pytest.approx(10 * np.log10(2000**2 / error), abs=1e-3)


def test_another_seed_hides_other_patches(world):
    _, store, run, _, _ = world
    loaded, reader, volume = load_run(run), SuperpatchReader(store), store.volumes()[0]
    first, same, other = (
        reconstruct(reader, volume, predictor, loaded.config, seed, CPU)
        for predictor, seed in zip(make_predictors(loaded), (0, 0, 1), strict=False)
    )
    assert torch.equal(first.hidden, same.hidden)
    assert not torch.equal(first.hidden, other.hidden)
    assert (first.column_hidden & ~first.hidden).sum() == 0 < first.column_hidden.sum() < first.hidden.sum()


def test_model_predictor_agrees_with_the_loss(world):
    """Its hidden voxels, in HU, give the loss that training would report."""
    run = load_run(world[2])
    for parameter in run.model.parameters():
        parameter.data *= 0.7  # predictions stay inside the window
    hu = torch.from_numpy(synthetic_hu((32, 32, 32), 1))[None]
    masks = make_masks(run.config.mask, (4, 4, 4), [7])
    predicted = ModelPredictor(run.model, run.intensity).predict_hu(hu, masks)
    hidden = expand_cells(masks.mask.view(1, 4, 4, 4) > 0, 8)
    in_units = (predicted - hu.float().clamp(-1000, 1000))[hidden] / 2000 / run.intensity.std
    with torch.no_grad():
        inputs = MaskedInput(hu, masks, run.intensity, 8)
        loss = inputs.loss(run.model(inputs).patches_BSV)
    assert in_units.square().mean().item() == pytest.approx(loss.item(), rel=0.02)  # but for clipping to the window


def test_training_volumes_are_never_scored_silently(undrawn, world, tmp_path):
    folder, store, run, _, trained = world
    everybody = save_run(tmp_path / "run", Split(train=tuple(v.group for v in store.volumes()), validation=()))
    with pytest.raises(UsageError, match="--volumes all"):
        evaluate(everybody, folder / "store", device="cpu")
    report = evaluate(run, folder / "store", out=tmp_path / "o", device="cpu", volumes=[trained.volume_id])
    assert "trained on the patients of 1 of 1 volume:" in report.notes[0]


def test_wrong_paths_end_in_one_clear_line(world, tmp_path):
    folder, _, run, _, _ = world
    with pytest.raises(StoreError, match="maesil ingest"):
        evaluate(run, tmp_path / "nothing", device="cpu")
    with pytest.raises(CheckpointError):
        evaluate(tmp_path / "nothing", folder / "store", device="cpu")
    make_store(tmp_path / "empty", [])
    with pytest.raises(NoInputError, match="no volumes"):
        evaluate(run, tmp_path / "empty", device="cpu")
    with pytest.raises(UsageError, match="volume"):
        evaluate(run, folder / "store", device="cpu", volumes=["no such id"])


def test_mask_seeds_are_stable():
    assert mask_seed(0, "volume", (0, 64, 128)) == mask_seed(0, "volume", (0, 64, 128)) == 5675628946705765209
    others = {mask_seed(s, v, o) for s in (0, 1) for v in ("volume", "v") for o in ((0, 0, 0), (64, 0, 0), (0, 64, 0))}
    assert len(others) == 12 and all(0 <= seed < 2**63 for seed in others)


def test_a_copy_of_a_training_scan_under_another_group_is_not_scored(tmp_path):
    store = make_store(tmp_path / "s", [(64, 64, 64)], superpatch=32)
    add_volume(store, synthetic_hu((64, 64, 64)), name="copy", group="copy")
    add_volume(store, synthetic_hu((50, 64, 40), seed=8), name="other", group="other")
    leaders = patients([store])
    original = next(v.group for v in store.volumes() if v.group not in ("copy", "other"))
    assert [v.group for v in choose_volumes(store, Split((original,), ()), None, leaders)] == ["other"]
    assert len(choose_volumes(store, Split((original,), ()), None)) == 2
    with pytest.raises(UsageError, match="trained on 1 of 2"):
        choose_volumes(store, Split((original,), ()), None, leaders, test=("copy", "other"))
    (chosen,) = choose_volumes(store, Split((original,), ()), None, leaders, test=("other",))
    assert taken(store, [chosen], "body > 0") == [chosen]
    with pytest.raises(UsageError, match="takes none of 1 volume"):
        taken(store, [chosen], "body > 1")


def test_copies_are_not_scored_though_the_training_store_is_gone(tmp_path, undrawn):
    """The run alone is asked; what it cannot know is said."""
    store = make_store(tmp_path / "s", [(40, 48, 40)], superpatch=32)
    (trained,) = store.volumes()
    run = save_run(tmp_path / "run", Split((trained.group,), ()))
    other = make_store(tmp_path / "other", [], superpatch=32)
    add_volume(other, synthetic_hu((40, 48, 40)), name="copy", group="copy")
    add_volume(other, synthetic_hu((40, 40, 48), seed=8), name="new", group="new")
    record_scans(run, [store], Split((trained.group,), ()))
    shutil.rmtree(tmp_path / "s")
    report = evaluate(run, tmp_path / "other", device="cpu")
    assert {row["group"] for row in report.per_volume} == {"new"}
    assert not any("recognise" in note for note in report.notes)
    everyone = evaluate(run, tmp_path / "other", device="cpu", volumes=["all"])
    assert everyone.notes[0].startswith("the run was trained on the patients of 1 of 2 volumes")
    facts = json.loads((run / "evaluation" / "scores.json").read_text())
    assert facts["weights_sha256"] == load_run(run).weights_sha256()
    copy = next(v.volume_id for v in other.volumes() if v.group == "copy")
    notes = reconstruct_volume(run, other.path, copy, device="cpu").notes
    assert any("trained on this patient" in note for note in notes)
    (run / SCANS).unlink()
    blind = evaluate(run, tmp_path / "other", device="cpu")
    assert {row["group"] for row in blind.per_volume} == {"new", "copy"}
    assert any("keeps nothing to recognise its scans by" in note for note in blind.notes)


def test_a_split_is_told_what_is_true_of_it(tmp_path):
    store = make_store(tmp_path / "s", [])
    for seed, name in enumerate(("a", "b", "c", "d")):
        add_volume(store, synthetic_hu((32, 32, 32), seed), name=name, group=name)
    run = Split(("a",), ("b",), ("c",))
    with pytest.raises(UsageError, match="trained on 1 and validated on 1 of 3 volumes"):
        choose_volumes(store, run, None, test=("a", "b", "c"))
    with pytest.raises(UsageError, match="trained on 0 and validated on 1 of 1 volume that"):
        choose_volumes(store, run, None, test=("b",))
    with pytest.raises(UsageError, match="found none among its 4 volumes"):
        choose_volumes(store, run, None, test=("elsewhere",))


def test_an_evaluation_that_is_cut_off_leaves_nothing_of_itself(world, tmp_path, monkeypatch):
    folder, _, run, *_ = world
    module = sys.modules["maesil.evaluation.evaluate"]
    drawn = module._draw

    def second_is_interrupted(*given):
        if list(Path(given[-2]).iterdir()):
            raise KeyboardInterrupt
        return drawn(*given)

    monkeypatch.setattr(module, "_draw", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, folder / "store", device="cpu", out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
