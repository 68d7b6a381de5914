"""LPIPS through torchmetrics' own class and linear layers, with an AlexNet of random weights.

torchvision cannot be installed beside a CPU build of torch, so its one part here, the untrained stack of layers, is
given to torchmetrics in plain PyTorch; everything else is the real computation.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
import torchmetrics
from rich.console import Console
from support.runs import save_run
from support.stores import make_store
from torch import nn
from torch.nn import functional
from torchmetrics.functional.image import lpips as peer

from maesil.data.split import Split
from maesil.errors import UsageError
from maesil.evaluation.evaluate import evaluate
from maesil.evaluation.lpips import Lpips, body_slices

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = (-1000.0, 1000.0)
CPU = torch.device("cpu")
SHAPE = (6, 40, 44)


def alexnet_features() -> nn.Sequential:
    """``torchvision.models.alexnet().features``, layer by layer."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


@pytest.fixture
def without_torchvision(monkeypatch):
    monkeypatch.setattr(peer, "_get_tv_model_features", lambda net, pretrained=False: alexnet_features())


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file as torchvision publishes it: the features, and a classifier that LPIPS does not need."""
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.manual_seed(0)
    state = {f"features.{name}": value for name, value in alexnet_features().state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture
def volumes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference int16, prediction float32 HU, and a body in slices 1 to 4 with a sliver in slice 5."""
    generator = torch.Generator().manual_seed(1)
    reference = (torch.rand(SHAPE, generator=generator) * 3000 - 1500).to(torch.int16)
    predicted = reference + 300 * torch.randn(SHAPE, generator=generator)
    body = torch.zeros(SHAPE, dtype=torch.bool)
    body[1:5, 2:38, 5:42] = True
    body[5, 2:4, 5:42] = True
    return reference, predicted, body


def by_the_paper(weights: Path, reference: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """LPIPS of images ``[n, 3, h, w]`` in -1..1, written down from arXiv 1801.03924, equation 1."""
    state = torch.load(weights, weights_only=True)
    features = alexnet_features()
    features.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if k.startswith("features")})
    published = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    heads = torch.load(published, map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((image - shift[:, None, None]) / scale[:, None, None] for image in (reference, predicted))
    total, depth = torch.zeros(len(x)), 0
    with torch.no_grad():
        for number, layer in enumerate(features[:12]):
            x, y = layer(x), layer(y)
            if number in (1, 4, 7, 9, 11):
                difference = functional.normalize(x, dim=1) - functional.normalize(y, dim=1)
                head = heads[f"lin{depth}.model.1.weight"].flatten()
                total += (difference.square() * head[:, None, None]).sum(dim=1).mean(dim=(1, 2))
                depth += 1
    return total


def test_it_is_the_papers_distance_on_slices_cut_to_the_body(without_torchvision, weights, volumes):
    reference, predicted, body = volumes
    valid = torch.ones_like(body)
    found = Lpips.load(weights, CPU).of_volume(reference, predicted, WINDOW, valid_ZYX=valid, body_ZYX=body)
    cut = [volume[1:5, 2:38, 5:42].float().clamp(*WINDOW) / 1000 for volume in (reference, predicted)]
    expected = by_the_paper(weights, *(image[:, None].expand(-1, 3, -1, -1) for image in cut))
    assert found == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found > 1e-4


def test_what_is_equal_has_no_distance_and_what_lies_outside_does_not_count(without_torchvision, weights, volumes):
    reference, predicted, body = volumes
    lpips, valid = Lpips.load(weights, CPU), torch.ones_like(body)
    valid[:, :, 20:23] = False
    score = lpips.of_volume(reference, predicted, WINDOW, valid_ZYX=valid, body_ZYX=body)
    assert lpips.of_volume(reference, reference.float(), WINDOW, valid_ZYX=valid, body_ZYX=body) == 0
    noise = torch.full(SHAPE, 777.0)
    y, x = body_slices(body)[1]
    counted = torch.zeros_like(valid)
    counted[1:5, y, x] = True
    noisy = [
        torch.where(counted & valid, volume.float(), noise * sign)
        for volume, sign in zip(volumes[:2], (1, -1), strict=True)
    ]
    assert lpips.of_volume(*noisy, WINDOW, valid_ZYX=valid, body_ZYX=body) == score
    nearer = reference + 0.3 * (predicted - reference)
    assert lpips.of_volume(reference, nearer, WINDOW, valid_ZYX=valid, body_ZYX=body) < score


@pytest.mark.parametrize("body_edge", [0, 20])
def test_no_body_and_a_body_too_small_for_the_network_have_no_score(without_torchvision, weights, volumes, body_edge):
    reference, predicted, _ = volumes
    body = torch.zeros(SHAPE, dtype=torch.bool)
    body[:, :body_edge, :body_edge] = True
    score = Lpips.load(weights, CPU).of_volume(reference, predicted, WINDOW, valid_ZYX=body | True, body_ZYX=body)
    assert math.isnan(score)


def test_an_evaluation_has_it_where_asked_for(without_torchvision, weights, tmp_path):
    make_store(tmp_path / "store", [(32, 64, 64)], superpatch=32)
    run = save_run(tmp_path / "run", Split(train=(), validation=()))
    report = evaluate(run, tmp_path / "store", device="cpu", lpips_weights=weights)
    rows = {(row["region"], row["model"]): row["lpips"] for row in report.rows}
    assert rows["body", "maesil"] > rows["body", "interpolation"] > 0
    assert [rows["whole", model] for model in ("maesil", "mean", "interpolation")] == [None] * 3
    document = json.loads((run / "evaluation" / "scores.json").read_text())
    assert document["lpips_weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert any("not those that torchvision publishes" in note for note in document["notes"])
    console = Console(width=200, file=io.StringIO())
    console.print(report.table())
    assert "LPIPS" in console.file.getvalue() and f"{rows['body', 'maesil']:.3f}" in console.file.getvalue()


def other_file(path: Path, kind: str) -> Path:
    states = {
        "list": [1, 2],
        "another network": {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)},
        "nested": {"state_dict": {}},
    }
    if kind == "junk":
        path.write_bytes(b"junk")
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        torch.save(states[kind], path)
    return path


@pytest.mark.parametrize("kind", ["missing", "folder", "junk", "list", "nested", "another network"])
def test_another_file_is_refused_in_one_line(without_torchvision, tmp_path, kind):
    with pytest.raises(UsageError, match=r"expected the state dict of torchvision's alexnet.*found") as error:
        Lpips.load(other_file(tmp_path / "weights.pth", kind), CPU)
    assert "\n" not in str(error.value) and "weights.pth" in str(error.value)


def test_without_torchvision_it_says_what_to_install(weights, monkeypatch):
    monkeypatch.setattr(peer, "_TORCHVISION_AVAILABLE", False)
    with pytest.raises(UsageError, match=r"maesil\[lpips\].*Torchvision is not installed") as error:
        Lpips.load(weights, CPU)
    assert "\n" not in str(error.value)
