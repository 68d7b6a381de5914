"""An exported encoder gives the same tokens everywhere: in maesil, in a script without maesil, in MONAI."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.pages import snippets
from support.runs import SMALL, save_run
from support.stores import make_store

import maesil
from maesil.config.schema import MODEL_KINDS, RunConfig, TrainConfig
from maesil.data.split import Split
from maesil.documents import read_json, write_json
from maesil.downstream.card import read_card
from maesil.downstream.export import export_encoder
from maesil.downstream.monai import load_into_monai_vit, monai_vit_state
from maesil.errors import CheckpointError, DamagedError, UsageError
from maesil.models.encoders import encoder_of
from maesil.store.store import Store
from maesil.training.checkpoint import load_run
from maesil.training.train import train

PAGE = snippets("how-to/use-encoder.md")
MODEL = replace(SMALL, width=128, decoder_width=64, depth=2)  # of two heads
SPLIT = Split(("a" * 32,), ("b" * 32,))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, its encoder exported, a volume and its tokens."""
    folder = tmp_path_factory.mktemp("export")
    run = save_run(folder / "run", SPLIT, MODEL)
    export_encoder(run, folder / "encoder", licence="CC0")
    volume = np.random.default_rng(0).integers(-1300, 1600, (2, 32, 32, 32), dtype=np.int16)
    np.save(folder / "volume.npy", volume)
    loaded = load_run(run)
    with torch.no_grad():
        tokens = encoder_of(loaded.model, loaded.intensity).forward_features(torch.from_numpy(volume))
    return folder, torch.from_numpy(volume), tokens


def test_a_loaded_encoder_gives_the_tokens_of_the_run(world, monkeypatch):
    folder, volume, tokens = world
    encoder = maesil.load_encoder(folder / "encoder")
    assert not encoder.training
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(volume), tokens, rtol=0, atol=0)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(PAGE["In maesil"].replace("64, 64, 64", "32, 32, 32"), names)
    assert names["tokens"].shape == (1, 64, 128)


def test_the_script_of_the_page_gives_them_without_maesil(world):
    folder, _, tokens = world
    script = (
        "import sys\nsys.modules['maesil'] = None  # importing it raises\n" + PAGE["In plain PyTorch, without maesil"]
    )
    script += (
        "\nimport numpy as np\nvolume = torch.from_numpy(np.load('volume.npy'))\n"
        "with torch.no_grad():\n    np.save('tokens.npy', forward_features(volume).numpy())\n"
        "assert not [name for name in sys.modules if name.startswith('maesil.')]\n"
    )
    (folder / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.from_numpy(np.load(folder / "tokens.npy"))
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-5)


def test_monai_s_vit_gives_them(world, monkeypatch):
    folder, volume, tokens = world
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(PAGE["In MONAI"], names)
    with torch.no_grad():
        found, _ = names["vit"](names["normalise"](volume))
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-5)


def test_monai_s_unetr_has_them_inside(tmp_path):
    model = replace(SMALL, patch=16, width=64, depth=12, decoder_width=64)
    run = load_run(save_run(tmp_path / "run", SPLIT, model))
    encoder = encoder_of(run.model, run.intensity)
    from monai.networks.nets import UNETR  # takes seconds

    unetr = UNETR(
        in_channels=1, out_channels=2, img_size=(32, 32, 32), feature_size=8, hidden_size=64, mlp_dim=256, num_heads=1,
        proj_type="perceptron", qkv_bias=True,
    )  # fmt: skip
    load_into_monai_vit(encoder, unetr.vit)
    unetr.eval()
    volume = torch.randint(-1000, 1000, (1, 32, 32, 32), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    image = (((volume.float().clamp(-1000, 1000) + 1000) / 2000 - 0.4) / 0.3)[:, None]
    with torch.no_grad():
        torch.testing.assert_close(unetr.vit(image)[0], encoder(volume), rtol=1e-4, atol=1e-5)
        assert unetr(image).shape == (1, 2, 32, 32, 32)


def test_another_number_of_heads_is_refused_though_every_weight_fits(tmp_path):
    run = load_run(save_run(tmp_path / "run", SPLIT, replace(SMALL, width=128)))
    encoder = encoder_of(run.model, run.intensity)

    def vit(heads):
        from monai.networks.nets import ViT

        return ViT(
            1, (32, 32, 32), (8, 8, 8), hidden_size=128, mlp_dim=512, num_layers=1, num_heads=heads,
            proj_type="perceptron", qkv_bias=True,
        )  # fmt: skip

    wrong = vit(4)
    before = {name: value.clone() for name, value in wrong.state_dict().items()}
    with pytest.raises(UsageError, match="num_heads=2, found 4"):
        load_into_monai_vit(encoder, wrong)
    assert all(torch.equal(value, before[name]) for name, value in wrong.state_dict().items())
    load_into_monai_vit(encoder, vit(2))


def test_another_network_of_monai_and_another_kind_are_refused(world, tmp_path):
    folder, _, _ = world
    encoder = maesil.load_encoder(folder / "encoder")
    with pytest.raises(UsageError, match="expected a MONAI ViT"):
        load_into_monai_vit(encoder, torch.nn.Linear(3, 3))
    run = load_run(save_run(tmp_path / "ae", SPLIT, replace(SMALL, kind="ae")))
    with pytest.raises(UsageError, match="kind maesil"):
        monai_vit_state(encoder_of(run.model, run.intensity))


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_every_kind_is_exported_and_loaded(kind, tmp_path):
    run_dir = save_run(tmp_path / "run", SPLIT, replace(SMALL, kind=kind, channels=4, latent=8, codes=4))
    export_encoder(run_dir, tmp_path / "out")
    run = load_run(run_dir)
    volume = torch.randint(-900, 900, (1, 32, 32, 32), dtype=torch.int16)
    with torch.no_grad():
        torch.testing.assert_close(
            maesil.load_encoder(tmp_path / "out")(volume), encoder_of(run.model, run.intensity)(volume)
        )


def test_the_card_says_all_that_is_needed_and_nobody_s_name(world):
    folder, _, _ = world
    card = json.loads((folder / "encoder" / "config.json").read_text())
    assert card["intensity"] == {"window_hu": [-1000.0, 1000.0], "mean": 0.4, "std": 0.3}
    assert card["input"]["edge_voxels"] == 32 and card["input"]["patch_voxels"] == 8
    assert card["model"]["width"] == 128 and card["architecture"]["heads"] == 2
    assert card["training"]["steps_done"] == 3 and card["training"]["patients"] == 1 and card["licence"] == "CC0"
    for path in (folder / "encoder").iterdir():
        data = path.read_bytes()
        assert b"a" * 32 not in data and b"b" * 32 not in data and str(folder).encode() not in data
    page = (folder / "encoder" / "README.md").read_text()
    assert "CC0" in page and "Not evaluated" in page and "0.4" in page


def test_a_trained_run_knows_its_recipe_and_its_scores(tmp_path):
    store = make_store(tmp_path / "s", [(40, 40, 40), (32, 40, 40)])
    config = RunConfig(SMALL, train=TrainConfig(steps=1, batch=1, device="cpu"))
    train([store.path], config, tmp_path / "run")
    scores = {
        "weights_sha256": load_run(tmp_path / "run").weights_sha256(),
        "store_fingerprint": "f",
        "rows": [{"model": "maesil", "region": "body", "psnr_hidden": 20.25}],
    }
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "scores.json").write_text(json.dumps(scores))
    export_encoder(tmp_path / "run", tmp_path / "out")
    card = json.loads((tmp_path / "out" / "config.json").read_text())
    assert card["stores"]["fingerprints"] == [store.fingerprint]
    assert [recipe["hash"] for recipe in card["stores"]["recipes"]] == [store.recipe_hash]
    assert card["input"]["spacing_zyx_mm"] == ["native"]
    assert read_card(tmp_path / "out").document() == read_json(tmp_path / "out" / "config.json")
    assert card["scores"][0]["psnr_hidden"] == 20.25 and "| 20.250 |" in (tmp_path / "out" / "README.md").read_text()
    # Scores of other weights are not those of these.
    path = tmp_path / "run" / "evaluation" / "scores.json"
    for damaged in ("", json.dumps(scores)[:50], json.dumps({"weights_sha256": scores["weights_sha256"]})):
        path.write_text(damaged)
        with pytest.raises(DamagedError, match=r"scores\.json: expected a file as maesil wrote it"):
            export_encoder(tmp_path / "run", tmp_path / "none")
    path.write_text(json.dumps(scores | {"weights_sha256": "0" * 64}))
    before = (tmp_path / "out" / "config.json").read_text()
    with pytest.raises(UsageError, match="--force to replace it"):
        export_encoder(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == before
    export_encoder(tmp_path / "run", tmp_path / "out", force=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scores"] == []
    # A run that lost what it noted of its stores is told its store, and only its own.
    (tmp_path / "run" / "stores.json").unlink()
    export_encoder(tmp_path / "run", tmp_path / "told", stores=[store.path])
    assert json.loads((tmp_path / "told" / "config.json").read_text())["stores"] == card["stores"]
    other = make_store(tmp_path / "other", [(32, 32, 32)], seed=7)
    with pytest.raises(UsageError, match="expected a store that"):
        export_encoder(tmp_path / "run", tmp_path / "no", stores=[other.path])
    assert Store.open(store.path).fingerprint == store.fingerprint


def test_damage_and_other_folders_are_told_apart(world, tmp_path):
    folder, _, _ = world
    with pytest.raises(CheckpointError, match=r"found no config\.json of one"):
        maesil.load_encoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"found a run; export its encoder first: maesil export .*run --out DIR"):
        maesil.load_encoder(folder / "run")
    copy = tmp_path / "copy"
    shutil.copytree(folder / "encoder", copy)
    card = (copy / "config.json").read_text()
    unsealed = re.sub(r',\s+"checksum_crc32c": \d+', "", card)
    assert unsealed != card
    for broken in ('"std": 0', '"std": NaN', '"std": "1"'):
        (copy / "config.json").write_text(re.sub(r'"std": [-0-9.e]+', broken, unsealed))
        with pytest.raises(CheckpointError, match="found it incomplete"):
            maesil.load_encoder(copy)
    for damaged in (card.replace('"std": ', '"std": 1'), card[: len(card) // 2], ""):
        (copy / "config.json").write_text(damaged)
        with pytest.raises(DamagedError, match=r"config\.json: expected a file as maesil wrote it"):
            maesil.load_encoder(copy)
    (copy / "config.json").write_text(card)
    (copy / "model.safetensors").rename(copy / "moved")
    with pytest.raises(CheckpointError, match="found none; export again"):
        maesil.load_encoder(copy)
    (copy / "moved").rename(copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"found no config\.json of one"):
        maesil.load_encoder(copy / "config.json")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="vouches for"):
        maesil.load_encoder(copy)
    (copy / "config.json").write_text('{"format": "maesil-encoder", "version": 1}')
    with pytest.raises(CheckpointError, match="incomplete"):
        maesil.load_encoder(copy)
    (copy / "config.json").write_text('{"format": "other", "version": 1}')
    with pytest.raises(CheckpointError, match=r"found no config\.json of one"):  # another program's
        maesil.load_encoder(copy)
    (copy / "config.json").write_text('{"format": "maesil-encoder", "version": 9}')
    with pytest.raises(CheckpointError, match="found maesil-encoder 9"):
        maesil.load_encoder(copy)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="found other files"):
        export_encoder(folder / "run", tmp_path / "mine")


def test_importing_maesil_is_light_and_unknown_names_are_none():
    code = "import sys, maesil; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(maesil.load_encoder)
    assert {"load_encoder", "SuperpatchDataset"} <= set(dir(maesil))
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        maesil.load_model  # noqa: B018


def test_an_export_of_before_is_loaded_and_replaced_as_it_was(world, tmp_path):
    folder, volume, tokens = world
    card = read_json(folder / "encoder" / "config.json")
    card["weights"]["file"] = "encoder.safetensors"
    (tmp_path / "old").mkdir()
    shutil.copy(folder / "encoder" / "model.safetensors", tmp_path / "old" / "encoder.safetensors")
    write_json(tmp_path / "old" / "card.json", card)
    with torch.no_grad():
        torch.testing.assert_close(maesil.load_encoder(tmp_path / "old")(volume), tokens, rtol=0, atol=0)
    export_encoder(folder / "run", tmp_path / "old", force=True)
    assert not (tmp_path / "old" / "card.json").exists()
    maesil.load_encoder(tmp_path / "old")
    card["weights"]["file"] = "../encoder/model.safetensors"
    write_json(tmp_path / "old" / "config.json", card)
    with pytest.raises(CheckpointError, match="incomplete"):
        maesil.load_encoder(tmp_path / "old")


def test_another_program_s_folder_is_not_written_to(world, tmp_path):
    folder, _, _ = world
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="found other files"):
        export_encoder(folder / "run", tmp_path / "theirs", force=True)
