"""Connecting to a Dask scheduler that runs already; by TLS, with the certificates of Dask's own configuration."""

from __future__ import annotations

import logging
import re
import ssl
from typing import Any

from maesil.errors import ResourceError, SecurityError, UsageError

_CONNECT_SECONDS = 10
_WORKER_SECONDS = 60
_PAGE = "see docs/how-to/slurm.md"


def connect(address: str) -> Any:
    """Return a client of a scheduler that has a worker.

    `ResourceError` where nobody answers or no worker comes; `UsageError` where certificates are missing or cannot be
    read; `SecurityError` where scheduler and client do not trust each other's.
    """
    from distributed import Client
    from distributed.comm.core import FatalCommClosedError

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    security = _security(address)
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, security=security)
    except (OSError, TimeoutError) as error:
        if isinstance(error, FatalCommClosedError) or _by_tls(error):
            raise _not_trusted(address, error) from error
        raise ResourceError(f"--scheduler {address}: expected a Dask scheduler, found none that answers") from error
    try:
        client.wait_for_workers(1, timeout=_WORKER_SECONDS)
    except (OSError, TimeoutError) as error:
        client.close()
        raise ResourceError(
            f"--scheduler {address}: expected a Dask scheduler with workers, found none of them within "
            f"{_WORKER_SECONDS} s; start workers, and run the same command again"
        ) from error
    return client


def _security(address: str) -> Any:
    """Return what Dask's configuration says of TLS, once its files were read."""
    from distributed.security import Security

    security = Security()
    if not address.startswith("tls://"):
        return security
    try:
        context = security.get_connection_args("client")["ssl_context"]
    except (OSError, ssl.SSLError, RuntimeError) as error:
        raise UsageError(
            f"--scheduler {address}: expected certificates where Dask's configuration (distributed.comm.tls) says, "
            f"found that they cannot be read ({_reason(error)}); {_PAGE}"
        ) from error
    if context is None:
        raise UsageError(
            f"--scheduler {address}: expected certificates in Dask's configuration (distributed.comm.tls), "
            f"found none; {_PAGE}"
        )
    return security


def _not_trusted(address: str, error: Exception) -> SecurityError:
    return SecurityError(
        f"--scheduler {address}: expected that the scheduler and this command trust each other's certificates, found "
        f"that they do not ({_reason(error)}); give both certificates of one authority, {_PAGE}"
    )


def _by_tls(error: BaseException | None) -> bool:
    """Return whether TLS ended a connection: who refuses a certificate may just hang up."""
    return error is not None and (isinstance(error, ssl.SSLError) or _by_tls(error.__cause__ or error.__context__))


def _reason(error: BaseException) -> str:
    """Return what OpenSSL or the system says, without addresses."""
    told = str(error.__cause__ if isinstance(error.__cause__, ssl.SSLError) else error)
    found = re.search(r"(?:\[SSL[^\]]*\]|SSL\w*Error:) ?(?:\[[^\]]*\] )?([^(]*)", told)
    return found[1].strip() if found else told.split("\n")[0]
