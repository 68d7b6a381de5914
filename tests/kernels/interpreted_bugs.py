"""Bugs are planted in copies of the kernels, one at a time: each must be seen by the checks that the suite uses."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch
from support.kernel_cases import PatchSpec, check_gather, check_loss, check_unshuffle
from support.planting import planted

import maesil.kernels
from maesil.kernels import library

MODULES = ("voxels", "gather", "loss", "unshuffle")
SOURCES = Path(maesil.kernels.__file__).parent

SCAN = PatchSpec(
    batch=3, grid=(2, 3, 4), patch=4, share=0.5, margin=(3, 2, 8), flip=True, per_sample_window=True, seed=2
)


def look_up():
    """Mirrored superpatches in scans, rows of four and of six voxels, a last tile that is not full."""
    check_gather(SCAN)
    check_gather(PatchSpec(batch=3, grid=(2, 3, 2), patch=6, flip=True, seed=4))
    check_gather(PatchSpec(batch=1, grid=(1, 2, 3), patch=8, share=1.0, seed=5))
    check_gather(PatchSpec(batch=2, grid=(1, 1, 2), patch=8, apart=3, seed=6))
    check_gather(PatchSpec(batch=2, grid=(3, 2, 4), patch=(4, 8, 2), margin=(3, 8, 5), flip=True, seed=7))


def compare():
    """Weighted and not, normalised and not, more patches than one program takes."""
    check_loss(SCAN)
    check_loss(PatchSpec(batch=1, grid=(1, 2, 3), patch=8, share=1.0, seed=5), weighted=False)
    check_loss(PatchSpec(batch=2, grid=(2, 2, 2), patch=2, seed=6), norm_patch=True, eps=0.3)


def put_back():
    """Whole, in part, in part with repeats, more rows than one program takes."""
    check_unshuffle(batch=3, tokens=9, shown=4, width=5)
    check_unshuffle(batch=3, tokens=9, shown=4, width=5, subset=6)
    check_unshuffle(batch=3, tokens=9, shown=4, width=5, subset=6, repeats=True)
    check_unshuffle(batch=1, tokens=300, shown=80, width=256)


BUGS = [
    (look_up, "voxels", "gz - 1 - iz", "iz"),
    (look_up, "voxels", "gx - 1 - ix", "ix"),
    (look_up, "voxels", "PY - 1 - y, y)", "y, y)"),
    (look_up, "voxels", "PX - 1 - x, x)", "x, x)"),
    (look_up, "voxels", "tl.flip(rows, 1)", "rows"),
    (look_up, "voxels", "iz * PZ", "iz * PX"),
    (look_up, "voxels", "EDGE_Y // PY", "EDGE_Y // PX"),
    (look_up, "voxels", "voxel // PX % PY", "voxel // PX % PX"),
    (look_up, "voxels", "token // gx % gy", "token // gy % gx"),
    (look_up, "voxels", "tl.load(origin + sample * 3 + 1)", "tl.load(origin + sample * 3)"),
    (look_up, "voxels", "offset + x0[:, None]", "offset + (x0 // UNIT * UNIT)[:, None]"),
    (look_up, "voxels", "tl.load(windows + sample * 2)", "tl.load(windows + sample * 0)"),
    (look_up, "voxels", "tl.maximum(hu.to(tl.float32), lo)", "hu.to(tl.float32)"),
    (look_up, "voxels", "- mean) * (1.0 / std)", "- mean / std)"),
    (look_up, "voxels", "volume = samples_in_place(volume)", "volume = volume.flip(3)"),
    (look_up, "voxels", "math.gcd(volume.shape[3], apart, 8)", "math.gcd(volume.shape[3], 8)"),
    (look_up, "gather", "triton.cdiv(rows, tile.rows)", "rows // tile.rows"),
    (look_up, "gather", "row // tokens_per_sample", "row % tokens_per_sample % 2"),
    (compare, "loss", "share = tl.where(live, share, 0.0)", "share = share + 0.0"),
    (compare, "loss", "weight is None else tl.load(weight + row)", "True else weight"),
    (compare, "loss", "(1.0 / (VOXELS - 1))", "(1.0 / VOXELS)"),
    (compare, "loss", "(VOXELS - 1)) + eps)", "(VOXELS - 1))) + eps"),
    (compare, "loss", "inside, difference * difference", "inside, tl.abs(difference)"),
    (compare, "loss", "partials + count + start", "partials + start"),
    (compare, "loss", "programs = triton.cdiv(rows, tile.rows)", "programs = rows // tile.rows or 1"),
    (compare, "loss", "(2.0 / VOXELS)", "(1.0 / VOXELS)"),
    (compare, "loss", "tl.load(grad).to(tl.float32) * (2.0", "1.0 * (2.0"),
    (compare, "loss", "(difference * share[:, None])", "(target * share[:, None])"),
    (compare, "loss", "else weight.sum()", "else weight[0].sum()"),
    (put_back, "unshuffle", "sample * total_positions + position", "sample * total_positions + place"),
    (put_back, "unshuffle", "pos_embed + position", "pos_embed + place.to(tl.int64)"),
    (put_back, "unshuffle", "token = tl.where(seen[:, None], token, mask[None, :])", "token = token"),
    (put_back, "unshuffle", "triton.cdiv(positions, tile.rows) * batch", "triton.cdiv(positions, tile.rows)"),
    (put_back, "unshuffle", "tl.where(seen[:, None], 0.0, value", "tl.where(~live[:, None], 0.0, value"),
    (put_back, "unshuffle", "(tl.program_id(0) * STEPS + step) * ROWS", "(tl.program_id(0) + step) * ROWS"),
    (put_back, "unshuffle", "row = tl.load(order + place)", "row = place + 0 * tl.load(order + place)"),
    (put_back, "unshuffle", "sample * visible + sources, batch * visible)", "sources, batch * visible)"),
    (put_back, "unshuffle", "hidden_sums.sum(0)", "hidden_sums[:1].sum(0)"),
    (put_back, "unshuffle", "grad_BSD.sum(0, dtype", "grad_BSD[:1].sum(0, dtype"),
]  # fmt: skip


@contextlib.contextmanager
def copy_in_use(folder: Path, module: str | None = None, old: str = "", new: str = ""):
    """Put a copy of the kernels to work, in which one text stands for another."""
    package = folder.name
    (folder / "__init__.py").write_text("", encoding="utf-8")
    for name in MODULES:
        text = (SOURCES / f"{name}.py").read_text(encoding="utf-8")
        if name == module:
            text = planted(text, old, new, f"kernels/{name}.py")
        text = text.replace("from maesil.kernels.voxels", f"from {package}.voxels")
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder.parent))
        copies = [importlib.import_module(f"{package}.{name}") for name in MODULES]
        launchers = {name: value for copy in copies for name, value in vars(copy).items()}
        patch.setattr(library, "_launcher", launchers.__getitem__)
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def make_folder(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_the_copy_itself_passes(tmp_path):
    with copy_in_use(make_folder(tmp_path, "faultless")):
        look_up()
        compare()
        put_back()


@pytest.mark.parametrize("number", range(len(BUGS)))
def test_a_planted_bug_is_seen(tmp_path, number):
    check, *bug = BUGS[number]
    torch.manual_seed(number)
    with (
        copy_in_use(make_folder(tmp_path, f"planted_{number}"), *bug),
        pytest.raises(AssertionError, match=r"close|=="),
    ):
        check()
