"""Is an encoder that nobody needs found out, and one that carries the score left alone?"""

import pytest
import torch
from support.runs import SMALL, save_run
from support.stores import make_store

from maesil.data.crops import grid_crops
from maesil.data.split import Split
from maesil.evaluation.encoder_use import warning_of_unused_encoders
from maesil.evaluation.evaluate import evaluate
from maesil.evaluation.predict import ModelPredictor
from maesil.evaluation.volume import score_volumes
from maesil.models.latent import LatentStatistics
from maesil.models.masked_autoencoder import Encoded, Prediction, ReconstructionModel
from maesil.models.patches import patchify, tokens_at
from maesil.store.reader import SuperpatchReader
from maesil.training.checkpoint import load_run

pytestmark = pytest.mark.usefixtures("one_thread")
GAINS = ("encoder_gain_db", "encoder_gain_shuffled_db")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("use") / "store", [(40, 48, 45), (33, 40, 64)], superpatch=64)


def groups(store):
    first, *_ = sorted({volume.group for volume in store.volumes()})
    return Split(train=(first,), validation=())


def test_a_planted_dead_encoder_is_reported_in_plain_words(store, tmp_path):
    run = save_run(tmp_path / "run", groups(store), dead=True)
    report = evaluate(run, store.path, device="cpu")
    (row,) = [row for row in report.rows if (row["model"], row["region"]) == ("maesil", "body")]
    assert [row[name] for name in GAINS] == pytest.approx([0, 0], abs=1e-6)
    told = [note for note in report.notes if "the encoder of maesil is not used" in note]
    assert len(told) == 1 and "0.00 dB" in told[0]
    naive = [row for row in report.rows if row["model"] in ("mean", "interpolation")]
    assert all(row[name] is None for row in naive for name in (*GAINS, "effective_rank"))


class Copies(ReconstructionModel):
    """Its latent tokens are the patches themselves, hidden ones too, a little off; its decoder hands them on."""

    latent_per_voxel = 1.0

    def encode(self, inputs):
        return Encoded(inputs.patches(self.all_tokens(inputs), torch.float32) + 0.05)

    def decode(self, encoded, inputs):
        return Prediction(tokens_at(encoded.tokens_BND, inputs.targets))


def test_an_encoder_that_carries_the_score_is_left_alone(store, tmp_path):
    run = load_run(save_run(tmp_path / "run", groups(store)))
    predictor = ModelPredictor(Copies(SMALL), run.intensity)
    rows = score_volumes(run, SuperpatchReader(store), store.volumes(), [predictor], seed=0)
    whole = [row for row in rows if "group_by" not in row]
    assert {row["region"] for row in whole} == {"body", "whole"}
    for row in whole:
        assert min(row[name] for name in GAINS) > 5
        # A patch in another place is wrong twice, the mean of all patches once: 3 dB.
        assert row["encoder_gain_shuffled_db"] - row["encoder_gain_db"] == pytest.approx(3, abs=1.5)
        assert 1 < row["effective_rank"] < 512
    assert warning_of_unused_encoders([{**row, "table": "A"} for row in whole]) == ()
    for volume in store.volumes():
        statistics = LatentStatistics()
        for crop in grid_crops(SuperpatchReader(store), [volume.volume_id], 32):
            statistics(patchify(torch.from_numpy(crop.hu)[None].float().clamp(-1000, 1000), 8))
        ranks = {row["effective_rank"] for row in whole if row["volume_id"] == volume.volume_id}
        assert list(ranks) == [pytest.approx(statistics.effective_rank, rel=1e-3)]


def test_a_row_of_table_b_or_without_gains_warns_of_nothing():
    row = {"table": "A", "region": "body", "model": "maesil", "encoder_gain_db": 0.1, "encoder_gain_shuffled_db": 3.0}
    assert len(warning_of_unused_encoders([row])) == 1
    assert warning_of_unused_encoders([{**row, "table": "B"}, {**row, "encoder_gain_db": None}]) == ()
