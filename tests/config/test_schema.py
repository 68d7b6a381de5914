"""What a configuration may hold, and how a value that it may not hold is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from maesil.config.presets import PRESETS
from maesil.config.schema import MaskConfig, ModelConfig, TrainConfig, require_tile
from maesil.config.toml import load_config, to_toml
from maesil.errors import UsageError


def test_presets_are_the_sizes_of_their_names():
    sizes = {name: (c.model.crop, c.model.width, c.model.depth, c.model.heads) for name, c in PRESETS.items()}
    assert sizes == {
        "tiny": (64, 128, 4, 2),
        "small": (128, 384, 12, 6),
        "base": (128, 768, 12, 12),
        "large": (128, 1024, 24, 16),
        "primus-s": (128, 396, 12, 6),
        "primus-b": (128, 792, 12, 12),
        "primus-m": (128, 864, 16, 12),
        "primus-l": (128, 1056, 24, 16),
    }
    assert all(config.model.decoder_width // config.model.decoder_heads == 64 for config in PRESETS.values())
    assert PRESETS["base"].model.grid == (16, 16, 16)
    assert PRESETS["base"].model.tokens == 4096


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rate=1", "no such option"),
        ("train.stpes=1", "did you mean train.steps"),
        ("trian.steps=1", "did you mean train?"),
        ("train.steps", "SECTION.NAME=VALUE"),
        ("steps=1", "SECTION.NAME=VALUE"),
        ("train.steps=1.5", "a whole number"),
        ("train.steps=true", "a whole number"),
        ("train.lr=fast", "a number"),
        ("train.lr=nan", "a number"),
        ("train.window=1,2,3", "2 numbers"),
        ("train.device=5", "a word"),
        ("train.ram=8", "its unit, found '8'; did you mean 8GB?"),
        ("train.ram=lots", "auto or a size such as 500MB"),
        ("train.steps=0", "at least 1"),
        ("train.lr=0", "greater than 0"),
        ("train.window=5,5", "a lower and an upper end"),
        ("train.betas=0.9,1.0", "[0, 1)"),
        ("train.flips=xq", "letters z, y, x"),
        ("train.device=gpu", "cuda:N"),
        ("train.validation=1.0", "below 1"),
        ("train.seed=-1", "at least 0"),
        ("mask.plane=1.0", "between 0 and 1"),
        ("mask.plane=0.001", "hides some, not all, of 64"),
        ("mask.axis=0.99", "hides some, not all, of 32"),
        ("mask.kind=cube", "one of dual"),
        ("model.kind=unet", "one of maesil"),
        ("model.head=interpolate model.decoder=cross", "linear, overlap or refine"),
        ("model.kind=mae2d mask.kind=slab", "layers hide alike"),
        ("model.crop=60", "a multiple of 8"),
        ("model.crop=8", "at least two patches"),
        ("model.patch=6", "a multiple or a divisor of 8"),
        ("model.patch=0", "a multiple or a divisor of 8"),
        ("model.patch=8,8,6", "8x8x6: expected a multiple or a divisor of 8"),
        ("model.crop=64,64", "three for z, y, x, as 64,96,96"),
        ("model.crop=64,64,64,64", "three for z, y, x"),
        ("model.crop=64,64,true", "three for z, y, x"),
        ("model.crop=64,96,big", "three for z, y, x"),
        ("model.crop=64x96", "three for z, y, x"),
        ("model.crop=64,60,64", "64x60x64: expected a multiple of 8"),
        ("model.patch=8,8,32 model.crop=64,64,48", "a multiple of 32, at least two patches of 32"),
        ("model.head=interpolate model.decoder=full model.patch=2,8,8", "a power of 2, at least 4"),
        ("model.kind=ae model.patch=8,8,24 model.crop=96", "8x8x24: expected a power of 2"),
        ("model.width=100", "a multiple of 64"),
        ("model.decoder_width=4", "8 to 63"),
        ("model.depth=0", "at least 1"),
    ],
)
def test_impossible_values_end_in_a_usage_error_that_says_what_would_do(override, words):
    with pytest.raises(UsageError) as error:
        load_config("tiny", None, override.split())
    assert words in str(error.value)
    assert override.partition(".")[0] in str(error.value)


def test_unknown_options_list_the_known_ones():
    with pytest.raises(UsageError) as error:
        load_config("tiny", None, ["mask.ratio=0.5"])
    assert all(f"mask.{f.name}" in str(error.value) for f in fields(MaskConfig))
    with pytest.raises(UsageError, match="there are tiny, small, base, large"):
        load_config("huge")


def test_long_lists_of_options_stay_out_of_the_message():
    with pytest.raises(UsageError) as error:
        load_config("tiny", None, ["train.stepps=5"])
    assert "did you mean train.steps" in str(error.value) and len(str(error.value)) < 200
    assert f"configuration.md lists all {len(fields(TrainConfig))}" in str(error.value)


@pytest.mark.parametrize("size", ["", "auto", "8GB", "500MB", "1.5 GiB", "8g"])
def test_memory_takes_the_words_of_every_size(size):
    assert load_config("tiny", None, [f'train.ram="{size}"']).train.ram == size


def test_a_cube_is_one_number_however_it_is_given():
    config = load_config("tiny", None, ["model.crop=64,64,64", "model.patch=8x8x8"])
    assert config == load_config("tiny") and "crop = 64\npatch = 8\n" in to_toml(config)
    with pytest.raises(UsageError, match=r"model\.crop=\(64, 64\): expected one edge"):
        ModelConfig(crop=(64, 64))


def test_crops_must_fit_the_superpatches_of_the_store():
    require_tile(ModelConfig(crop=64), 128, "S")
    require_tile(ModelConfig(crop=128), 128, "S")
    require_tile(ModelConfig(crop=(64, 96, 96), patch=(4, 8, 8)), 128, "S")
    for crop, tile in ((128, 64), ((32, 64, 136), 128)):
        with pytest.raises(UsageError, match=rf"S: its superpatches have an edge of {tile}"):
            require_tile(replace(ModelConfig(), crop=crop), tile, "S")


def test_config_imports_no_torch():
    code = "import sys, maesil.config.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
