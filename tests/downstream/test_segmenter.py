"""The light decoder, its loss and its score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.runs import SMALL

from maesil.downstream.labels import UNLABELLED
from maesil.downstream.segmenter import WINDOWS, DiceSums, Segmenter, segmentation_loss, windowed
from maesil.models.encoders import untrained_encoder
from maesil.types import Intensity

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind, patch", [("maesil", 8), ("maesil", 4), ("ae", 8), ("mae2d", 16), ("maesil", (4, 8, 8))])
def test_logits_have_the_size_of_the_crop_and_gradients_reach_everything(kind, patch, half):
    config = replace(SMALL, kind=kind, patch=patch, channels=4, latent=12)
    model = Segmenter(untrained_encoder(config, Intensity(), 0), classes=3, half_resolution=half)
    volume = torch.randint(-1000, 1000, (2, 32, 32, 32), dtype=torch.int16)
    logits = model(volume)
    assert logits.shape == (2, 3, 32, 32, 32)
    segmentation_loss(logits, torch.randint(0, 3, (2, 32, 32, 32), dtype=torch.uint8)).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_at_half_resolution_the_image_comes_in_as_means_of_eight_voxels():
    encoder = untrained_encoder(replace(SMALL, patch=8), Intensity(), 0)
    model, seen = Segmenter(encoder, classes=2, half_resolution=True), []
    model.classify.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    volume = torch.randint(-1000, 1000, (1, 32, 32, 32), dtype=torch.int16)
    model(volume)
    means = windowed(volume).view(1, len(WINDOWS), 16, 2, 16, 2, 16, 2).mean((3, 5, 7))
    torch.testing.assert_close(seen[0][:, -len(WINDOWS) :], means)


def test_at_half_resolution_logits_lie_between_those_of_the_cells_around():
    model = Segmenter(untrained_encoder(SMALL, Intensity(), 0), classes=2, half_resolution=True)
    cells = []
    model.classify.register_forward_hook(lambda *of_call: cells.append(of_call[2]))
    logits = model(torch.randint(-1000, 1000, (1, 32, 32, 32), dtype=torch.int16))
    inner = logits[..., 1:-1, 1:-1, 1:-1].unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).flatten(5)
    # Each of the eight voxels amid eight cells lies a quarter of the way from one to the next: the means are equal.
    around = cells[0].unfold(2, 2, 1).unfold(3, 2, 1).unfold(4, 2, 1).flatten(5)
    torch.testing.assert_close(inner.mean(-1), around.mean(-1))


def a_truth() -> torch.Tensor:
    return torch.randint(0, 4, (2, 6, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def sure_of(truth: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(truth.long().clamp(max=3), 4).movedim(-1, 1).float() * 50


def test_the_loss_is_0_for_the_truth_and_high_for_its_opposite():
    truth = a_truth()
    assert float(segmentation_loss(sure_of(truth), truth)) < 1e-3
    assert float(segmentation_loss(sure_of((truth + 1) % 4), truth)) > 10


def test_the_loss_is_cross_entropy_plus_soft_dice_without_the_background():
    truth, logits = a_truth(), torch.randn(2, 4, 6, 6, 6, generator=torch.Generator().manual_seed(2))
    truth[:, :2] = UNLABELLED
    labelled = truth != UNLABELLED
    shares, wanted = logits.softmax(dim=1).movedim(1, -1)[labelled], truth[labelled].long()
    entropy = -shares.gather(1, wanted[:, None]).log().mean()
    dice = [
        (2 * shares[wanted == k, k].sum() + 1) / (shares[:, k].sum() + (wanted == k).sum() + 1) for k in range(1, 4)
    ]
    torch.testing.assert_close(segmentation_loss(logits, truth), entropy + 1 - sum(dice) / 3)


def test_unlabelled_voxels_have_no_say():
    truth = a_truth()
    truth[:, :3] = UNLABELLED
    logits = torch.randn(2, 4, 6, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    segmentation_loss(logits, truth).backward()
    assert logits.grad[:, :, :3].abs().max() == 0 < logits.grad[:, :, 3:].abs().max()
    assert float(segmentation_loss(logits.detach(), torch.full_like(truth, UNLABELLED))) == 0


def test_dice_is_twice_what_both_hold_over_what_each_holds():
    truth = torch.tensor([0, 1, 1, 1, 2, 2, 255, 255])
    predicted = torch.tensor([1, 1, 1, 0, 2, 1, 2, 2])
    sums = DiceSums(3)
    sums.add(predicted[:4], truth[:4])
    sums.add(predicted[4:], truth[4:])
    assert sums.dice == [2 * 2 / (3 + 4), 2 * 1 / (2 + 1), None]


def test_each_window_goes_from_minus_1_to_1():
    hu = torch.tensor([-1024, -1000, -650, -300, -200, 50, 300, 550, 1000, 3071], dtype=torch.int16)
    seen = windowed(hu.view(1, 1, 1, -1))[0, :, 0, 0]
    assert seen.shape == (len(WINDOWS), 10) and seen.min() == -1 and seen.max() == 1
    assert [seen[0, 2], seen[1, 5], seen[2, 7]] == [0, 0, 0]
    assert seen[0, :2].tolist() == [-1, -1] and seen[2, -2:].tolist() == [1, 1]
