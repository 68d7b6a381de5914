"""Configurations as files and as words of the command line: what is written is read back."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maesil.config.presets import PRESETS
from maesil.config.schema import MaskConfig, RunConfig, TrainConfig
from maesil.config.toml import from_document, load_config, to_document, to_toml, toml_value
from maesil.errors import UsageError
from maesil.files import write_whole


@pytest.mark.parametrize("name", PRESETS)
def test_toml_and_document_round_trip(name):
    config = PRESETS[name]
    text = to_toml(config)
    assert from_document(tomllib.loads(text)) == config
    assert from_document(to_document(config)) == config
    assert to_toml(from_document(tomllib.loads(text))) == text


@given(st.builds(
    TrainConfig,
    steps=st.integers(1, 10**9), lr=st.floats(1e-12, 1e3), window=st.just((-175.0, 250.5)),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)), flips=st.sampled_from(["", "x", "zx"]),
))  # fmt: skip
def test_every_possible_value_survives_the_file(train):
    config = RunConfig(train=train)
    assert from_document(tomllib.loads(to_toml(config))) == config


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_file_and_the_command_line(tmp_path_factory, where):
    config = RunConfig(train=TrainConfig(where=where))
    path = tmp_path_factory.mktemp("t") / "config.toml"
    write_whole(path, to_toml(config))
    assert load_config(None, path, base=RunConfig()) == config
    assert load_config("tiny", None, [f"train.where={toml_value(where)}"]).train.where == where


@pytest.mark.parametrize("where", ["group == '\U0001fac1'", "\x7f", "a\nb", '"\\"', "ä \u2028"])
def test_characters_that_json_and_toml_write_otherwise_survive(where):
    assert from_document(tomllib.loads(to_toml(RunConfig(train=TrainConfig(where=where))))).train.where == where


def test_bytes_that_are_no_text_are_refused_in_one_line():
    where = toml_value("group == \udce4")
    with pytest.raises(UsageError, match=r"train\.where='group == \\udce4': expected a filter in UTF-8"):
        load_config("tiny", None, [f"train.where={where}"])


def test_file_and_overrides_lie_over_the_preset_in_that_order(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('preset = "small"\n[train]\nlr = 0.5\nsteps = 7\n', encoding="utf-8")
    config = load_config(None, file, ["train.steps=9", "train.window=-175,250", "train.device=cpu", "mask.axis=0.25"])
    assert config.model == PRESETS["small"].model
    assert (config.train.lr, config.train.steps, config.train.device) == (0.5, 9, "cpu")
    assert config.train.window == (-175.0, 250.0)
    assert config.mask == MaskConfig(axis=0.25)
    assert load_config("tiny", file).model == PRESETS["tiny"].model
    assert load_config(base=PRESETS["large"]) == PRESETS["large"]


def test_files_that_are_no_configuration_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"missing\.toml: cannot read"):
        load_config(None, tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("[train\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"bad\.toml: expected TOML"):
        load_config(None, tmp_path / "bad.toml")
    (tmp_path / "flat.toml").write_text("train = 3\n", encoding="utf-8")
    with pytest.raises(UsageError, match="expected a table"):
        load_config(None, tmp_path / "flat.toml")


@pytest.mark.parametrize("given", ["64,96,96", "[64, 96, 96]", "64x96x96"])
def test_a_crop_takes_three_edges_and_is_written_as_it_is_read(given, tmp_path):
    config = load_config("tiny", None, [f"model.crop={given}", "model.patch=4x8x8"])
    assert (config.model.crop, config.model.patch) == ((64, 96, 96), (4, 8, 8))
    assert (config.model.grid, config.model.tokens, config.model.patch_voxels) == ((16, 12, 12), 2304, 256)
    (tmp_path / "c.toml").write_text(to_toml(config), encoding="utf-8")
    assert "crop = [64, 96, 96]\npatch = [4, 8, 8]\n" in to_toml(config)
    assert load_config("tiny", tmp_path / "c.toml") == config
