"""The probe on phantoms whose organs are known: what it looks at, who is kept apart, and that it can tell."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.labelled import SPACING, affine_of, labelled_store, phantom
from support.runs import SMALL, save_run
from support.stores import add_volume

from maesil.config.schema import MaskConfig
from maesil.data.known_scans import record_scans
from maesil.data.split import Split
from maesil.documents import read_json
from maesil.downstream.folds import Patients
from maesil.downstream.labels import load_labels
from maesil.downstream.probe import (
    Fold,
    Patches,
    _fold,
    _rare,
    _score,
    encoders_of,
    look_at,
    patch_classes,
    probe,
    spatial_folds,
)
from maesil.errors import UsageError
from maesil.models.encoders import encoder_of, untrained_encoder
from maesil.store.index import write_index
from maesil.store.nifti import write_nifti
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.synthetic.phantom import ORGANS
from maesil.training.checkpoint import load_run

pytestmark = pytest.mark.usefixtures("one_thread")
SPLIT = Split(("patient-0",), ("patient-1",))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    store, labels, volumes = labelled_store(folder, 4)
    save_run(folder / "run", SPLIT)
    save_run(folder / "ae", SPLIT, replace(SMALL, kind="ae", channels=4, latent=16), MaskConfig())
    report = probe(folder / "run", store.path, labels, against=[folder / "ae"], device="cpu")
    return folder, store, labels, volumes, report


def test_every_encoder_and_class_is_scored_and_written(world):
    folder, _, _, _, report = world
    document = read_json(folder / "run" / "probe" / "probe.json")
    assert document == json.loads(json.dumps(report.document()))
    found = [(row["encoder"], row["class"]) for row in report.rows]
    assert found == [(e, c) for e in ("maesil", "untrained", "ae", "voxels") for c in (*ORGANS, "mean")]
    assert (document["folds"], document["patients_scored"], document["patients_learnt_from_only"]) == (3, 3, 1)
    table = report.table()[0]
    assert table.row_count == 5 and len(table.columns) == 5


def test_lungs_can_be_told_from_a_token(world):
    *_, report = world
    lung = {row["encoder"]: row for row in report.rows if row["class"] == "lung"}
    assert all(lung[name]["r2"] > 0.25 and lung[name]["auroc"] > 0.85 for name in ("maesil", "untrained")), lung
    # This run was never trained, and drawn by the same seed: its untrained twin is itself.
    assert lung["maesil"]["r2"] == lung["untrained"]["r2"] != lung["ae"]["r2"]


def test_tokens_that_know_the_answer_score_1_and_tokens_of_other_patches_0():
    rng = np.random.default_rng(0)

    def patient(n: int = 300) -> Patches:
        shares = rng.random((n, 2)).astype(np.float32) * (rng.random((n, 2)) < 0.5)
        noise = rng.normal(size=(n, 6)).astype(np.float32)
        knowing = (shares @ np.ones((2, 6)) + shares[:, :1] * np.arange(6) + 1e-3 * noise).astype(np.float32)
        return Patches(np.zeros((n, 3), np.int64), shares, {"knowing": knowing, "noise": noise})

    one, two, three = patient(), patient(), patient()
    rows = _score([Fold((one, two), three), Fold((two, three), one)], ["knowing", "noise"], ["x", "y"])
    scores = {(row["encoder"], row["class"]): row for row in rows}
    assert all(
        scores["knowing", name]["r2"] > 0.99 and scores["knowing", name]["auroc"] > 0.99 for name in ("x", "y", "mean")
    )
    assert all(
        abs(scores["noise", name]["r2"]) < 0.1 and 0.4 < scores["noise", name]["auroc"] < 0.6 for name in ("x", "y")
    )
    assert len(scores["knowing", "x"]["r2_by_fold"]) == 2


def test_the_same_seed_gives_the_same_scores_and_another_one_does_not(world, tmp_path):
    folder, store, labels, *_ = world
    few = {"patches": 200, "device": "cpu", "out": tmp_path}
    one, again = (probe(folder / "run", store.path, labels, **few).rows for _ in range(2))
    assert one == again
    assert probe(folder / "run", store.path, labels, seed=1, **few).rows != one


def test_shares_are_counted_patch_by_patch_and_only_whole_known_patches_of_the_body_are_used(world, tmp_path):
    _, store, folder, volumes, _ = world
    reader, labels = SuperpatchReader(store), load_labels(folder, volumes, tmp_path)
    volume, array = volumes[2], np.array(labels.of(volumes[2]))
    array[:8, 8:16, 24] = 255  # a column of one patch is unlabelled
    shares, usable = patch_classes(reader, volume, array, 4, SMALL)
    assert shares.shape == (8, 8, 8, 4) and usable.shape == (8, 8, 8)
    for index in np.ndindex(6, 4, 6):
        box = tuple(slice(8 * i, 8 * i + 8) for i in index)
        assert shares[index] == pytest.approx([(array[box] == k).mean() for k in range(1, 5)])
    body = reader.read_map(volume.volume_id, "body")[:6, :4, :6] > 0
    expected = body.copy()
    expected[0, 1, 3] = False
    assert np.array_equal(usable[:6, :4, :6], expected)
    # 34 voxels along y: the fifth patch is not whole; nothing lies beyond the volume.
    assert not usable[:, 4:].any() and not usable[6:].any() and not usable[:, :, 6:].any()
    coarse = replace(SMALL, patch=16)
    shares, usable = patch_classes(reader, volume, array, 4, coarse)
    assert shares[1, 1, 1] == pytest.approx([(array[16:32, 16:32, 16:32] == k).mean() for k in range(1, 5)])
    assert np.array_equal(usable[:3, :2, :3], body.reshape(3, 2, 2, 2, 3, 2).any(axis=(1, 3, 5)) & _not_first(usable))


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_a_patch_that_is_not_valid_as_a_whole_is_not_used(tmp_path, patch):
    """Two voxels outside the scan are enough; of a patch of two cells along each axis, one cell."""
    hu, valid = np.full((32, 32, 32), 40, np.int16), np.ones((32, 32, 32), bool)
    valid[20, 3, 9:11] = False
    store = Store.create(tmp_path / "s", Recipe(spacing=None, superpatch=32), key_fingerprint="0" * 16)
    volume = add_volume(store, hu, valid=valid, body=np.ones(hu.shape, bool))
    model = replace(SMALL, patch=patch)
    _, usable = patch_classes(SuperpatchReader(store), volume, np.ones(hu.shape, np.uint8), 1, model)
    cell, count = (20 // 8, 3 // 8, 9 // 8), max(1, 8 // patch)
    expected = np.ones((32 // patch,) * 3, bool)
    expected[tuple(slice(8 * i // patch, 8 * i // patch + count) for i in cell)] = False
    assert np.array_equal(usable, expected)


def test_nobody_is_in_both_parts_of_a_fold_and_every_unseen_patient_is_scored_once():
    """Patches bear the number of their patient; two volumes are of one."""
    looked_at = {
        name: Patches(np.zeros((4, 3), np.int64), np.full((4, 1), number, np.float32), {"a": np.zeros((4, 2))})
        for number, name in enumerate(["a", "a2", "b", "c", "d", "e"])
    }
    patients = Patients((("a", "a2"), ("b",), ("c",), ("d",)), (("e",),))
    for count in (2, 3, 4, 9):
        folds, _, _ = _fold(looked_at, patients, [], SMALL, count)
        assert len(folds) == min(count, 4)
        scored = [set(fold.test.shares_NK[:, 0].tolist()) for fold in folds]
        assert sorted(one for some in scored for one in some) == [0, 1, 2, 3, 4]
        for fold, out in zip(folds, scored, strict=True):
            learnt = [set(part.shares_NK[:, 0].tolist()) for part in fold.train]
            assert set().union(*learnt) == {0, 1, 2, 3, 4, 5} - out
            assert all(({0, 1} <= some) == (0 in some or 1 in some) for some in (*learnt, out))
            assert len(learnt) == 5 - sum(some <= out for some in ({0, 1}, {2}, {3}, {4}))


def _not_first(usable: np.ndarray) -> np.ndarray:
    keep = np.ones((3, 2, 3), bool)
    keep[0, 0, 1] = False
    return keep


def test_tokens_stand_beside_the_shares_of_their_own_patch(world, tmp_path):
    folder, store, labels_dir, volumes, _ = world
    reader, labels = SuperpatchReader(store), load_labels(labels_dir, volumes, tmp_path)
    run = load_run(folder / "run")
    encoder = encoder_of(run.model, run.intensity)
    patches = look_at(reader, labels, {"maesil": encoder}, 50, 0)[volumes[3].volume_id]
    assert len(patches.place_N3) == 50 == len(np.unique(patches.place_N3, axis=0))
    assert len(np.unique(patches.place_N3[:, 0])) == 6, "drawn from a part of the volume alone"
    hu = reader.read_region(volumes[3].volume_id, (0, 0, 0), (64, 64, 64))
    for place, voxels, token in zip(
        patches.place_N3, patches.features["voxels"], patches.features["maesil"], strict=True
    ):
        box = tuple(slice(8 * i, 8 * i + 8) for i in place)
        np.testing.assert_allclose(
            voxels, ((np.clip(hu[box], -1000, 1000) + 1000) / 2000 - 0.4).ravel() / 0.3, atol=1e-5
        )
        crop = tuple(slice(32 * (i // 4), 32 * (i // 4) + 32) for i in place)
        z, y, x = place % 4
        with torch.no_grad():
            tokens = encoder(torch.from_numpy(np.ascontiguousarray(hu[crop]))[None])[0]
        np.testing.assert_allclose(token, tokens[(z * 4 + y) * 4 + x], rtol=1e-4, atol=1e-5)


def test_one_patient_is_cut_into_layers_a_patch_apart():
    rng = np.random.default_rng(0)
    place = np.argwhere(np.ones((12, 8, 8), bool))
    patches = Patches(place, rng.random((len(place), 1), np.float32), {"a": rng.random((len(place), 2), np.float32)})
    folds = list(spatial_folds(patches, (96, 64, 60), SMALL))
    assert len(folds) == 3
    for number, fold in enumerate(folds):
        assert set(fold.test.place_N3[:, 0]) == set(range(4 * number, 4 * number + 4))
        learnt = np.concatenate([part.place_N3[:, 0] for part in fold.train])
        assert np.abs(learnt[:, None] - fold.test.place_N3[None, ::16, 0]).min() == 2
        assert len(fold.train) == 2
    scored = np.concatenate([fold.test.place_N3 for fold in folds])
    assert len(scored) == len(place) == len(np.unique(scored, axis=0))


def test_with_one_labelled_patient_blocks_of_it_are_kept_apart(world, tmp_path):
    folder, store, labels, volumes, _ = world
    (tmp_path / "one").mkdir()
    shutil.copy(labels / f"{volumes[2].volume_id}.nii.gz", tmp_path / "one")
    report = probe(folder / "run", store.path, tmp_path / "one", out=tmp_path / "out", device="cpu")
    assert report.facts["folds"] == 2 and report.notes[0].startswith("one labelled patient: 2 folds")
    assert report.notes[1] == "labels of 1 of 4 volumes"


def test_a_second_volume_of_the_one_patient_is_said_to_be_unused(world, tmp_path):
    folder, _, _, _, _ = world
    twin, shape = tmp_path / "twin", (48, 34, 48)
    twins = Store.create(twin, Recipe(spacing=None, superpatch=32), key_fingerprint="0" * 16)
    for seed, name in enumerate(("first", "second")):
        hu, organs = phantom(seed, shape, affine_of())
        volume = add_volume(twins, hu, name=name, group="one patient", spacing=SPACING)
        write_nifti(tmp_path / "l" / f"{volume.volume_id}.nii.gz", organs, volume.affine)
    write_index(twins)
    both = probe(folder / "run", twin, tmp_path / "l", out=tmp_path / "out", device="cpu")
    assert "the other 1 volume of the patient not used" in both.notes[0]
    counts = []
    for path in sorted((tmp_path / "l").iterdir()):
        (tmp_path / path.name[:8]).mkdir()
        shutil.copy(path, tmp_path / path.name[:8])
        alone = probe(folder / "run", twin, tmp_path / path.name[:8], out=tmp_path / "out", device="cpu")
        counts.append((alone.facts["patches"], alone.facts["classes"]))
    assert (both.facts["patches"], both.facts["classes"]) in counts


def test_a_patient_that_was_trained_on_is_scored_on_request_alone(world, tmp_path):
    folder, store, labels, volumes, _ = world
    (tmp_path / "one").mkdir()
    shutil.copy(labels / f"{volumes[0].volume_id}.nii.gz", tmp_path / "one")
    with pytest.raises(UsageError, match="--include-trained"):
        probe(folder / "run", store.path, tmp_path / "one", out=tmp_path / "out", device="cpu")
    report = probe(
        folder / "run", store.path, tmp_path / "one", out=tmp_path / "out", device="cpu", include_trained=True
    )
    assert "optimistic" in report.notes[-1]


def test_whoever_any_compared_encoder_was_trained_on_is_known(tmp_path):
    runs = [save_run(tmp_path / name, Split((name,), ()), replace(SMALL, kind=name)) for name in ("maesil", "mae2d")]
    encoders, trained_on = encoders_of(runs, 5, torch.device("cpu"))
    assert list(encoders) == ["maesil", "untrained", "mae2d"] and trained_on == {"maesil", "mae2d"}
    drawn = untrained_encoder(SMALL, encoders["maesil"].intensity, 5)
    assert torch.equal(encoders["untrained"].patch_embed.weight, drawn.patch_embed.weight)


def test_runs_that_cannot_be_compared_are_refused(world, tmp_path):
    folder, store, labels, _, _ = world
    coarse = save_run(tmp_path / "coarse", SPLIT, replace(SMALL, patch=16))
    with pytest.raises(UsageError, match=r"equal model\.crop and model\.patch"):
        probe(folder / "run", store.path, labels, against=[coarse], out=tmp_path)
    with pytest.raises(UsageError, match="compared with itself"):
        probe(folder / "run", store.path, labels, against=[folder / "run"] * 2, out=tmp_path)


def test_labels_in_one_layer_of_crops_are_not_enough_of_one_patient(world, tmp_path):
    folder, store, _, volumes, _ = world
    lower = np.zeros(volumes[2].shape, np.int16)[:32]
    lower[:, :12] = 1
    write_nifti(tmp_path / "l" / f"{volumes[2].volume_id}.nii.gz", lower, volumes[2].affine)
    with pytest.raises(UsageError, match="two layers of crops"):
        probe(folder / "run", store.path, tmp_path / "l", out=tmp_path, device="cpu")


def test_a_copy_of_another_store_s_training_scan_is_learnt_from_and_not_scored(world, tmp_path):
    """The run was trained on a copy that is gone: the probed store knows nothing of it, the run does."""
    _, store, labels, volumes, _ = world
    elsewhere = Store.create(tmp_path / "elsewhere", Recipe(spacing=None, superpatch=32), key_fingerprint="0" * 16)
    hu = SuperpatchReader(store).read_region(volumes[1].volume_id, (0, 0, 0), volumes[1].shape)
    add_volume(elsewhere, hu, name="copy", group="copy", spacing=SPACING)
    split = Split(("copy",), ())
    for path in (tmp_path / "run", tmp_path / "other"):
        save_run(path, split, replace(SMALL, kind="mae2d") if path.name == "other" else SMALL)
    record_scans(tmp_path / "run", [elsewhere], split)
    shutil.rmtree(tmp_path / "elsewhere")
    few = {"patches": 150, "device": "cpu"}
    facts = probe(tmp_path / "run", store.path, labels, **few).document()
    assert (facts["patients_scored"], facts["patients_learnt_from_only"]) == (3, 1)
    assert not any("recognise" in note for note in facts["notes"])
    facts = probe(tmp_path / "other", store.path, labels, **few).document()
    assert facts["patients_scored"] == 4
    assert any("keeps nothing to recognise its scans by" in note for note in facts["notes"])
    facts = probe(tmp_path / "other", store.path, labels, against=[tmp_path / "run"], **few).document()
    assert facts["patients_scored"] == 3


def test_a_class_of_one_patient_is_noted():
    def patient(*has):
        shares = np.zeros((5, 3), np.float32)
        shares[2, list(has)] = 0.5
        return Patches(np.zeros((5, 3), np.int64), shares, {})

    looked_at = {"a": patient(0, 1), "a2": patient(1), "b": patient(0), "c": patient(0)}
    told = list(_rare(looked_at, Patients((("a", "a2"), ("b",)), (("c",),)), ["everywhere", "in a", "nowhere"]))
    assert len(told) == 1 and told[0].startswith("in a is in one of the 3 patients alone")
    assert not list(_rare(looked_at, Patients((("a", "a2"),), ()), ["everywhere", "in a", "nowhere"]))
