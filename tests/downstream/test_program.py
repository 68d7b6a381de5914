"""An encoder as a program of ``torch.export``: the same tokens, for any crop, where maesil cannot be imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.pages import snippets
from support.runs import SMALL, save_run

import maesil
from maesil.data.split import Split
from maesil.downstream.export import export_encoder, load_net
from maesil.downstream.program import PROGRAM, require_same
from maesil.errors import UsageError

SPLIT = Split(("a" * 32,), ("b" * 32,))
OBLONG = replace(SMALL, crop=(16, 32, 32), patch=(4, 8, 8), depth=2)
KINDS = {
    "maesil": OBLONG,
    "primus": replace(OBLONG, kind="primus", registers=2),
    "vae": replace(SMALL, kind="vae", channels=4, latent=8),
}
ALONE = """
import sys
sys.modules['maesil'] = None  # importing it raises
import numpy as np
import torch
encoder = torch.export.load('encoder/model.pt2').module()
with torch.no_grad():
    for name in sys.argv[1:]:
        np.save(f'{name}.tokens.npy', encoder(torch.from_numpy(np.load(f'{name}.npy'))).numpy())
assert not [name for name in sys.modules if name.startswith('maesil.')]
"""
pytestmark = pytest.mark.usefixtures("one_thread")


def _tokens(script, folder, *names):
    (folder / "script.py").write_text(script)
    command = [sys.executable, "script.py", *names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_gives_the_tokens_where_maesil_cannot_be_imported(kind, tmp_path):
    config = KINDS[kind]
    export_encoder(save_run(tmp_path / "run", SPLIT, config), tmp_path / "encoder", kind="pt2")
    encoder = load_net(tmp_path / "encoder")
    PZ, PY, PX = config.patch_zyx
    shapes = {"trained": (1, *config.crop_zyx), "other": (3, 5 * PZ, 2 * PY, 3 * PX)}
    for name, shape in shapes.items():
        volume = np.random.default_rng(0).integers(-2000, 3000, shape, dtype=np.int16)
        np.save(tmp_path / f"{name}.npy", volume)
    _tokens(ALONE, tmp_path, *shapes)
    for name in shapes:
        with torch.no_grad():
            wanted = encoder(torch.from_numpy(np.load(tmp_path / f"{name}.npy")))
        found = torch.from_numpy(np.load(tmp_path / f"{name}.tokens.npy"))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_lines_of_the_page_run(tmp_path):
    export_encoder(save_run(tmp_path / "run", SPLIT), tmp_path / "program", kind="pt2")
    script = "import sys\nsys.modules['maesil'] = None\n" + snippets("how-to/use-encoder.md")["As a program of PyTorch"]
    _tokens(script.replace("64, 64, 64", "32, 32, 32") + "\nassert tokens.shape == (1, 64, 48)\n", tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An encoder and its program, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("program")
    export_encoder(save_run(folder / "run", SPLIT), folder / "encoder", kind="pt2")
    return folder / "encoder"


def test_what_a_program_does_not_take_is_refused_by_it(exported):
    program = torch.export.load(exported / PROGRAM).module()
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.zeros(1, 32, 32, 20, dtype=torch.int16))
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.zeros(1, 32, 32, 32))


def test_other_tokens_are_refused():
    given = [torch.zeros(1, 2, 3)]
    require_same(lambda one: one + 9e-6, given, given)
    with pytest.raises(UsageError, match="within 1e-05, found 3"):
        require_same(lambda one: one + 3.0, given, given)
    with pytest.raises(UsageError, match=r"found \[2, 2, 3\]"):
        require_same(lambda one: one.expand(2, -1, -1), given, given)


@pytest.mark.slow
def test_a_program_of_other_tokens_is_not_written(tmp_path, monkeypatch):
    wrong = lambda volume, intensity: volume.float() / 1000  # noqa: E731 - HU without their window
    monkeypatch.setattr("maesil.downstream.program.normalised", wrong)
    with pytest.raises(UsageError, match="nothing was written"):
        export_encoder(save_run(tmp_path / "run", SPLIT), tmp_path / "encoder", kind="pt2")
    assert not (tmp_path / "encoder").exists()


def test_another_export_or_other_weights_leave_no_program_behind(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "encoder")
    encoder = maesil.load_encoder(tmp_path / "encoder")
    encoder.save_pretrained(tmp_path / "encoder")
    assert not (tmp_path / "encoder" / PROGRAM).exists()
