"""A PgBouncer before the test server: transaction pooling at its hardest, as an unprivileged user."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, make_url

from tests.connections import free_port

# What an engine has to be told; docs/limits.md says why.
ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "asyncpg": {"connect_args": {"statement_cache_size": 0, "prepared_statement_cache_size": 0}},
    "psycopg": {"connect_args": {"prepare_threshold": None}},
}

SETTINGS = """
[databases]
* = host={host} port={port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
pool_mode = transaction
default_pool_size = {size}
max_client_conn = 2000
; each transaction on another of the server's connections than the one before, as far as there are several
server_round_robin = 1
"""
PATIENCE_SECONDS = 30.0
PORTS_TO_TRY = 10


@dataclass(frozen=True, slots=True)
class PgBouncer:
    """A running PgBouncer: it serves every database of the server behind it."""

    port: int
    log: Path

    def before(self, address: URL) -> URL:
        """Return the URL that leads to the same database through this PgBouncer."""
        return address.set(host="127.0.0.1", port=self.port)


@contextmanager
def pgbouncer(server: str, *, pool_size: int) -> Iterator[PgBouncer]:
    """Run a PgBouncer with ``pool_size`` connections to each database of the server; it dies with this process.

    Without the program the test is skipped, with the reason; `.ci/run` installs it, so that CI skips nothing.
    """
    # Debian keeps it where only root looks.
    program = shutil.which("pgbouncer", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))
    if program is None:
        pytest.skip("there is no pgbouncer on PATH; on Debian and Ubuntu: apt-get install pgbouncer")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saga-store-pgbouncer-")))
        log = folder / "log"
        for _ in range(PORTS_TO_TRY):
            bouncer = PgBouncer(free_port(), log)
            process = _start(program, make_url(server), bouncer, pool_size)
            stack.callback(_stop, process)
            if _answers(process, bouncer):
                yield bouncer
                return
            if "Address already in use" not in log.read_text():
                break  # otherwise somebody took the port in between
        pytest.fail(f"PgBouncer didn't start; its log:\n{log.read_text()}")


def _start(program: str, server: URL, bouncer: PgBouncer, pool_size: int) -> "subprocess.Popen[bytes]":
    folder = bouncer.log.parent
    users, settings = folder / "users", folder / "pgbouncer.ini"
    users.write_text(f'"{server.username}" "{server.password}"\n')
    settings.write_text(
        SETTINGS.format(host=server.host, port=server.port or 5432, listen=bouncer.port, users=users, size=pool_size)
    )
    with bouncer.log.open("w") as log:
        return subprocess.Popen(
            [*_wrapper(folder), program, str(settings)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def _wrapper(folder: Path) -> list[str]:
    """Let it die with this thread and, since it refuses root, become another user, to whom its folder belongs."""
    wrapper = ["setpriv", "--pdeathsig=KILL"]
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        for path in (folder, *folder.iterdir()):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        wrapper += [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    return [*wrapper, "--"]


def _answers(process: "subprocess.Popen[bytes]", bouncer: PgBouncer) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if "process up" in bouncer.log.read_text():  # listening by then
            return True
        time.sleep(0.01)
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
