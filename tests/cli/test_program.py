"""The command line: exit codes, one line on standard error, help with examples, nothing heavy before its time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from support.command_line import fails, run
from support.sources import PATIENTS, Workplace, slices_of, write_sources
from support.stores import make_store

from maesil import errors
from maesil.cli import app

HEAVY = (
    "torch",
    "zarr",
    "dask",
    "distributed",
    "numpy",
    "pydicom",
    "nibabel",
    "SimpleITK",
    "matplotlib",
    "pyarrow",
    "rich",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> dict[str, str]:
    """No test touches the user's own key and cache."""
    root = str(tmp_path_factory.mktemp("home"))
    return {"HOME": root, "XDG_CONFIG_HOME": f"{root}/config", "XDG_CACHE_HOME": f"{root}/cache"}


@pytest.fixture(autouse=True)
def own_home(home, monkeypatch):
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MAESIL_CACHE", raising=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_sources(root)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", [(20, 33, 17), (16, 16, 16)], superpatch=16).path


# --- help


def commands(group=None, path=()) -> list[tuple[str, ...]]:
    group = typer.main.get_command(app) if group is None else group
    found = []
    for name, command in group.commands.items():
        here = (*path, name)
        found += commands(command, here) if hasattr(command, "commands") else [here]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example_that_parses(command):
    code, stdout, _ = run(*command, "--help")
    assert code == 0
    text = " ".join(stdout.split())
    example = re.search(r"Example: (maesil .*?)(?= Arguments| Options|$)", text)
    assert example, text
    words = example[1].split()
    assert tuple(words[1 : 1 + len(command)]) == command
    options = {word for word in words if word.startswith("--")}
    assert all(option in text.replace(example[1], "") for option in options)


def test_all_commands_of_this_version_are_there():
    names = {" ".join(command) for command in commands()}
    assert names >= {"ingest", "train", "evaluate", "demo", "store info", "store verify", "store export", "store index"}


def test_version():
    from maesil import __version__

    assert run("--version")[:2] == (0, f"{__version__}\n")


def test_help_needs_no_heavy_package():
    code = (
        "import sys; from typer.testing import CliRunner; import maesil.cli\n"
        f"early = [m for m in {HEAVY!r} if m in sys.modules and m != 'rich']\n"
        "r = CliRunner().invoke(maesil.cli.app, ['--help']); assert r.exit_code == 0\n"
        "r = CliRunner().invoke(maesil.cli.app, ['ingest', '--help']); assert r.exit_code == 0\n"
        f"print(sorted(set(early) | {{m for m in {HEAVY!r} if m in sys.modules and m != 'rich'}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- errors


def ingest(source: object, out: object, *more: object) -> tuple[object, ...]:
    return ("ingest", source, "--out", out, "--workers", 0, *more)


def test_a_wrong_path(tmp_path):
    line = fails(errors.EXIT_NO_INPUT, *ingest(tmp_path / "nowhere", tmp_path / "s.zarr"))
    assert "nowhere" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("kind", ["empty", "junk"])
def test_a_folder_without_ct(tmp_path, kind, dry):
    (tmp_path / "in").mkdir()
    if kind == "junk":
        (tmp_path / "in" / "notes.txt").write_text("x")
    code, _, told = run(*ingest(tmp_path / "in", tmp_path / "s.zarr", *dry))
    *before, line = told.splitlines()
    assert code == errors.EXIT_NO_INPUT and line.startswith("error: ")
    assert [part.split(":")[0] for part in before if part.strip()] == ["report"] * (kind == "junk" and not dry)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--spacing", "isotropic"), ("--spacing", "0"), ("--spacing", "-1"), ("--spacing", "1,2"), ("--spacing", "nan"),
        ("--superpatch", "0"), ("--superpatch", "100"), ("--superpatch", "4096"), ("--codec", "zip"),
        ("--key-file", "/nowhere/at/all/key"), ("--key-file", "/"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_options(tmp_path, sources, options):
    fails(errors.EXIT_USAGE, *ingest(sources, tmp_path / "s.zarr", *options))
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("ingest",),
        ("nonsense",),
        ("ingest", "x", "--out", "y", "--superpatch", "many"),
        ("store",),
        (),
    ],
    ids=" ".join,
)
def test_wrong_use_is_2(arguments):
    code, _, _ = run(*arguments)
    assert code == errors.EXIT_USAGE


def not_a_store(folder: Path, kind: str) -> Path:
    path = folder / "x.zarr"
    if kind == "file":
        path.write_text("x")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("x")
    elif kind == "other zarr":
        import zarr

        zarr.create_group(path)
    return path


@pytest.mark.parametrize("kind", ["missing", "file", "folder", "other zarr"])
@pytest.mark.parametrize("command", ["info", "verify", "export", "index", "train", "evaluate"])
def test_a_store_that_is_none(tmp_path, kind, command):
    path = not_a_store(tmp_path, kind)
    more = ("--out", tmp_path / "out") if command in ("export", "train") else ()
    if command == "evaluate":
        code, _, stderr = run("evaluate", tmp_path / "no run", path)
        assert code in (errors.EXIT_USAGE, errors.EXIT_STORE) and len(stderr.splitlines()) == 1
        return
    words = (command, path) if command == "train" else ("store", command, path)
    if command == "train":
        more = (*more, "--preset", "tiny", "--device", "cpu")
    fails(errors.EXIT_STORE, *words, *more)


@pytest.mark.parametrize("kind", ["file", "folder", "other zarr"])
def test_ingest_never_writes_into_what_is_no_store(tmp_path, sources, kind):
    path = not_a_store(tmp_path, kind)
    before = sorted(tmp_path.rglob("*"))
    code = errors.EXIT_USAGE if kind in ("file", "folder") else errors.EXIT_STORE
    fails(code, *ingest(sources, path, "--key-file", tmp_path.parent / "k"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["shard", "commit", "map", "recipe"])
def test_a_damaged_store(tmp_path, store, damage):
    from maesil.store.store import Store

    shutil.copytree(store, tmp_path / "s.zarr")
    opened = Store.open(tmp_path / "s.zarr")
    volume = opened.volumes()[0]
    path = (
        opened.path
        / {
            "shard": volume.superpatches[0].path,
            "commit": volume.key,
            "map": f"{volume.prefix}/valid/c/0/0/0",
            "recipe": f"recipes/{opened.recipe_hash}.json",
        }[damage]
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    code, stdout, stderr = run("store", "verify", opened.path)
    assert code == errors.EXIT_STORE
    assert "damaged: " in stdout and "1 problem found" in stdout and "Traceback" not in stdout + stderr
    code, stdout, _ = run("store", "verify", opened.path, "--json")
    assert code == errors.EXIT_STORE
    assert json.loads(stdout)["problems"]
    if damage in ("shard", "commit"):
        fails(errors.EXIT_STORE, "store", "export", opened.path, "--out", tmp_path / "out")
    if damage in ("recipe", "commit"):
        fails(errors.EXIT_STORE, "store", "info", opened.path)


@pytest.mark.parametrize("name", ["zz", "", "0" * 32])
def test_an_unknown_volume(tmp_path, store, name):
    fails(errors.EXIT_USAGE, "store", "export", store, "--out", tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_export_into_a_file(tmp_path, store):
    (tmp_path / "file").write_text("x")
    fails(errors.EXIT_USAGE, "store", "export", store, "--out", tmp_path / "file")


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "junk"])
def test_a_run_that_is_none(tmp_path, store, kind):
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("x")
    elif kind != "missing":
        path.mkdir()
        if kind == "junk":
            for name in ("checkpoint.safetensors", "checkpoint.pt", "config.toml", "run.json", "state.json"):
                (path / name).write_bytes(b"\xff junk")
    fails(errors.EXIT_USAGE, "evaluate", path, store)


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "gigantic"), ("--preset", "tiny", "--steps", "-1"), ("--preset", "tiny", "--device", "abacus"),
        ("--preset", "tiny", "--set", "train.nonsense=1"), ("--preset", "tiny", "--set", "nonsense"),
        ("--preset", "tiny", "--set", "train.lr=fast"), ("--preset", "tiny", "--config", "/nowhere.toml"),
        ("--preset", "tiny", "--validation", "2"), ("--preset", "tiny", "--ram", "5"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_training_options(tmp_path, store, options):
    fails(errors.EXIT_USAGE, "train", store, "--out", tmp_path / "run", "--device", "cpu", *options)


def test_a_model_larger_than_the_superpatches(tmp_path, store):
    """The store's superpatches are of 16 voxels; tiny wants crops of 64."""
    fails(errors.EXIT_USAGE, "train", store, "--out", tmp_path / "run", "--preset", "tiny", "--device", "cpu")


def test_a_full_disk_is_5(tmp_path, sources, monkeypatch):
    from maesil.store.storage import Storage

    def full(self, key, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Storage, "put_new", full)
    fails(errors.EXIT_RESOURCES, *ingest(sources, tmp_path / "s.zarr"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_what_may_not_be_written_is_told_in_one_line(tmp_path, sources, monkeypatch, number):
    from maesil.store.storage import Storage

    def forbidden(self, key, data):
        raise OSError(number, os.strerror(number), key)

    monkeypatch.setattr(Storage, "put_new", forbidden)
    assert os.strerror(number) in fails(errors.EXIT_USAGE, *ingest(sources, tmp_path / "s.zarr"))


def test_a_file_in_place_of_the_index_is_told_in_one_line(tmp_path, store):
    shutil.copytree(store, tmp_path / "s.zarr")
    shutil.rmtree(tmp_path / "s.zarr" / "index")
    (tmp_path / "s.zarr" / "index").write_text("x")
    for command in ("verify", "index"):
        assert "found a file" in fails(errors.EXIT_STORE, "store", command, tmp_path / "s.zarr")


@pytest.mark.parametrize("what", ["commit", "root", "recipe"])
@pytest.mark.parametrize("command", ["info", "verify"])
def test_records_nested_too_deeply_are_damage(tmp_path, store, what, command):
    from maesil.store.store import Store

    shutil.copytree(store, tmp_path / "s.zarr")
    opened = Store.open(tmp_path / "s.zarr")
    keys = {"commit": opened.volumes()[0].key, "root": "zarr.json", "recipe": f"recipes/{opened.recipe_hash}.json"}
    (opened.path / keys[what]).write_text("[" * 100_000)
    code, stdout, stderr = run("store", command, opened.path)
    assert code == errors.EXIT_STORE and "Traceback" not in stdout + stderr


def test_an_interrupt_is_130(tmp_path, sources, monkeypatch):
    import maesil.ingest.run

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(maesil.ingest.run, "ingest", interrupted)
    code, _, stderr = run(*ingest(sources, tmp_path / "s.zarr"))
    assert code == errors.EXIT_INTERRUPTED and "interrupted" in stderr and len(stderr.splitlines()) == 1


# --- the commands as they are used


def test_ingest_info_verify_export_index(tmp_path, sources):
    out, key = tmp_path / "s.zarr", tmp_path / "key"
    more = ("--spacing", "native", "--superpatch", 32, "--key-file", key)
    code, stdout, _ = run(*ingest(sources, out, *more, "--dry-run"))
    assert code == 0 and "3 volumes would be made" in stdout and not out.exists() and not key.exists()
    code, stdout, _ = run(*ingest(sources, out, *more))
    assert code == 0 and "3 volumes committed" in stdout
    code, stdout, _ = run(*ingest(sources, out, *more, "--json"))
    assert code == 0
    document = json.loads(stdout)
    assert document["files_found"] == sum(document["counts"].values()) == 50
    assert len(document["fresh"]) == 3 and document["committed"] == []
    code, stdout, _ = run(*ingest(sources, out, *more))
    assert code == 0 and "nothing to do: 3 volumes are up to date" in stdout
    line = fails(errors.EXIT_USAGE, *ingest(sources, out, "--superpatch", 64, "--key-file", key))
    assert "--update" in line
    code, stdout, _ = run("store", "info", out)
    assert code == 0 and "3 volumes of 1 patient, " in stdout  # one phantom, its soft parts 7 and 20 HU apart
    info = json.loads(run("store", "info", out, "--json")[1])
    assert len(info["volumes"]) == 3
    assert run("store", "verify", out)[:2] == (0, "3 volumes, 12 superpatches: all intact\n")
    volume_id = info["volumes"][0]["volume_id"]
    code, stdout, _ = run("store", "export", out, "--out", tmp_path / "nifti", volume_id[:12])
    assert (code, stdout.strip()) == (0, str(tmp_path / "nifti" / f"{volume_id}.nii.gz"))
    assert nib.load(stdout.strip()).shape == tuple(info["volumes"][0]["shape_zyx"])[::-1]
    (out / "index" / "volumes.parquet").unlink()
    assert run("store", "index", out)[:2] == (0, "indexed 3 volumes, 12 superpatches\n")


def test_a_refusal_is_1_unless_allowed(tmp_path, sources):
    place = Workplace(tmp_path)
    shutil.copytree(sources, place.sources)
    nifti = next(place.sources.rglob("*.nii.gz"))
    nifti.write_bytes(nifti.read_bytes()[:-40])
    more = ("--spacing", "native", "--superpatch", 32, "--key-file", place.key)
    code, stdout, _ = run(*ingest(place.sources, place.out, *more))
    assert code == errors.EXIT_REFUSED and "damaged_file" in stdout
    assert run(*ingest(place.sources, place.out, *more))[0] == errors.EXIT_REFUSED
    assert run(*ingest(place.sources, place.out, *more, "--max-refused", 1))[0] == 0


def test_as_a_process_of_its_own(tmp_path, home):
    """What a shell sees: the exit code, one line on standard error, nothing on standard output, no traceback."""
    environment = {**os.environ, **home}
    command = [sys.executable, "-m", "maesil", "ingest", str(tmp_path / "nowhere"), "--out", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (errors.EXIT_NO_INPUT, "")
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_odd_values_in_headers_make_no_noise(tmp_path, sources, home):
    """pydicom warns and logs what it finds odd, quoting it: neither may reach the screen, where logs keep it."""
    import pydicom

    place = Workplace(tmp_path)
    for path in slices_of(sources, PATIENTS[0]):
        data = pydicom.dcmread(path)
        data["StudyInstanceUID"]._value = data.StudyInstanceUID + ".0DOE01"
        place.sources.mkdir(exist_ok=True)
        data.save_as(place.sources / path.name)
    command = [sys.executable, "-m", "maesil", "ingest", str(place.sources), "--out", str(place.out), "--workers", "0"]
    command += ["--spacing", "native", "--superpatch", "32", "--key-file", str(place.key)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home})
    assert done.returncode == 0, done.stderr
    assert "DOE" not in done.stderr + done.stdout and "Warning" not in done.stderr
    assert np.all([re.match(r"(scan|hash|build|report): ", line) for line in done.stderr.splitlines()]), done.stderr


def test_h_is_help_everywhere():
    for path in [(), *commands()]:
        assert run(*path, "-h")[1] == run(*path, "--help")[1] != ""


@pytest.mark.parametrize("group", ["ingest", "store", "cache"])
def test_values_of_options_have_names_that_people_can_read(group):
    for path in [path for path in commands() if path[0] == group]:
        told = run(*path, "--help")[1]
        assert not re.findall(r"--[\w-]+ (?:<\w+|TEXT|PATH|INTEGER|FLOAT)", told), path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ingest x --codec ", {"fast", "compact", "raw"}),
        ("ingest x --prefer s", {"sform"}),
        ("ingest x --duplicates keep-f", {"keep-first"}),
        ("ingest x --refuse lo", {"lossy"}),
        ("ingest x --accept wind", {"windowed"}),
        ("ingest x --retry-quarantined al", {"all"}),
        ("cache rm lun", {"lungs"}),
        ("cache path ", {"lungs"}),
    ],
)
def test_the_shell_completes_closed_sets_of_words(sources, home, words, expected):
    options = ("--spacing", "native", "--superpatch", 32, "--workers", 0)
    assert run("ingest", sources / "nifti of SMITH", "--name", "lungs", *options)[0] == 0
    environment = {**os.environ, **home, "_MAESIL_COMPLETE": "complete_bash", "COMP_WORDS": f"maesil {words}"}
    environment["COMP_CWORD"] = str(len(words.split(" ")))
    entry = [sys.executable, "-c", "from maesil.cli import app; app(prog_name='maesil')"]
    done = subprocess.run(entry, env=environment, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == expected, done.stderr


def test_a_store_given_as_a_source_is_named_as_one(tmp_path, store, sources):
    for place in (store, store / "volumes"):
        line = fails(errors.EXIT_USAGE, *ingest(place, tmp_path / "out.zarr"))
        assert "found a store that `maesil ingest` made" in line and f"maesil store info {store}" in line
    shutil.copytree(store, tmp_path / "below" / "s.zarr")
    line = fails(errors.EXIT_NO_INPUT, *ingest(tmp_path / "below", tmp_path / "out.zarr"))
    assert "Zarr folders only, which are not looked into" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below"]


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


@pytest.fixture
def nothing_read(tmp_path) -> Path:
    """A zip member by a method that is not read, a link, a MetaImage and an NRRD; no CT beside them."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mhd").write_text("ObjectType = Image\nNDims = 3\n")
    (folder / "b.nrrd").write_text("NRRD0004\ntype: short\n")
    (folder / "scan.dcm").symlink_to("/etc/hostname")
    with zipfile.ZipFile(folder / "c.zip", "w") as archive:
        archive.writestr("scan.dcm", b"x" * 200)
    data = (folder / "c.zip").read_bytes()  # a method that zipfile does not write
    data = data.replace(b"PK\3\4" + data[4:8] + b"\0\0", b"PK\3\4" + data[4:8] + b"\t\0", 1)
    at = data.index(b"PK\1\2") + 10
    (folder / "c.zip").write_bytes(data[:at] + b"\t\0" + data[at + 2 :])
    return folder


WAYS_OUT = {
    "metaimage": "convert it to NIfTI", "nrrd": "convert it to NIfTI", "symlink": "--follow-links follows it",
    "zip_method": "unpack the archive and name the folder",
}  # fmt: skip


@pytest.mark.parametrize("where", ["new", "store", "cache", "dry"])
def test_a_run_that_found_nothing_tells_as_any_other(tmp_path, nothing_read, store, where):
    """Table, JSON and report name each reason and its way out; a store that is there already keeps its own."""
    out = tmp_path / "s.zarr"
    if where == "store":
        shutil.copytree(store, out)
    more = {"cache": (), "dry": ("--out", out, "--dry-run")}.get(where, ("--out", out))
    report = ("--report", tmp_path / "r") if where in ("cache", "store") else ()
    code, table, told = run("ingest", nothing_read, *more, *report, "--workers", 0)
    assert code == errors.EXIT_NO_INPUT and told.splitlines()[-1].startswith("error: ")
    code, document, _ = run("ingest", nothing_read, *more, *report, "--workers", 0, "--json")
    files = {file["code"]: file for file in json.loads(document)["files"]}
    assert code == errors.EXIT_NO_INPUT and set(files) == {*WAYS_OUT, "archive"}
    for reason, way_out in WAYS_OUT.items():
        assert reason in table and way_out in files[reason]["detail"]
    assert "no volume was made" in table or where == "dry"
    folder = {"new": tmp_path / "s.report", "dry": tmp_path / "s.report"}.get(where, tmp_path / "r")
    assert (folder / "index.html").exists() == (where != "dry")
    if where != "dry":
        page = (folder / "index.html").read_text()
        assert all(reason in page for reason in WAYS_OUT)
        rows = {row["code"]: row["path"] for row in pq.read_table(folder / "files.parquet").to_pylist()}
        assert set(rows) == {*WAYS_OUT, "archive"}
    assert out.exists() == (where == "store")


def test_a_report_of_nothing_becomes_that_of_the_store(tmp_path, nothing_read, sources):
    """The next run, with scans, writes into the same folder."""
    run(*ingest(nothing_read, tmp_path / "s.zarr"))
    assert run(*ingest(sources, tmp_path / "s.zarr"))[0] == 0
    codes = {row["code"] for row in pq.read_table(tmp_path / "s.report" / "files.parquet").to_pylist()}
    assert {"metaimage", "committed"} <= codes


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_names_no_types_of_python(command):
    """Neither ``<path>`` nor ``<list[str]>``: the value of an option is a word, and so is an argument."""
    told = run(*command, "--help")[1]
    assert not re.findall(r"<[a-z][^>\n]*>|\b(?:Path|str|int|float)\b|INTEGER", told)
