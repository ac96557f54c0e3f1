"""``saga-store web``, and the pages on PostgreSQL: what they show to whom, as which role, and what if they can't."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg.sql import SQL, Identifier, Literal
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store import SagaStepStatus
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.web import create_app
from tests.connections import engine_on
from tests.databases import Database
from tests.html_pages import Html, crawl
from tests.wheel import Environment

DRIVERS = ("asyncpg", "psycopg")
EVERYWHERE = "0.0.0.0"  # noqa: S104 - what has to be warned of
ANY_PORT = ("--bind", "127.0.0.1:0")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "saga_store", "web", *arguments]


@contextmanager
def serving(url: str, *arguments: str, program: tuple[str, ...] = ()) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the command, and yield what it says its address is."""
    line = [*program, *arguments] if program else command(*arguments)
    environment = os.environ | {"DATABASE_URL": url}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().partition("  ")[0], process
        finally:
            process.kill()


@pytest.fixture
def saga_id(admin: psycopg.Connection) -> UUID:
    """A saga in doubt."""
    saga_id = uuid4()
    admin.execute(
        "INSERT INTO saga_executions (id, name, status, context, created_at, updated_at) VALUES "
        "(%s, 'order', 'RUNNING', '{\"card\": \"4711\"}', now() - interval '1 hour', now() - interval '1 hour')",
        [saga_id],
    )
    admin.execute(
        "INSERT INTO saga_logs (saga_id, step_name, action, status, created_at) "
        "VALUES (%s, 'TakePayment', 'act', 'STARTED', now() - interval '1 hour')",
        [saga_id],
    )
    return saga_id


@contextmanager
def role(admin: psycopg.Connection, database: Database, *grants: str) -> Iterator[str]:
    """Make a role with these privileges, and yield a URL with which it connects."""
    name = f"viewer_{uuid4().hex[:8]}"
    admin.execute(SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(Identifier(name), Literal("secret")))
    for grant in grants:
        admin.execute(SQL(grant + " TO {}").format(Identifier(name)))
    yield database.address.set(username=name, password="secret").render_as_string(hide_password=False)  # noqa: S106 - of the test's own
    admin.execute(SQL("DROP OWNED BY {}").format(Identifier(name)))
    admin.execute(SQL("DROP ROLE {}").format(Identifier(name)))


class TestCommand:
    @pytest.mark.parametrize("driver", DRIVERS)
    def test_it_shows_sagas(self, database: Database, saga_id: UUID, driver: str) -> None:
        """It listens on loopback, says where, shows sagas, keeps other hosts out, and ends when it is interrupted."""
        settings = ("--redact", "card", "--trace-url", "https://trace.test/{saga_id}", "--metrics")
        with serving(database.url(driver), *ANY_PORT, *settings) as (url, process):
            assert url.startswith("http://127.0.0.1:")
            html = Html(httpx.get(url).text)
            html.check()
            assert "1 saga needs attention, for 1 reason" in html.words
            assert f"{database.name} @ " in html.words
            html = Html(httpx.get(f"{url}sagas/{saga_id}?context=show").text)
            assert "Began TakePayment at" in html.words
            assert "[hidden]" in html.words
            assert f"https://trace.test/{saga_id}" in html.links
            assert "saga_store_in_doubt_steps 1.0" in httpx.get(f"{url}metrics").text
            assert httpx.get(url, headers={"Host": "evil.test"}).status_code == httpx.codes.BAD_REQUEST
            assert "server" not in httpx.get(url).headers
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
            assert process.returncode == Exit.INTERRUPTED
            assert err == "saga-store: interrupted\n"

    @pytest.mark.usefixtures("saga_id")
    async def test_below_a_prefix(self, database: Database) -> None:
        """Told of a prefix it works behind a proxy that strips it, and behind one that keeps it."""
        with serving(database.url("asyncpg"), *ANY_PORT, "--root-path", "/a/b") as (url, _):
            assert url.endswith("/a/b/")
            async with httpx.AsyncClient() as client:
                kept = await crawl(client, f"{url}?stale_after=1s", most=12)
                stripped = await crawl(client, f"{url.removesuffix('a/b/')}?stale_after=1s", most=12)
        assert set(kept.values()) == set(stripped.values()) == {200}
        assert all(found.startswith(url) for found in kept)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ((), "was read from there, line 1"),
            (("--archive", "{folder}"), "was read from there, line 1"),
            (("--archive", "memory://elsewhere"), "isn't where archives are read here"),
            (("--no-archives",), "archives aren't read here"),
        ],
    )
    def test_records_of_archived_sagas(
        self, database: Database, saga_id: UUID, tmp_path: Path, settings: tuple[str, ...], said: str
    ) -> None:
        """They are read from where the ledger says, only from where one says, or not at all."""
        url = database.url("psycopg")
        reason = ("--reason", "nobody wants it", "--by", "alice", "--yes")
        assert main(["saga", "give-up", "--url", url, str(saga_id), *reason]) == Exit.DONE
        assert main(["archive", "--url", url, "--to", str(tmp_path), "--failed", "0"]) == Exit.DONE
        given = [setting.format(folder=tmp_path) for setting in settings]
        with serving(url, *ANY_PORT, *given) as (address, _):
            html = Html(httpx.get(f"{address}sagas/{saga_id}").text)
            html.check()
            assert said in html.words
            assert ("by alice" in html.words) == ("read from there" in said)

    def test_the_database_goes_away(self, empty_database: Database) -> None:
        """Without tables, and without a database, there is a page that says so, and no traceback."""
        with serving(empty_database.url("psycopg"), *ANY_PORT) as (url, _):
            response = httpx.get(url)
            assert response.status_code == httpx.codes.INTERNAL_SERVER_ERROR
            assert "run `saga-store upgrade`" in Html(response.text).words
            elsewhere = empty_database.address.set(database="postgres").render_as_string(hide_password=False)
            with psycopg.connect(elsewhere, autocommit=True) as admin:
                admin.execute(SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(Identifier(empty_database.name)))
                ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
                admin.execute(ended, [empty_database.name])
            response = httpx.get(url, timeout=30)
            assert response.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert "The database can't be asked now" in Html(response.text).words
            assert "Traceback" not in response.text

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (("--bind", "192.0.2.1:0"), Exit.FAILED, "can't listen at 192.0.2.1:0: "),
            ((*ANY_PORT, "--trace-url", "javascript:x"), Exit.USAGE, "trace_url must begin by https://"),
            ((*ANY_PORT, "--allow-host", "a b"), Exit.USAGE, "allowed_hosts must be names or addresses"),
        ],
    )
    def test_bad_settings(
        self,
        database: Database,
        capsys: pytest.CaptureFixture[str],
        arguments: tuple[str, ...],
        code: Exit,
        said: str,
    ) -> None:
        """What can't be used is one line that says which and why."""
        assert main(["web", "--url", database.url("psycopg"), *arguments]) == code
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize("given", ["8765", "localhost:99999", ":1", "localhost:"])
    def test_no_address(self, capsys: pytest.CaptureFixture[str], given: str) -> None:
        """What is no address to listen at is said with one that is."""
        with pytest.raises(SystemExit) as exits:
            main(["web", "--bind", given])
        assert exits.value.code == Exit.USAGE
        assert f"{given!r} is no HOST:PORT; write it like 127.0.0.1:8765" in capsys.readouterr().err

    def test_a_port_that_is_taken(self, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
        """A port on which somebody else listens is said, and where to say another."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            bind = f"127.0.0.1:{taken.getsockname()[1]}"
            assert main(["web", "--url", database.url("psycopg"), "--bind", bind]) == Exit.FAILED
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"can't listen at {bind}: " in err
        assert "--bind says where else" in err

    def test_everywhere(self, database: Database) -> None:
        """Bound to all addresses it warns, and answers to no other host than those that are named."""
        with serving(database.url("psycopg"), "--bind", f"{EVERYWHERE}:0", "--allow-host", "ops.test") as (
            url,
            process,
        ):
            local = url.replace(EVERYWHERE, "127.0.0.1")
            assert httpx.get(local, headers={"Host": "ops.test"}).status_code == httpx.codes.OK
            assert httpx.get(local, headers={"Host": "other.test"}).status_code == httpx.codes.BAD_REQUEST
            process.terminate()
            _, err = process.communicate(timeout=30)
            assert "it asks nobody who they are" in err


class TestExtra:
    @pytest.mark.parametrize("missing", ["jinja2", "uvicorn"])
    def test_what_is_missing_is_named(self, missing: str) -> None:
        """Without the extra the command says in one line which it is."""
        program = (
            f"import sys; sys.modules[{missing!r}] = None; from saga_store.cli import main; sys.exit(main(['web']))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == Exit.FAILED
        assert done.stderr.count("\n") == 1
        assert missing in done.stderr
        assert "pip install saga-store[web]" in done.stderr

    def test_the_wheel_has_all_of_it(self, installed: Environment, database: Database, saga_id: UUID) -> None:
        """Templates and style come with the wheel: its command shows a saga in full."""
        program = (str(installed.programs / "saga-store"), "web")
        with serving(database.url("psycopg"), *ANY_PORT, program=program) as (url, _):
            html = Html(httpx.get(f"{url}sagas/{saga_id}").text)
            assert "Began TakePayment at" in html.words
            [style] = [link for link in html.links if "style.css" in link]
            assert httpx.get(httpx.URL(url).join(f"sagas/{style}")).status_code == httpx.codes.OK
        assert (installed.packages / "saga_store" / "web" / "templates" / "base.html").is_file()


class TestCopiedCommands:
    def test_it_does_what_it_says(self, database: Database, admin: psycopg.Connection, tmp_path: Path) -> None:
        """Given to a shell as it stands on the page, a command settles that step, and nothing else happens."""
        canary = tmp_path / "canary"
        step, saga_id = f"'; touch {canary} #`touch {canary}`$(touch {canary})\n\u202e", uuid4()
        html = asyncio.run(in_doubt(database, saga_id, step))
        command = next(piece for piece in html.pieces if piece.startswith("saga-store saga settle "))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"DATABASE_URL": database.url("psycopg"), "PATH": path}
        for code in (Exit.DONE, Exit.REFUSED):
            done = subprocess.run(
                ["sh", "-c", command],  # noqa: S607 - a shell, as one has it
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                cwd=tmp_path,
            )
            assert done.returncode == code, done.stderr
        assert not list(tmp_path.iterdir())
        found = "SELECT status FROM saga_logs WHERE saga_id = %s AND step_name = %s ORDER BY id"
        assert admin.execute(found, [saga_id, step]).fetchall() == [("STARTED",), ("COMPLETED",)]


async def in_doubt(database: Database, saga_id: UUID, step: str) -> Html:
    """Make a saga of which this step is in doubt, and return its page."""
    async with engine_on(database.url("psycopg")) as engine:
        storage = SqlAlchemySagaStorage(engine)
        await storage.create_saga(saga_id, step, {})
        await storage.log_step(saga_id, step, "act", SagaStepStatus.STARTED)
    _, html = await seen(database.url(), "psycopg", f"/sagas/{saga_id}")
    return html


class TestRoles:
    @pytest.mark.parametrize("driver", DRIVERS)
    async def test_select_is_enough(
        self, admin: psycopg.Connection, database: Database, saga_id: UUID, driver: str
    ) -> None:
        """A role that may only read sees every page."""
        with role(admin, database, "GRANT SELECT ON saga_executions, saga_logs") as viewer:
            for path in ("/", "/sagas", f"/sagas/{saga_id}?context=show", "/interventions"):
                status, html = await seen(viewer, driver, path)
                assert status == httpx.codes.OK, html.words

    @pytest.mark.usefixtures("saga_id")
    async def test_a_privilege_that_is_lacking_is_named(self, admin: psycopg.Connection, database: Database) -> None:
        """A role that may see sagas but not their histories hears which grant it lacks."""
        with role(admin, database, "GRANT SELECT ON saga_executions") as viewer:
            status, html = await seen(viewer, "psycopg", "/")
        assert status == httpx.codes.INTERNAL_SERVER_ERROR
        assert "GRANT SELECT ON saga_executions, saga_logs" in html.words


async def seen(url: str, driver: str, path: str) -> tuple[int, Html]:
    """Get a page of an app on this database."""
    async with engine_on(url.replace("postgresql", f"postgresql+{driver}", 1)) as engine:
        transport = httpx.ASGITransport(app=create_app(SqlAlchemySagaStorage(engine)))
        async with httpx.AsyncClient(transport=transport, base_url="http://ops.test") as client:
            response = await client.get(path)
    return response.status_code, Html(response.text)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_big_rows(make_engine: Callable[..., AsyncEngine], driver: str) -> None:
    """Of 5 MB of details in each entry, and of a big context, a page loads no more than it shows."""
    storage = SqlAlchemySagaStorage(make_engine(driver))
    saga_id = uuid4()
    await storage.create_saga(saga_id, "order", {"numbers": list(range(1_000_000))})
    for _ in range(3):
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.FAILED, "\u202e<b>" * 1_250_000)
    transport = httpx.ASGITransport(app=create_app(storage))
    async with httpx.AsyncClient(transport=transport, base_url="http://ops.test") as client:
        response = await client.get(f"/sagas/{saga_id}?context=show")
    assert response.status_code == httpx.codes.OK
    assert len(response.content) < 100_000
    html = Html(response.text)
    html.check()
    assert "It isn't shown: it is too big" in html.words
