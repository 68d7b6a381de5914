"""No credential in any file, object or message: every command that takes a URL, when it ends well and when it fails.

The server on loopback knows a key, its id and a session. What is searched for them: all that commands print, their
errors with the whole chain behind them, what is logged at the lowest level, and all files and objects they leave.
"""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from support.command_line import SMALL
from support.object_server import KEY_ID, SECRET, TRANSIENT, now_and_then, quota
from support.objects import bucket_store, upload
from support.stores import make_store
from typer.testing import CliRunner

from maesil.cli import app
from maesil.store.nifti import write_nifti
from maesil.store.urls import place_of

TOKEN = "FwoGZXIvYXdzEB-a-session-that-must-not-leak"
SIGNED = re.compile(r"X-Amz-(Signature|Credential|Security-Token)=|Signature=[0-9a-f]{8}|AWS4-HMAC")
"""What a signed URL or header holds."""
WRONG = "wrong-secret-that-must-not-leak-either"
FAULTS = {
    "none": lambda _: None,
    "now and then": now_and_then(5, *TRANSIENT),
    "denied": lambda _: "denied",
    "internal error": lambda _: "internal error",
    "cut body": lambda _: "cut body",
    "lost answer": lambda _: "lost answer",
    "full": quota(0, "full"),
}


def url_of(bucket):
    return f"s3://{bucket}/stores/store.zarr"


@pytest.fixture
def said(monkeypatch):
    """All that was said in this process, collected in a list; logging tells everything."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    log = io.StringIO()
    handler, root = logging.StreamHandler(log), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    texts: list[str] = []
    yield texts
    root.removeHandler(handler)
    root.setLevel(level)
    texts.append(log.getvalue())
    assert no_secret_in(texts)


def no_secret_in(texts):
    for text in texts:
        for secret in (SECRET, KEY_ID, TOKEN, WRONG):
            assert secret not in text, text[:2000]
        assert not SIGNED.search(text), text[:2000]
    return True


def told(said, *words):
    """Run a command in this process; add what it says, and the error behind its end, to the rest; return its code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    said += [result.output, *([] if result.exc_info is None else traceback.format_exception(*result.exc_info))]
    return result.exit_code


def commands_of_a_store(url, first):
    Path("labels").mkdir(exist_ok=True)
    write_nifti(Path("labels", f"{first}.nii.gz"), np.ones((16, 16, 16), np.int16), np.eye(4))
    return [
        ("store", "info", url, "--json"), ("store", "verify", url, "--json"), ("store", "gc", url),
        ("store", "index", url), ("store", "explain", url, first), ("store", "upgrade", url),
        ("store", "add-labels", url, "labels", "--name", "organ"),
        ("store", "export", url, "--out", "nifti", first), ("store", "overlap", url, url),
        ("store", "split", url, "--out", "split.json", "--shares", "0.5,0.5,0"),
        ("cache", "list"), ("doctor", url),
    ]  # fmt: skip


def all_that_is_left(bucket, here):
    """The names and contents of all files below a folder, tables and caches too, and of all objects."""
    store = bucket_store(bucket)
    for one in store.list().collect():
        yield one["path"]
        yield bytes(store.get(one["path"]).bytes()).decode("latin-1")
    for path in here.rglob("*"):
        yield str(path)
        if path.is_file():
            yield path.read_bytes().decode("latin-1")


def test_no_quick_command_tells_a_credential(said, bucket, proxy, here, monkeypatch):
    """The quick one: two commands, four ends. All commands and all ends are in the slow lane."""
    url = url_of(bucket)
    make_store(place_of(url), [(16, 16, 16)], superpatch=16)
    assert told(said, "store", "info", url, "--json") == 0
    monkeypatch.setattr("maesil.store.object_storage.PATIENCE", 0.3)
    for fault, code in (("denied", 2), ("cut body", 5)):
        proxy.faults = FAULTS[fault]
        assert told(said, "store", "info", url) == code
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url.replace("//", f"//user:{SECRET}@"))
    assert told(said, "store", "info", url) == 5
    proxy.faults = FAULTS["none"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    assert no_secret_in([*said, *all_that_is_left(bucket, here)])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_command_of_a_store_tells_a_credential_whatever_fails(said, bucket, proxy, here, monkeypatch):
    store = make_store(place_of(url_of(bucket)), [(16, 16, 16), (16, 16, 24)], superpatch=16)
    words = commands_of_a_store(url_of(bucket), store.volumes()[0].volume_id)
    codes = {}
    for name, fault in FAULTS.items():
        proxy.faults = fault
        codes[name] = [told(said, *one) for one in words]
        monkeypatch.setattr("maesil.store.object_storage.PATIENCE", 0.5)
    assert codes["none"][:4] == [0] * 4, codes
    assert set(codes["denied"][:4]) == {2} and set(codes["internal error"][:4]) == {5}, codes
    proxy.faults = FAULTS["none"]
    for secret in (WRONG, f"{SECRET} and more"):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        told(said, *words[0])
    for endpoint in (proxy.url.replace("//", f"//user:{SECRET}@"), f"http://user:{SECRET}@127.0.0.1:9", SECRET):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        ends = told(said, *words[0])
    assert ends == 2, "what is no URL"
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    assert no_secret_in([*said, *all_that_is_left(bucket, here)])


@pytest.mark.slow
@pytest.mark.parametrize("url", [f"s3://{KEY_ID}:{SECRET}@b/x", f"s3://b/x?X-Amz-Signature={SECRET}"])
def test_a_credential_in_a_url_is_repeated_by_no_command(said, here, url):
    Path("series.csv").write_text(f"series_url\n{url}\n")
    for words in (
        ("ingest", url, "--out", "s"), ("ingest", "x", "--out", url),
        ("ingest", "--manifest", "series.csv", "--out", "s"),
        ("store", "info", url), ("train", url, "--out", "run"), ("train", "x", "--out", "run", "--mirror", url),
        ("evaluate", "run", url), ("features", "run", url, "--out", "f.parquet"), ("export", "run", "--out", url),
        ("prove", "run", url, "--labels", "x", "--out", "p"), ("cache", "path", url), ("doctor", url),
    ):  # fmt: skip
        assert told(said, *words) != 0, words
    Path("series.csv").unlink()
    assert no_secret_in([*said, *map(str, here.rglob("*"))])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_process_tells_a_credential_from_ingest_to_features(said, sources, bucket, proxy, here, monkeypatch):
    """Processes of their own: what libraries and workers print counts as well."""
    monkeypatch.setenv("RUST_LOG", "trace")
    monkeypatch.setenv("DASK_LOGGING__DISTRIBUTED", "debug")
    upload(sources / "export", bucket, "dicom")
    url = url_of(bucket)
    commands = (
        ["ingest", f"s3://{bucket}/dicom", "--out", url, "--workers", 1, "--key-file", "key", *SMALL],
        ["train", url, "--preset", "tiny", "--out", "run", "--steps", 1, "--batch", 1, "--device", "cpu", "--set",
         "model.crop=32", "--set", "train.thin=pad", "--stage", "stage", "--stage-size", "1GB", "--mirror",
         f"s3://{bucket}/mirror"],
        ["evaluate", "run", url, "--volumes", "all", "--out", "scores"],
        ["features", "run", url, "--out", "features.parquet"],
        ["export", "run", "--out", "encoder"],
    )  # fmt: skip
    script = "import maesil.store.object_storage as o; o.PATIENCE = 1.0; from maesil.cli import main; main()"
    ends = {}
    for name in ("now and then", "denied"):
        proxy.faults = FAULTS[name]
        for words in commands[: None if name == "now and then" else 2]:
            done = subprocess.run(
                [sys.executable, "-X", "dev", "-c", script, *map(str, words)], capture_output=True, text=True
            )
            said += [done.stdout, done.stderr]
            ends.setdefault(name, []).append(done.returncode)
    proxy.faults = FAULTS["none"]
    assert ends["now and then"] == [0] * 5, said[:10]
    assert ends["denied"] == [2, 2], ends
    assert no_secret_in([*said, *all_that_is_left(bucket, here)])
