"""Ingest on Dask clusters by TLS: real certificates, schedulers and workers as processes; the scripts of the page."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dask
import pytest
from support.command_line import SMALL, ingest, run
from support.pages import snippets
from support.sources import contents, write_sources

from maesil import errors
from maesil.ingest.connect import connect
from maesil.store.store import Store
from maesil.store.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROLES = ("scheduler", "worker", "client")
SECONDS = 240
SMALL_WORDS = [str(word) for word in SMALL]


def make_certificate(folder: Path) -> Path:
    """Make ``dask.key`` and ``dask.crt``, a certificate that vouches for itself; return their folder."""
    from distributed.security import Security

    made = Security.temporary()
    folder.mkdir()
    (folder / "dask.key").write_text(made.tls_client_key)
    (folder / "dask.crt").write_text(made.tls_client_cert)
    return folder


def configured(folder: Path) -> dict[str, str]:
    """The environment variables of the page."""
    name = "DASK_DISTRIBUTED__COMM__"
    return {
        **{f"{name}TLS__{role.upper()}__KEY": str(folder / "dask.key") for role in ROLES},
        **{f"{name}TLS__{role.upper()}__CERT": str(folder / "dask.crt") for role in ROLES},
        f"{name}TLS__CA_FILE": str(folder / "dask.crt"),
        f"{name}REQUIRE_ENCRYPTION": "True",
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("clusters")


@pytest.fixture(scope="module")
def home(work):
    return {"HOME": str(work), "XDG_CONFIG_HOME": f"{work}/config", "XDG_CACHE_HOME": f"{work}/cache"}


@pytest.fixture(autouse=True)
def own_home(home, monkeypatch):
    for name, value in home.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def certificate(work):
    return make_certificate(work / "tls")


@pytest.fixture(scope="module")
def source(work):
    write_sources(work / "sources")
    return work / "sources" / "nifti of SMITH"


@pytest.fixture(scope="module")
def undisturbed(source, work, home):
    """What one process makes of the source, and the identity key."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in home.items():
            patch.setenv(name, value)
        assert run(*ingest(source, work / "store.zarr", "--key-file", work / "identity.key", *SMALL))[0] == 0
    return contents(Store.open(work / "store.zarr"))


def same(store, undisturbed):
    return contents(Store.open(store)) == undisturbed and verify(Store.open(store)).problems == ()


@contextmanager
def running(*words: object, environment: dict[str, str], log: Path):
    """A process for the length of the block; what it says goes to a file."""
    with log.open("w") as said:
        process = subprocess.Popen(
            [str(word) for word in words], env={**os.environ, **environment}, stdout=said, stderr=said
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(address: str) -> None:
    """Wait until somebody listens there: on a busy machine a scheduler takes longer than a client waits."""
    host, port = address.removeprefix("tls://").split(":")
    for _ in range(SECONDS):
        try:
            socket.create_connection((host, int(port))).close()
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(address)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def scheduler(certificate, work):
    """The address of a scheduler with one worker, which speak TLS alone."""
    address = f"tls://127.0.0.1:{free_port()}"
    dask_words = (sys.executable, "-m", "dask")
    with ExitStack() as both:
        for name, words in (
            ("scheduler", ("scheduler", "--host", address, "--no-dashboard")),
            ("worker", ("worker", address, "--nthreads", 1, "--no-dashboard", "--local-directory", work / "local")),
        ):
            process = running(*dask_words, *words, environment=configured(certificate), log=work / f"{name}.log")
            both.enter_context(process)
            wait_for(address)
        yield address


def in_configuration(folder: Path) -> dict[str, str]:
    files = {"key": folder / "dask.key", "cert": folder / "dask.crt"}
    roles = {f"distributed.comm.tls.{role}.{name}": str(path) for role in ROLES for name, path in files.items()}
    return {**roles, "distributed.comm.tls.ca-file": str(folder / "dask.crt")}


def test_an_ingest_by_tls_makes_the_same_store(scheduler, certificate, source, undisturbed, work):
    words = ("ingest", source, "--out", work / "tls.zarr", "--key-file", work / "identity.key", *SMALL_WORDS)
    done = subprocess.run(
        [sys.executable, "-m", "maesil", *map(str, words), "--scheduler", scheduler],
        env={**os.environ, **configured(certificate)}, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (work / "worker.log").read_text()
    assert same(work / "tls.zarr", undisturbed)


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        ("none", errors.UsageError, r"expected certificates in Dask's configuration .* found none"),
        ("missing", errors.UsageError, "cannot be read"),
        ("no key", errors.UsageError, "cannot be read"),
        (
            "another authority",
            errors.SecurityError,
            r"trust each other's certificates, found that they do not \(certificate verify failed",
        ),
        (
            "another client",
            errors.SecurityError,
            r"trust each other's certificates, found that they do not \((.*unknown ca|EOF)",
        ),
    ],
)
def test_wrong_certificates_are_told_in_one_line(scheduler, certificate, tmp_path, wrong, error, told):
    other = make_certificate(tmp_path / "other")
    right, wrong_ones = in_configuration(certificate), in_configuration(other)
    client = {name: path for name, path in wrong_ones.items() if ".client." in name}
    chosen = {
        "none": dict.fromkeys(right),
        "missing": {**right, "distributed.comm.tls.client.cert": str(tmp_path / "no such")},
        "no key": {**right, "distributed.comm.tls.client.key": None},
        "another authority": wrong_ones,
        "another client": {**right, **client},
    }[wrong]
    with dask.config.set(chosen), pytest.raises(error, match=told) as raised:
        connect(scheduler)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(f"--scheduler {scheduler}: ")
    assert "slurm.md" in str(raised.value)


def test_nobody_there_is_told(certificate):
    with dask.config.set(in_configuration(certificate)), pytest.raises(errors.ResourceError, match="none that answers"):
        connect(f"tls://127.0.0.1:{free_port()}")


SBATCH = """#!/bin/sh
cp "$1" "{folder}/job-$$.sh"
SLURM_JOB_ID=$$ setsid /bin/sh "{folder}/job-$$.sh" > "{folder}/job-$$.log" 2>&1 &
echo $! > "{folder}/job-$$.pid"
echo "Submitted batch job $$"
"""
"""Stands in for SLURM's: it starts the job script as a process of this machine, in a group of its own."""
SCANCEL = """#!/bin/sh
for job in "$@"; do
    touch "{folder}/cancelled-$job"
    kill -KILL -- "-$(cat "{folder}/job-$job.pid")"
done
"""


def test_the_script_for_slurm_starts_jobs_and_ingests(certificate, source, undisturbed, work, tmp_path):
    pytest.importorskip("dask_jobqueue")
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (jobs / name).write_text(text.format(folder=jobs))
        (jobs / name).chmod(0o700)
    (tmp_path / "ingest_on_slurm.py").write_text(snippets("how-to/slurm.md")["Dask jobs on SLURM"])
    words = (source, "--out", tmp_path / "s.zarr", "--key-file", work / "identity.key", *SMALL_WORDS)
    path = f"{jobs}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "ingest_on_slurm.py", *map(str, words)], cwd=tmp_path, timeout=SECONDS,
        env={**os.environ, **configured(certificate), "PATH": path, "WORKERS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "s.zarr", undisturbed)
    (script,) = jobs.glob("job-*.sh")
    number = script.stem.removeprefix("job-")
    text = script.read_text()
    assert "#SBATCH --mem=4G" in text and "#SBATCH -t 04:00:00" in text, "what dask-jobqueue wrote for SLURM"
    assert f"--tls-cert {certificate}/dask.crt" in text and "tls://" in text
    assert (jobs / f"cancelled-{number}").exists(), "the script gives its jobs back"


def here(words, certificate: Path, work: Path, port: int) -> list[str]:
    """Words of a container, for this machine: its files, its loopback address, a port of its own."""
    changed = {
        r"tls://ingest-scheduler\.default\.svc:8786": f"tls://127.0.0.1:{port}", r"0\.0\.0\.0": "127.0.0.1",
        r"^(8786)$": str(port), r"^/tls/": f"{certificate}/", r"^/identity/": f"{work}/",
        r"\$\(DASK_WORKER_NAME\)": "one", r"^8788$": "0",
    }  # fmt: skip
    for pattern, new in changed.items():
        words = [re.sub(pattern, new, word) for word in words]
    return words


def as_process(words: list[str]) -> list[str]:
    """The command of a container by this interpreter."""
    scripts = {f"dask-{name}": f"distributed.cli.dask_{name}" for name in ("scheduler", "worker")}
    return [sys.executable, "-m", scripts.get(words[0], words[0]), *words[1:]]


def test_the_description_for_kubernetes_is_valid_and_its_commands_ingest(
    certificate, source, undisturbed, work, tmp_path
):
    """Needs dask-kubernetes, which is no part of the extra for tests: it brings twenty packages."""
    kubernetes = pytest.importorskip("dask_kubernetes")
    jsonschema, yaml = pytest.importorskip("jsonschema"), pytest.importorskip("yaml")
    script = tmp_path / "ingest_on_kubernetes.py"
    script.write_text(snippets("how-to/slurm.md")["Dask on Kubernetes"])
    words = (str(source), "--out", str(tmp_path / "k.zarr"), *SMALL_WORDS)
    made = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True, timeout=SECONDS)
    cluster, job = json.loads(made.stdout)["items"]
    crds = Path(kubernetes.__file__).parent / "operator/deployment/helm/dask-kubernetes-operator/crds/daskcluster.yaml"
    schema = yaml.safe_load(crds.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    jsonschema.validate(cluster, schema)
    pods = {name: cluster["spec"][name]["spec"]["containers"][0] for name in ("scheduler", "worker")}
    port, commands = free_port(), {name: pod["args"] for name, pod in pods.items()}
    commands["job"] = job["spec"]["template"]["spec"]["containers"][0]["command"]
    env = {one["name"]: here([one["value"]], certificate, work, port)[0] for one in pods["worker"]["env"]}
    with ExitStack() as both:
        for name in ("scheduler", "worker"):
            log = tmp_path / f"{name}.log"
            both.enter_context(
                running(*as_process(here(commands[name], certificate, work, port)), environment=env, log=log)
            )
            wait_for(f"tls://127.0.0.1:{port}")
        command = as_process(here(commands["job"], certificate, work, port))
        done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr + log.read_text()
    assert same(tmp_path / "k.zarr", undisturbed)
