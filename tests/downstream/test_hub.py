"""An encoder goes to the Hub and comes back the same; a folder needs no Hub and no package of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.hub_server import hub
from support.runs import SMALL, save_run

import maesil
from maesil.data.split import Split
from maesil.downstream.export import export_encoder
from maesil.errors import UsageError
from maesil.models.encoders import encoder_of
from maesil.models.registry import make_model
from maesil.types import Intensity

pytestmark = pytest.mark.usefixtures("one_thread")
VOLUME = "torch.arange(32 ** 3, dtype=torch.int32).remainder(2000).sub(1000).to(torch.int16).view(1, 32, 32, 32)"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    run = save_run(folder / "run", Split((), ()))
    export_encoder(run, folder / "encoder", licence="CC BY 4.0")
    with torch.no_grad():
        tokens = maesil.load_encoder(folder / "encoder")(eval(VOLUME))
    return folder, tokens


def python(code: str, folder, **environment: str) -> subprocess.CompletedProcess:
    known = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1",
             "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_test", **environment}  # fmt: skip
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=known, cwd=folder, capture_output=True, text=True, check=False)


def test_a_folder_needs_no_hub(exported, tmp_path):
    folder, tokens = exported
    encoder = maesil.Encoder.from_pretrained(folder / "encoder")
    with torch.no_grad():
        torch.testing.assert_close(encoder(eval(VOLUME)), tokens, rtol=0, atol=0)
    assert not encoder.training
    encoder.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "encoder" / name).read_bytes()


@pytest.mark.slow
def test_without_the_package_a_folder_is_loaded_and_saved_all_the_same(exported, tmp_path):
    folder, tokens = exported
    code = f"""
import sys
sys.modules["huggingface_hub"] = None  # importing it raises
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "huggingface_hub" else find(name, *more)
import maesil, torch
encoder = maesil.Encoder.from_pretrained({str(folder / "encoder")!r})
encoder.save_pretrained("again")
with torch.no_grad():
    torch.save(maesil.load_encoder("again")({VOLUME}), "tokens.pt")
for attempt in (lambda: encoder.push_to_hub("user/name"), lambda: maesil.load_encoder("user/name")):
    try:
        attempt()
    except maesil.errors.UsageError as error:
        assert "pip install 'maesil[hub]'" in str(error)
    else:
        raise AssertionError
"""
    done = python(code.replace("import maesil, torch", "import maesil, maesil.errors, torch"), tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "tokens.pt", weights_only=True), tokens, rtol=0, atol=0)


def test_up_to_the_hub_and_down_again(exported, tmp_path):
    folder, tokens = exported
    with hub() as server:
        at = {"HF_ENDPOINT": server.endpoint}
        command = ["export", str(folder / "run"), "--out", "encoder", "--licence", "CC BY 4.0", "--push", "user/ct"]
        load = (
            "import maesil, torch\n"
            "for load in (maesil.Encoder.from_pretrained, maesil.load_encoder):\n"
            f"    with torch.no_grad():\n        torch.save(load('user/ct')({VOLUME}), 'tokens.pt')\n"
        )
        # One process, since each takes seconds to start: the command, what it sent fetched again, and by the mixin's
        # own word from an encoder in memory.
        there = f"""
import sys
from maesil.cli import main
sys.argv = ["maesil", *{command!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
{load}
maesil.load_encoder({str(folder / "encoder")!r}).push_to_hub("user/again")
maesil.load_encoder("user/none")
"""
        done = python(there, tmp_path, **at)
        assert f"{server.endpoint}/user/ct; next: maesil.load_encoder('user/ct')" in done.stdout, done.stderr[-2000:]
        assert set(server.repos["user/ct"]) == {"model.safetensors", "config.json", "README.md"}
        assert server.repos["user/ct"]["model.safetensors"] == (folder / "encoder" / "model.safetensors").read_bytes()
        page = server.repos["user/ct"]["README.md"].decode()
        assert page.startswith("---\nlicense: cc-by-4.0\nlibrary_name: maesil\n") and "2604.00514" in page
        torch.testing.assert_close(torch.load(tmp_path / "tokens.pt", weights_only=True), tokens, rtol=0, atol=0)
        assert server.repos["user/again"] == server.repos["user/ct"]
        assert done.returncode == 1
        assert "CheckpointError: user/none: expected an encoder of maesil on the Hub" in done.stderr
    # The server is gone; what was fetched is kept.
    (tmp_path / "tokens.pt").unlink()
    done = python(load, tmp_path, HF_HUB_OFFLINE="1", **at)
    assert done.returncode == 0 and (tmp_path / "tokens.pt").exists(), done.stderr[-2000:]


def test_scores_are_not_those_of_weights_that_were_trained_on(exported, tmp_path):
    folder, _ = exported
    encoder = maesil.load_encoder(folder / "encoder")
    card = (folder / "encoder" / "config.json").read_text()
    assert json.loads(card)["scores"] == []
    encoder.card = replace(encoder.card, scores=({"model": "maesil", "region": "body", "psnr_hidden": 20.0},))
    encoder.save_pretrained(tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text())["scores"]
    with torch.no_grad():
        encoder.net.norm.bias.add_(1)
    encoder.save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["scores"] == []
    maesil.load_encoder(tmp_path / "tuned")


def test_an_encoder_without_a_card_says_so(tmp_path):
    bare = maesil.Encoder(encoder_of(make_model(SMALL), Intensity()))
    with pytest.raises(UsageError, match="found one without a card"):
        bare.save_pretrained(tmp_path / "x")
