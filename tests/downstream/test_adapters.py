"""Other people's encoders: on whatever grid their tokens lie, they end on that of the run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.proofs import of_patches, with_class_token
from support.runs import SMALL

from maesil.config.presets import PRESETS
from maesil.downstream.adapters import AdaptedEncoder, load_adapter, on_grid
from maesil.errors import UsageError
from maesil.types import Intensity

WINDOW = Intensity(mean=0.4, std=0.3)


def crop() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (32, 32, 32)).astype(np.int16)


def test_tokens_of_the_same_grid_stay_as_they_are():
    encoder, hu = AdaptedEncoder("mine", of_patches, SMALL, WINDOW), crop()
    assert encoder.width == 2
    tokens = encoder.forward_features(torch.from_numpy(np.stack([hu, hu[::-1]])))
    assert tokens.shape == (2, 64, 2) and tokens.dtype == torch.float32
    np.testing.assert_allclose(tokens[0], of_patches(hu), rtol=1e-6)
    np.testing.assert_allclose(tokens[1], of_patches(hu[::-1]), rtol=1e-6)


def test_finer_tokens_are_averaged_and_coarser_ones_repeated():
    hu = crop()
    fine = AdaptedEncoder("fine", lambda one: of_patches(one, patch=4), SMALL, WINDOW)
    np.testing.assert_allclose(
        fine.forward_features(torch.from_numpy(hu)[None])[0, :, 0], of_patches(hu)[:, 0], rtol=1e-4, atol=1e-6
    )
    coarse = AdaptedEncoder("coarse", lambda one: of_patches(one, patch=16), SMALL, WINDOW)
    field = coarse.forward_features(torch.from_numpy(hu)[None])[0, :, 0].reshape(4, 4, 4)
    expected = of_patches(hu, patch=16)[:, 0].reshape(2, 2, 2)
    np.testing.assert_allclose(field, expected.repeat(2, 0).repeat(2, 1).repeat(2, 2), rtol=1e-6)


def test_crops_that_are_no_cubes_keep_the_order_of_their_tokens():
    config = replace(SMALL, crop=(16, 32, 48))
    hu = np.random.default_rng(1).integers(-1000, 1000, (16, 32, 48)).astype(np.int16)
    encoder = AdaptedEncoder("fine", lambda one: of_patches(one, patch=4), config, WINDOW)
    found = encoder.forward_features(torch.from_numpy(hu)[None])[0, :, 0]
    np.testing.assert_allclose(found, of_patches(hu)[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda hu: of_patches(hu)[None], "expected finite tokens"),
        (lambda hu: of_patches(hu) * np.nan, "expected finite tokens"),
        (with_class_token, "leave out a class token"),
    ],
)
def test_what_are_no_tokens_of_patches_is_refused_in_one_line(function, told):
    with pytest.raises(UsageError, match=told) as caught:
        AdaptedEncoder("theirs", function, SMALL, WINDOW).forward_features(torch.from_numpy(crop())[None])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["numpy", "numpy:", ":mean", "no_such_module_here:f", "numpy:no_such_function"])
def test_an_adapter_that_cannot_be_imported_is_named(name):
    with pytest.raises(UsageError, match="--adapter"):
        load_adapter(name, SMALL, WINDOW)


def test_an_adapter_of_the_working_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "adapter_of_mine.py").write_text(
        "def encode(hu):\n    return hu.reshape(64, -1)[:, :3].astype('float32')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_adapter("adapter_of_mine:encode", SMALL, WINDOW).width == 3


def test_any_number_of_tokens_that_fills_no_grid_is_refused():
    for tokens in (1, 63, 65, 4097):
        shape = (32, 32, 32)
        if tokens == 1:
            assert on_grid(torch.ones(1, 2), shape, (4, 4, 4), "x").shape == (64, 2)
            continue
        with pytest.raises(UsageError):
            on_grid(torch.ones(tokens, 2), shape, (4, 4, 4), "x")


def test_the_example_of_the_docs_is_an_encoder_of_crops_of_the_tiny_preset():
    page = Path(__file__).parents[2] / "docs" / "how-to" / "does-it-help.md"
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(block, str(page), "exec"), names)
    encoder = AdaptedEncoder("theirs:encode", names["encode"], PRESETS["tiny"].model, WINDOW)
    hu = np.random.default_rng(0).integers(-1000, 1000, (64, 64, 64)).astype(np.int16)
    tokens = encoder.forward_features(torch.from_numpy(hu)[None])
    assert tokens.shape == (1, 512, 96)
    # Token (iz * 8 + iy) * 8 + ix is that of patch iz, iy, ix: it alone changes before the attention mixes them.
    changed = hu.copy()
    changed[8:16, 16:24, 24:32] = 1000
    moved = (encoder.forward_features(torch.from_numpy(changed)[None]) - tokens).abs().sum(dim=-1)[0]
    assert int(moved.argmax()) == (1 * 8 + 2) * 8 + 3
