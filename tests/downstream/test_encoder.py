"""From a scan to embeddings: every token is what crops make of it, and a stranger needs five lines."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ct_phantom import base_affine
from support.pages import DOCS, snippets
from support.runs import SMALL, save_run
from support.sources import phantom_hu
from support.stores import cells, make_store, synthetic_hu

import maesil
from maesil.cache.provenance import record_uses, use_of
from maesil.data.split import Split
from maesil.downstream.encoder import Encoder
from maesil.downstream.export import export_encoder
from maesil.errors import UsageError
from maesil.geometry import spacing_of, world_of
from maesil.models.encoders import encoder_of
from maesil.models.registry import make_model
from maesil.store.nifti import write_nifti
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.writer import Image
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series
from maesil.types import Intensity

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = snippets("how-to/use-encoder.md")


def an_encoder(spacing=None, **changed) -> Encoder:
    model = make_model(replace(SMALL, **changed))
    model.init_weights(torch.Generator().manual_seed(3))
    return Encoder(encoder_of(model, Intensity(mean=0.4, std=0.3)), spacing)


def a_scan(shape, *, seed=0, valid=None) -> Image:
    hu = synthetic_hu(shape, seed)
    valid = np.ones(shape, bool) if valid is None else valid
    return Image(hu, base_affine(), cells(valid), cells((hu > -950) & valid))


def naive_tokens(encoder: Encoder, scan: Image) -> np.ndarray:
    """Each token as the docstring of `embed_scan` says, one crop after the other."""
    (crop, patch), shape = (encoder.preprocess.crop, encoder.preprocess.patch), scan.shape
    units = [int(np.lcm(p, 8)) for p in patch]
    size = [max(c, -(-n // u) * u) for c, n, u in zip(crop, shape, units, strict=True)]
    hu = np.full(size, -1024, np.int16)
    hu[tuple(slice(0, n) for n in shape)] = scan.hu
    valid = np.zeros([n // 8 for n in size], np.uint8)
    valid[tuple(slice(0, n) for n in scan.valid.shape)] = scan.valid
    hu[(valid == 0).repeat(8, 0).repeat(8, 1).repeat(8, 2)] = -1024
    grid = [n // p for n, p in zip(size, patch, strict=True)]
    total, weight = np.zeros((*grid, encoder.width)), np.zeros(grid)
    starts = []
    for n, c, u in zip(size, crop, units, strict=True):
        step = max(u, c // 2 // u * u)
        starts.append(sorted({*range(0, n - c, step), n - c}))
    ramps = [np.sin(np.pi * (np.arange(c // p) + 0.5) / (c // p)) ** 2 for c, p in zip(crop, patch, strict=True)]
    ramp = np.einsum("i,j,k->ijk", *ramps)
    for at in product(*starts):
        if not valid[tuple(slice(a // 8, (a + c) // 8) for a, c in zip(at, crop, strict=True))].any():
            continue
        box = hu[tuple(slice(a, a + c) for a, c in zip(at, crop, strict=True))].copy()
        with torch.no_grad():
            tokens = encoder.forward_features(torch.from_numpy(box)[None])[0].double().numpy()
        place = tuple(slice(a // p, (a + c) // p) for a, c, p in zip(at, crop, patch, strict=True))
        total[place] += ramp[..., None] * tokens.reshape(*ramp.shape, -1)
        weight[place] += ramp
    tokens = np.divide(total, weight[..., None], out=np.zeros_like(total), where=weight[..., None] > 0)
    return tokens[tuple(slice(0, -(-n // p)) for n, p in zip(shape, patch, strict=True))]


@pytest.mark.parametrize("changed, shape", [
    ({}, (45, 70, 33)), ({}, (20, 32, 90)), ({"crop": (16, 32, 48), "patch": (4, 8, 16)}, (30, 60, 50)),
    ({"kind": "primus", "registers": 1}, (40, 40, 50)), ({"kind": "ae", "channels": 4, "latent": 8}, (40, 40, 40)),
])  # fmt: skip
def test_tokens_are_means_over_crops_that_overlap(changed, shape):
    encoder = an_encoder(**changed)
    valid = np.ones(shape, bool)
    valid[:, : shape[1] // 3, :20] = False
    scan = a_scan(shape, valid=valid)
    found = encoder.embed(scan)
    np.testing.assert_allclose(found.tokens, naive_tokens(encoder, scan), rtol=1e-4, atol=1e-5)
    share = found.body.ravel().astype(float)
    assert found.weighted_by == "body" and share.sum() > 0
    mean = share @ found.tokens.reshape(len(share), -1).astype(float) / share.sum()
    np.testing.assert_allclose(found.vector, mean, rtol=1e-5, atol=1e-6)
    if changed.get("patch") is None:
        np.testing.assert_allclose(found.valid, scan.valid / 255)


def test_a_scan_of_one_crop_has_the_tokens_of_the_crop():
    encoder, scan = an_encoder(), a_scan((32, 32, 32))
    with torch.no_grad():
        expected = encoder(torch.from_numpy(scan.hu)[None])[0]
    np.testing.assert_allclose(encoder.embed(scan).tokens.reshape(64, -1), expected, rtol=1e-4, atol=1e-5)


def test_tokens_know_where_they_lie():
    scan = a_scan((40, 40, 40))
    found = an_encoder().embed(scan)
    np.testing.assert_allclose(world_of(found.affine, (1, 2, 3)), world_of(scan.affine, (11.5, 19.5, 27.5)))
    np.testing.assert_allclose(spacing_of(found.affine), 8 * np.array(spacing_of(scan.affine)))


def test_without_body_the_scan_counts_and_without_both_nothing():
    encoder, scan = an_encoder(), a_scan((40, 40, 40))
    no_body = replace(scan, body=np.zeros_like(scan.body))
    assert encoder.embed(no_body).weighted_by == "valid"
    nothing = encoder.embed(replace(no_body, valid=np.zeros_like(scan.valid)))
    assert nothing.vector is None and nothing.weighted_by == "nothing" and not nothing.tokens.any()


def test_an_array_of_the_encoder_s_spacing_is_a_scan(tmp_path):
    encoder = an_encoder((1.5, 1.5, 1.5))
    hu = synthetic_hu((48, 56, 40))
    write_nifti(tmp_path / "a.nii.gz", hu, np.array([[0, 0, 1.5, 0], [0, 1.5, 0, 0], [1.5, 0, 0, 0], [0, 0, 0, 1.0]]))
    read = encoder.embed(maesil.read_ct(tmp_path / "a.nii.gz", encoder.preprocess.spacing))
    for given in (hu, torch.from_numpy(hu)):
        found = encoder.embed(given)
        np.testing.assert_array_equal(found.tokens, read.tokens)
        np.testing.assert_array_equal(found.body, read.body)
        np.testing.assert_array_equal(found.vector, read.vector)


def test_what_is_no_scan_of_the_encoder_s_is_refused():
    with pytest.raises(UsageError, match=r"expected a scan of 1\.5 x 1\.5 x 1\.5 mm .* found .*; read it by maesil"):
        an_encoder((1.5, 1.5, 1.5)).embed(a_scan((40, 40, 40)))
    with pytest.raises(UsageError, match="of which no spacing is known"):
        an_encoder().embed(synthetic_hu((40, 40, 40)))
    with pytest.raises(UsageError, match=r"expected int16 HU \[Z, Y, X\], found float32"):
        an_encoder((1.0, 1.0, 1.0)).embed(np.zeros((40, 40, 40), np.float32))


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Path:
    """A folder with an exported encoder, trained at 3 mm, and the DICOM files of a patient."""
    store = make_store(tmp_path / "s", [(32, 32, 32)])
    spaced = Store.create(tmp_path / "t", Recipe(spacing=(3.0, 3.0, 3.0), superpatch=32), "0" * 16)
    run = save_run(tmp_path / "run", Split((), ()))
    record_uses(run, [replace(use_of(store, None), recipe=spaced.recipe)])
    export_encoder(run, tmp_path / "encoder")
    write_dicom_series(tmp_path / "scans" / "patient1", phantom_hu(), base_affine(), SeriesIdentity(), seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_five_lines_lead_from_a_folder_of_dicom_to_embeddings(stranger, capsys):
    code = PAGE["Five lines"]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) == 5
    names: dict = {}
    exec(code, names)
    embedding, encoder = names["embedding"], names["encoder"]
    assert encoder.preprocess.spacing == (3.0, 3.0, 3.0) and encoder.preprocess.orientation == "LPS"
    assert spacing_of(names["scan"].affine) == pytest.approx((3.0, 3.0, 3.0))
    grid = tuple(-(-n // 8) for n in names["scan"].shape)
    assert embedding.vector.shape == (48,) and embedding.tokens.shape == (*grid, 48) and embedding.vector.std() > 0
    assert capsys.readouterr().out == f"{embedding.vector.shape} {embedding.tokens.shape}\n"
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert code in "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
