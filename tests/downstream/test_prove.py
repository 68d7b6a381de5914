"""The whole command on phantoms: everything is scored, a restart changes nothing, and nobody is scored unfairly."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.proofs import SPLIT, TINY, make_world

from maesil.data.split import Split, write_split
from maesil.documents import read_json
from maesil.downstream import few_shot
from maesil.downstream.prove import ProofBudget, prove
from maesil.downstream.scored import EVERYWHERE, SHUFFLED
from maesil.errors import DamagedError, UsageError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
THEIRS = "support.proofs:of_patches"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prove")
    made = make_world(folder)
    return made, folder / "proof", run(made, folder / "proof", adapters=[THEIRS])


def run(made, out, **given):
    store, labels, _, run_dir, split = made
    return prove(run_dir, store.path, labels, out, **{"budget": TINY, "split_file": split, "device": "cpu", **given})


def test_all_encoders_are_scored_on_the_validation_patients_alone(world):
    _, out, proof = world
    assert read_json(out / "prove.json") == json.loads(json.dumps(proof.document()))
    frozen = {"maesil", "untrained", THEIRS, "voxels", SHUFFLED}
    assert set(proof.rows.encoders(["share_r2"])) == frozen == set(proof.rows.encoders(["presence_auroc"]))
    assert set(proof.rows.encoders(["dice"])) == {
        "maesil", "scratch", "maesil, frozen", "untrained, frozen", f"{THEIRS}, frozen", SHUFFLED, EVERYWHERE,
    }  # fmt: skip
    assert {row.patient for row in proof.rows.rows} == set(SPLIT.validation)
    assert proof.made_from["patients_learnt_from"] == list(SPLIT.train) and proof.rows.shots() == [2]
    assert all(np.isfinite(row.value) for row in proof.rows.rows)


def test_shuffled_labels_know_nothing_and_the_run_is_its_untrained_twin(world):
    rows = world[2].rows
    assert rows.mean("share_r2", SHUFFLED) < 0.05 < rows.mean("share_r2", "maesil")
    assert rows.mean("share_r2", "maesil") == rows.mean("share_r2", "untrained")  # this run was never trained
    assert not [one for one in world[2].findings if one.verdict in ("helps", "harms")]


def test_the_page_says_what_may_be_concluded_and_what_may_not(world):
    page = (world[1] / "index.html").read_text()
    assert "Does this encoder help?" in page and "too few to show a difference" in page
    assert "choices may rest on them" in page and "what an adapter&#39;s encoder was trained on" in page
    assert 'src="data:image/png;base64,' in page and "http" not in page


def test_killed_and_started_again_it_gives_the_same_rows_and_makes_nothing_twice(world, tmp_path, monkeypatch):
    made, _, proof = world
    train, turns = few_shot.train_segmenter, []

    def killed(*given):
        turns.append(1)
        if len(turns) == 4:
            raise KeyboardInterrupt
        return train(*given)

    monkeypatch.setattr(few_shot, "train_segmenter", killed)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "out", adapters=[THEIRS])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    assert len(kept) == 2 + 3 and not (tmp_path / "out" / "prove.json").exists()
    again = run(made, tmp_path / "out", adapters=[THEIRS])
    assert again.document() == proof.document()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and len(turns) == 4 + 6 - 3
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 2 + 6


def test_a_proof_grows_by_segmentations_of_more_patients(world, tmp_path):
    made, out, proof = world
    shutil.copytree(out, tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    grown = run(made, tmp_path / "out", adapters=[THEIRS], budget=TINY.learnt_from([2, 1]))
    assert grown.rows.shots() == [1, 2] and {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [row for row in grown.rows.rows if row.shots != 1] == list(proof.rows.rows)
    again = run(made, tmp_path / "out", adapters=[THEIRS])
    assert again.document() == proof.document(), "what is not asked for is left out"


def test_another_proof_or_an_altered_part_is_refused(world, tmp_path):
    made, out, _ = world
    shutil.copytree(out, tmp_path / "out")
    with pytest.raises(UsageError, match="another budget, seed"):
        run(made, tmp_path / "out", adapters=[THEIRS], seed=1, budget=replace(TINY, steps=3))
    with pytest.raises(UsageError, match="another part, labels_sha256, patients_scored"):
        run(made, tmp_path / "out", adapters=[THEIRS], part="test")
    part = tmp_path / "out" / "parts" / "crops.json"
    part.write_text(part.read_text().replace('"encoder": "maesil"', '"encoder": "untrained"', 1))
    with pytest.raises(DamagedError, match=r"crops\.json"):
        run(made, tmp_path / "out", adapters=[THEIRS])


def test_a_scored_patient_that_was_trained_on_is_found_before_anything_is_scored(world, tmp_path):
    made = world[0]
    write_split(tmp_path / "split.json", Split(("patient-4",), ("patient-0",)), [made[0].fingerprint])
    with pytest.raises(UsageError, match="an encoder was trained on 1 patient to be scored"):
        run(made, tmp_path / "out", split_file=tmp_path / "split.json")
    assert not (tmp_path / "out").exists()


def test_budgets_are_read_and_a_wrong_one_is_named():
    for name in ("tiny", "cpu-2h", "gpu"):
        budget = ProofBudget.load(name)
        assert budget.seeds >= 3 and 0 in budget.patients and 1 in budget.patients
    assert ProofBudget.load("frozen").patients == ()
    assert ProofBudget.load("tiny").learnt_from([4, 0]).patients == (4, 0)
    assert ProofBudget.load("tiny").learnt_from([]) == ProofBudget.load("tiny")
    with pytest.raises(UsageError, match="budget"):
        ProofBudget.load("huge")
    with pytest.raises(UsageError, match="--patients: the budget frozen learns no segmentation"):
        ProofBudget.load("frozen").learnt_from([1])


def test_without_segmentations_the_frozen_scores_are_the_same_and_nothing_is_learnt(world, tmp_path):
    made, _, proof = world
    alone = run(made, tmp_path / "out", adapters=[THEIRS], budget=replace(TINY, patients=()))
    assert list(alone.rows.rows) == [row for row in proof.rows.rows if not row.shots]
    assert [title for title, _ in alone.tables()] == ["Frozen encoders"]
    assert "Dice" not in (tmp_path / "out" / "index.html").read_text()
