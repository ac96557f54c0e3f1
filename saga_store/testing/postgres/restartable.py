"""An embedded PostgreSQL that is killed and restarted while others use it: same data, same port."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

from saga_store.testing.postgres.cluster import PATIENCE, Cluster, opened
from saga_store.testing.postgres.server import PostgresServer, PostgresUnavailableError

_POLL_SECONDS = 0.01


@contextlib.contextmanager
def restartable(*, data: Path | None = None, bindir: Path | None = None) -> Iterator["RestartableServer"]:
    """Run a durable server (``fsync`` on) as ``embedded`` does, and yield the means to kill and restart it.

    Raises:
        PostgresUnavailableError: as ``embedded``; or this system has no /proc to find the server's processes in.
    """
    if not Path("/proc/self/stat").exists():
        raise PostgresUnavailableError(
            "a server can only be killed with all of its processes where there is /proc", "Run this on Linux."
        )
    with contextlib.ExitStack() as stack:
        cluster, origin = opened(stack, data=data, durable=True, bindir=bindir)
        with cluster.running(stop=signal.SIGINT) as port:
            pass  # a port that was free, and a cluster that is known to start
        server = RestartableServer(cluster, cluster.described(port, origin), port)
        server.start()
        stack.callback(server.kill)
        server.wait_until_ready()
        yield server


class RestartableServer:
    """A server that its owner kills, stops and starts again.

    It dies with the thread that called ``start``; the other methods may be called from any.

    Attributes:
        facts: Its URL, version and origin, which no restart changes.
        user: The user and the group that it runs as, to whom folders that it is to write must belong.
    """

    def __init__(self, cluster: Cluster, facts: PostgresServer, port: int) -> None:
        self.facts = facts
        owner = cluster.data.stat()
        self.user: tuple[int, int] = (owner.st_uid, owner.st_gid)
        self._cluster = cluster
        self._port = port
        self._process: Popen[bytes] | None = None

    @property
    def process(self) -> Popen[bytes]:
        """The postmaster, running or not."""
        if self._process is None:
            raise RuntimeError("the server hasn't been started; call start() first")
        return self._process

    def start(self) -> None:
        """Start it, and don't wait: until ``wait_until_ready`` returns it refuses connections."""
        # Not in fast mode if its owner is killed: a server that is just recovering has been seen not to end then.
        self._process = self._cluster.spawn_server(self._port, dies_by=signal.SIGQUIT)

    def wait_until_ready(self) -> None:
        """Wait until it has recovered and takes connections.

        Raises:
            PostgresUnavailableError: it ended instead; the end of its log is in the message.
        """
        if not self._cluster.answers(self.process):
            raise self._cluster.failure("PostgreSQL didn't start again")

    def stop(self, how: signal.Signals) -> None:
        """Stop it in PostgreSQL's fast (SIGINT) or immediate (SIGQUIT) mode, and wait until it has ended."""
        self.process.send_signal(how)
        self.process.wait(PATIENCE)

    def kill(self) -> None:
        """End all of its processes at once, as a power cut would, and wait until they are gone."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGSTOP)  # lest it fork while its children are counted
        children = _children(self.process.pid)
        for pid in (*children, self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        # The next server refuses to start while anybody is attached to the memory of this one.
        deadline = time.monotonic() + PATIENCE
        while any(map(_runs, children)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes of PostgreSQL outlive SIGKILL: {[*filter(_runs, children)]}")
            time.sleep(_POLL_SECONDS)

    def kill_one(self, choice: int) -> None:
        """Send SIGKILL to one of its backends, if there are any: all others then end, too, and it recovers."""
        backends = [pid for pid in _children(self.process.pid) if _title(pid).startswith("postgres: saga ")]
        if backends:
            with contextlib.suppress(ProcessLookupError):
                os.kill(backends[choice % len(backends)], signal.SIGKILL)


def _children(parent: int) -> list[int]:
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]
    return [pid for pid in pids if (facts := _facts(pid)) and facts[1] == str(parent)]


def _runs(pid: int) -> bool:
    facts = _facts(pid)
    return facts is not None and facts[0] not in {"Z", "X"}


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _facts(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the program's name, state and parent first; None if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
