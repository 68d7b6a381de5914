"""Finding files: every one of them, once, by content, without following links; broken headers end nothing."""

from __future__ import annotations

import gzip
import io
import os
import random
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support.ct_phantom import SHAPE, base_affine
from support.sources import phantom_hu, write_sources

from maesil.errors import MaesilError, NoInputError
from maesil.ingest.isolated import source_hash
from maesil.ingest.plan import make_plan
from maesil.ingest.scan import find_files, scan
from maesil.ingest.verdict import STATUSES
from maesil.store.nifti import write_nifti
from maesil.synthetic.dicom import SeriesIdentity, ct_series


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    write_sources(root)
    return root


def test_everything_found_is_planned_from_or_judged(tree):
    result = scan([tree])
    assert result.found == sum(path.is_file() for path in tree.rglob("*"))
    assert (len(result.instances), len(result.niftis), len(result.verdicts)) == (2 * SHAPE[0], 1, 1)
    plan = make_plan(result)
    assert len(plan.volumes) == 3
    used = [path for item in plan.volumes for path in item.source.paths]
    assert sorted(used + [v.path for v in plan.verdicts]) == sorted(path for path in tree.rglob("*") if path.is_file())
    # Nothing of the identity goes to a worker.
    for item in plan.volumes:
        assert not any(word in str(item.source.technical) for word in ("DOE", "ROE", "study", "1.2.826"))


def test_the_plan_does_not_depend_on_names_or_order(tree, tmp_path):
    def described(root: Path) -> list[tuple]:
        volumes = make_plan(scan([root])).volumes
        return sorted((str(v.identity), str(v.patient), v.source.kind, len(v.source.paths)) for v in volumes)

    rng = random.Random(0)
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            target = tmp_path / str(rng.randrange(4)) / f"{rng.random()}{'.nii.gz' * path.name.endswith('.gz')}"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert described(tmp_path) == described(tree)


def junk(folder: Path) -> dict[str, str]:
    """Write files that are no CT; return the code each must get."""
    image = io.BytesIO()
    with gzip.open(image, "wb") as stream:
        stream.write(b"plain text, compressed" * 100)
    content = {
        ".DS_Store": (b"\0\0\0\1Bud1" + bytes(600), "not_medical"),
        "empty": (b"", "empty"),
        "one byte": (b"\x02", "not_medical"),
        "report.pdf": (b"%PDF-1.7\n" + bytes(1000), "not_medical"),
        "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(1000), "not_medical"),
        "notes.txt.gz": (image.getvalue(), "gzip_of_something_else"),
        "cut.gz": (image.getvalue()[:20], "gzip_of_something_else"),
        "zeros.dcm": (bytes(4096), "not_medical"),
        "DICOMDIR": (bytes(128) + b"DICM" + bytes(100), "dicomdir"),
    }
    for name, (data, _) in content.items():
        (folder / name).write_bytes(data)
    return {name: code for name, (_, code) in content.items()}


FOREIGN = {
    "ct.mhd": (b"ObjectType = Image\nNDims = 3\nElementDataFile = ct.raw\n", "metaimage", "convert"),
    "ct.mha": (b"ObjectType = Image\nNDims = 3\nElementDataFile = LOCAL\n" + bytes(99), "metaimage", "convert"),
    "ct.nrrd": (b"NRRD0005\ntype: short\n" + bytes(99), "nrrd", "convert"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "other_archive", "unpack"),
    "a.rar": (b"Rar!\x1a\x07\x01\x00" + bytes(99), "other_archive", "unpack"),
    "a.tar": (bytes(257) + b"ustar\x0000" + bytes(300), "other_archive", "unpack"),
    "a.tar.gz": (gzip.compress(bytes(257) + b"ustar\x0000" + bytes(300)), "gzip_of_something_else", "unpack"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_formats_that_are_not_read_say_so_and_the_way_out(tmp_path, name):
    content, code, way_out = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    (verdict,) = scan([tmp_path]).verdicts
    assert (verdict.status, verdict.code) == ("ignored", code)
    assert way_out in verdict.detail


def _with_method(archive: Path, method: int) -> None:
    """Write another compression method into the headers of an archive's members (local: +8, central: +10)."""
    data = bytearray(archive.read_bytes())
    for signature, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = data.find(signature)
        while place >= 0:
            data[place + at : place + at + 2] = method.to_bytes(2, "little")
            place = data.find(signature, place + 4)
    archive.write_bytes(bytes(data))


@pytest.mark.parametrize(("method", "name"), [(9, "Deflate64"), (93, "Zstandard"), (98, "PPMd"), (77, "unknown")])
def test_members_of_a_method_that_is_not_read_are_refused_with_the_way_out(tree, tmp_path, method, name):
    with zipfile.ZipFile(tmp_path / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(tree.rglob("*.dcm"))[:3]:
            archive.write(path, path.name)
    _with_method(tmp_path / "study.zip", method)
    verdicts = {v.code: v for v in scan([tmp_path]).verdicts}
    assert set(verdicts) == {"archive", "zip_method"}
    refused = verdicts["zip_method"]
    assert refused.status == "quarantined" and name in refused.detail and "unpack" in refused.detail


def test_links_say_what_they_are_and_the_way_out(tree, tmp_path):
    (tmp_path / "to a file").symlink_to(next(tree.rglob("*.dcm")))
    (tmp_path / "to nowhere").symlink_to("gone")
    (tmp_path / "annexed.nii.gz").symlink_to("../.git/annex/objects/a/b/SHA256E-s1--c.nii.gz")
    detail = {v.path.name: v.detail for v in scan([tmp_path]).verdicts}
    assert "--follow-links" in detail["to a file"]
    assert "nowhere" in detail["to nowhere"]
    assert "git annex get" in detail["annexed.nii.gz"]


@pytest.mark.parametrize("packed", [False, True])
def test_the_image_of_a_pair_is_read_when_it_is_named_by_itself(tmp_path, packed):
    name = "ct.img.gz" if packed else "ct.img"
    nib.save(nib.Nifti1Pair(phantom_hu().transpose(2, 1, 0), np.diag([-1.3, -1.7, 2.6, 1])), tmp_path / name)
    (other := tmp_path / "other").mkdir()
    result = scan([tmp_path / name])
    (planned,) = make_plan(result).volumes
    assert {path.name.split(".")[0] for path in planned.source.paths} == {"ct"} and len(planned.source.paths) == 2
    assert [v.code for v in result.verdicts] == ["image_of_a_hdr_pair"]
    (other / "ct.img").write_bytes(b"no header beside it" * 99)
    assert [v.code for v in scan([other / "ct.img"]).verdicts] == ["not_medical"]


def test_junk_is_ignored_by_code(tmp_path):
    expected = junk(tmp_path)
    result = scan([tmp_path])
    assert {v.path.name: v.code for v in result.verdicts} == expected
    assert {v.status for v in result.verdicts} == {"ignored"}
    assert not result.instances and not result.niftis


@pytest.mark.parametrize("content", [b"", b"<html></html>", bytes(1000), b"\x1f\x8b\x08"])
@pytest.mark.parametrize("name", ["ct.nii.gz", "CT.NII"])
def test_a_name_that_claims_nifti_is_followed_up(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [path.name for path in scan([tmp_path]).niftis] == [name]


def test_nifti_is_known_by_content(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", phantom_hu().astype("int16"), base_affine())
    (tmp_path / "a.nii.gz").rename(tmp_path / "no name")
    assert [path.name for path in scan([tmp_path]).niftis] == ["no name"]


def test_links_are_not_followed_and_no_loop_is_entered(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "file")
    (tmp_path / "a" / "dangling").symlink_to("nowhere")
    codes = sorted((v.path.name, v.code) for v in scan([tmp_path]).verdicts)
    assert codes == [("dangling", "symlink"), ("file", "not_medical"), ("link", "symlink"), ("loop", "symlink")]


def test_links_that_the_user_names_are_followed(tree, tmp_path):
    nifti = next(tree.rglob("*.nii.gz"))
    (tmp_path / "file.nii.gz").symlink_to(nifti)
    (tmp_path / "folder").symlink_to(nifti.parent)
    assert len(scan([tmp_path / "folder"]).niftis) == 1
    assert len(scan([tmp_path / "file.nii.gz"]).niftis) == 1


def test_links_are_followed_when_asked_each_file_once(tree, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "out").symlink_to(tree)
    (tmp_path / "dangling").symlink_to("nowhere")
    result = scan([tmp_path], follow_links=True)
    assert result.found == sum(path.is_file() for path in tree.rglob("*")) + 1
    assert len(result.niftis) == 1


def zipped(tree: Path, path: Path, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(tree.rglob("*")):
            if file.is_file():
                archive.write(file, Path("..") / ".." / file.relative_to(tree))
        for name, data in more.items():
            archive.writestr(name, data)
    return path


def test_archives_are_read_in_place(tree, tmp_path):
    files = sum(path.is_file() for path in tree.rglob("*"))
    path = zipped(tree, tmp_path / "all.zip", inner=zipped(tree, tmp_path / "inner").read_bytes())
    (tmp_path / "inner").unlink()
    before = path.read_bytes()
    result = scan([tmp_path])
    assert result.found == files + 2
    assert len(result.niftis) == 1 and len(result.instances) == 2 * SHAPE[0]
    codes = {v.path.name: v.code for v in result.verdicts}
    assert (codes["all.zip"], codes["inner"]) == ("archive", "other_archive")
    assert all(path in header.path.parents for header in result.instances)
    plain, archived = make_plan(scan([tree])).volumes, make_plan(result).volumes
    hashes = [sorted(source_hash(item.source) for item in volumes) for volumes in (plain, archived)]
    assert hashes[0] == hashes[1]
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_bad_archives_cost_nothing_but_themselves(tree, tmp_path):
    whole = zipped(tree, tmp_path / "cut.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.nii", bytes(300 << 20))
    found = {v.path.name: (v.status, v.code) for v in scan([tmp_path]).verdicts}
    assert found == {
        "cut.zip": ("quarantined", "bad_archive"),
        "zeros.nii": ("quarantined", "size_limit"),
        "bomb.zip": ("ignored", "archive"),
    }


def test_a_pipe_holds_up_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    codes = {verdict.path.name: verdict.code for verdict in scan([tmp_path]).verdicts}
    assert codes == {"file": "not_medical", "pipe": "not_a_file"}


def test_each_file_once_however_it_is_named(tree):
    nifti = next(tree.rglob("*.nii.gz"))
    found = list(find_files([nifti, tree, nifti.parent, Path(os.path.relpath(tree))]))
    assert len(found) == len(set(found)) == sum(path.is_file() for path in tree.rglob("*"))


def test_stores_are_no_sources(tree, tmp_path):
    (tmp_path / "s.zarr" / "deep").mkdir(parents=True)
    (tmp_path / "s.zarr" / "zarr.json").write_text("{}")
    (tmp_path / "s.zarr" / "deep" / "file").write_text("x")
    (tmp_path / "other").write_text("x")
    assert [path.name for path in find_files([tmp_path])] == ["other"]


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(NoInputError, match="not here"):
        scan([tmp_path, tmp_path / "not here"])


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    """Tests may run as root, who may list everything: so the system call is refused here."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "file").write_text("x")
    real = os.scandir

    def forbidden(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    try:
        verdicts = scan([tmp_path]).verdicts
    except (PermissionError, MaesilError):
        return
    assert "secret" in {v.path.name for v in verdicts}


def test_broken_headers_end_no_scan(tmp_path):
    """Three hundred files with bytes altered, inserted or cut: each still ends as one verdict or one header."""
    rng = random.Random(7)
    folder = tmp_path / "fuzzed"
    folder.mkdir()
    originals = []
    for data in ct_series(phantom_hu()[:3], base_affine(), SeriesIdentity()):
        buffer = io.BytesIO()
        data.save_as(buffer, enforce_file_format=True)
        originals.append(buffer.getvalue())
    header = originals[0].index(b"\xe0\x7f\x10\x00")
    for number in range(300):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(132, min(len(data), header + 8))
            action = rng.randrange(4)
            if action == 0:
                data[at] = rng.randrange(256)
            elif action == 1:
                data[at : at + 4] = bytes(rng.randrange(256) for _ in range(4))
            elif action == 2:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
            elif number % 5 == 0:
                del data[max(at, 200) :]
        (folder / str(number)).write_bytes(data)
    result = scan([tmp_path])
    assert result.found == 300
    plan = make_plan(result)
    judged = [v.path for v in plan.verdicts] + [path for item in plan.volumes for path in item.source.paths]
    assert sorted(judged) == sorted(folder.iterdir())
    assert all(v.status in STATUSES and v.code for v in plan.verdicts)


def test_an_archive_within_an_archive_says_the_way_out(tree, tmp_path):
    (tmp_path / "made").mkdir()
    with zipfile.ZipFile(tmp_path / "made" / "inner.zip", "w") as archive:
        archive.write(next(tree.rglob("*.dcm")), "a.dcm")
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "outer.zip", "w") as archive:
        archive.write(tmp_path / "made" / "inner.zip", "inner.zip")
    inner = {verdict.path.name: verdict for verdict in scan([tmp_path / "in"]).verdicts}["inner.zip"]
    assert (inner.status, inner.code) == ("ignored", "other_archive") and "unpack it" in inner.detail
