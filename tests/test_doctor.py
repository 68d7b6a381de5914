from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from support.stores import make_store
from typer.testing import CliRunner

from maesil import doctor
from maesil.cli import app
from maesil.kernels import can_run_triton, library


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_what_will_run_where_is_what_runs(monkeypatch):
    found = by_name(doctor.examine())
    assert found["torch"].value == torch.__version__.replace("+cpu", "+cpu")
    device = found["train.device=auto"].value
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (found["train.kernels=auto"].value == "triton") == can_run_triton(device)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    compiled = by_name(doctor.examine())["train.compile=true"]
    assert "would fail" in compiled.value and "g++" in compiled.advice
    assert "memory" in found["train.activation_checkpointing=true"].value


def test_triton_is_not_promised_without_a_c_compiler(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    library._c_compiler.cache_clear()
    told = doctor._kernels(gpu)
    assert told.value.startswith("reference") and "C compiler" in told.advice and not can_run_triton(gpu)
    monkeypatch.setenv("CC", "cc")
    library._c_compiler.cache_clear()
    assert doctor._kernels(gpu).value == "triton" and can_run_triton(gpu)
    library._c_compiler.cache_clear()


def test_a_store_is_held_against_the_memory_there_is(tmp_path, monkeypatch):
    path = make_store(tmp_path / "s", [(32, 40, 36)]).path
    monkeypatch.setattr(doctor, "available_memory", lambda: 10**9)
    found = by_name(doctor.examine(path))
    # 32x40x36 voxels in tiles of 32: 1 x 2 x 2 of them, two bytes a voxel.
    assert f"{4 * 2 * 32**3 / 1e9:.2f} GB decoded" in found[str(path)].value
    assert "--ram auto" in found["memory"].advice
    monkeypatch.setattr(doctor, "available_memory", lambda: 4 * 2 * 32**3 * 2 - 1)
    assert "read from disk" in by_name(doctor.examine(path))["memory"].value


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_an_old_gpu_is_told_from_a_new_one(monkeypatch, capability):
    cuda = SimpleNamespace(get_device_capability=lambda: capability)
    monkeypatch.setattr(doctor.torch, "cuda", cuda)
    found = doctor._number_format(torch.device("cuda"))
    assert ("not native" in found.value) == bool(found.advice) == (capability < (8, 0))


def test_the_command_prints_a_table_or_json_and_ends_well(tmp_path):
    path = make_store(tmp_path / "s", [(32, 32, 32)]).path
    printed = CliRunner().invoke(app, ["doctor", str(path)])
    assert printed.exit_code == 0 and "train.kernels=auto" in printed.stdout and "decoded" in printed.stdout
    told = CliRunner().invoke(app, ["doctor", "--json"])
    assert told.exit_code == 0
    assert {"section", "name", "value", "advice"} == set(json.loads(told.stdout)[0])
    assert CliRunner().invoke(app, ["doctor", str(tmp_path)]).exit_code == 4


def test_other_commands_refuse_several_ranks(tmp_path):
    several = {"RANK": "1", "WORLD_SIZE": "4"}
    refused = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d")], env=several)
    assert refused.exit_code == 2 and "only train takes several" in refused.output
    assert not (tmp_path / "d").exists()
