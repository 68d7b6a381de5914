"""`maesil ingest --phi-scan`: the search for the patients of the sources in the store."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from support.command_line import ingest, run
from support.sources import PATIENTS, slices_of

from maesil import errors


def test_what_was_searched_for_patients_is_told_and_kept(tmp_path, sources):
    command = [*ingest(sources, tmp_path / "s.zarr", "--report", tmp_path / "r"), "--phi-scan"]
    code, _, told = run(*command)
    kept = json.loads((tmp_path / "r" / "summary.json").read_text())["phi_scan"]
    assert code == 0 and kept["found"] == [] and kept["files"] == 50 and kept["headers"] == 49 and kept["terms"] > 10
    assert kept["voxels"] >= 3 and kept["searched"] + kept["voxels"] == sum(
        path.is_file() for path in (tmp_path / "s.zarr").rglob("*")
    )
    assert f"phi scan: {kept['terms']} terms from 49 headers of 50 files; searched {kept['searched']} files" in told
    assert "found nothing" in told and json.loads(run(*command, "--json")[1])["phi_scan"] == kept
    (tmp_path / "s.zarr" / "recipes" / "note.json").write_text(json.dumps({"x": f"of {PATIENTS[0]}"}))
    code, _, told = run(*command)
    assert code == errors.EXIT_SECURITY and "found it in 1 place (recipes/note.json)" in told
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["phi_scan"]["found"] == ["recipes/note.json"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_the_free_texts_of_nifti_are_searched_for(tmp_path, sources, kind, suffix):
    from maesil.ingest.phi import patient_words

    image = nib.load(sources / "nifti of SMITH" / "SMITH-42.nii.gz")
    named = kind(np.asarray(image.dataobj)[:2, :2, :2], image.affine)
    named.header["descrip"] = b"Smith, John 1970"
    nib.save(named, tmp_path / f"x{suffix}")
    assert patient_words([tmp_path / f"x{suffix}"]) == {"smith, john 1970"}


def test_a_search_without_terms_says_that_it_proves_nothing(tmp_path, sources):
    nameless = tmp_path / "nameless.nii.gz"
    image = nib.load(sources / "nifti of SMITH" / "SMITH-42.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), nameless)
    code, _, told = run(*ingest(nameless, tmp_path / "s.zarr"), "--phi-scan")
    assert code == 0 and "nothing to search for" in told and "this proves nothing" in told


@pytest.mark.parametrize("maker", ["PHANTOM WORKS", "Nobody Phantom"])
def test_the_maker_of_the_scanner_may_share_words_with_a_patient_and_none_is_kept(tmp_path, sources, maker):
    import pydicom

    folder = tmp_path / "scan"
    folder.mkdir()
    for path in slices_of(sources, PATIENTS[0]):
        data = pydicom.dcmread(path)
        data.Manufacturer, data.PatientName = maker, "Nobody^Phantom"
        data.save_as(folder / path.name)
    assert run(*ingest(folder, tmp_path / "s.zarr"), "--phi-scan")[0] == 0
    assert not [path for path in (tmp_path / "s.zarr").rglob("*") if path.is_file() and b"obody" in path.read_bytes()]
