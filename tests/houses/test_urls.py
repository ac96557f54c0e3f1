"""URLs as libpq, SQLAlchemy, hosters and shells make them: they work, or are refused in a line that shows no secret."""

import io
import logging
import os
import ssl
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg
import pytest
from psycopg.sql import SQL, Identifier, Literal
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import adoption, schema
from saga_store.cli import main
from saga_store.schema.connections import connected
from saga_store.schema.drivers import connect_arguments
from saga_store.schema.settings import MigrationError
from saga_store.schema.urls import Address
from tests.databases import Database

ROOT = Path(__file__).parents[2]
DRIVERS = ["psycopg", "asyncpg"]
CANARY = "c4n4ry"

# What isn't understood may be a part of a password wherever it stands.
REFUSED = [
    # no URL at all
    "{c}",
    "{c}@host/db",
    "$DATABASE_URL{c}",
    "'{c}",
    "host=localhost user=me password={c}",
    "://{c}",
    "{c}://me:pw@host/db",
    "mysql://me:{c}@host/db",
    "sqlite:///{c}",
    "jdbc:postgresql://host/db?user=me&password={c}",
    "https://me:{c}@host/db",
    "postgresql:me:{c}@host/db",
    "postgresql:/me:{c}@host/db",
    "postgresql+psycopg2://me:{c}@host/db",
    "postgresql+{c}://me:pw@host/db",
    "postgresql+://me:{c}@host/db",
    "postgresql+asyncpg+{c}://me:pw@host/db",
    "POSTGRESQL://me:{c}@host/db",
    # a password that isn't encoded
    "{s}me:12/{c}@host/db",
    "{s}me:{c}?x@host/db",
    "{s}me:?{c}@host/db",
    "{s}me:x?{c}=y@host/db",
    "{s}me:x?user={c}@host/db&z",
    "{s}me:12?{c}@host/db",
    "{s}me:x@y/{c}@host/db",
    "{s}me:{c}/x?y@host/db",
    "{s}me:x/y?{c}@host/db",
    "{s}me/x:{c}@host/db",
    "{s}me?x:{c}@host/db",
    "{s}{c}/x@host/db",
    "{s}me:pw@host/{c}@db",
    "{s}me:[{c}@host]/db",
    "{s}me:pw@[{c}/db",
    "{s}me:pw@]{c}[/db",
    "{s}me:p@{c}:w:x/db",
    "{s}me:p\n{c}@host/db",
    "{s}me:p\t{c}@host/db",
    "{s}me:p\x00{c}@host/db",
    "{s}me:{c}%00@host/db",
    "{s}me:{c}%ff@host/db",
    # a variable that wasn't set, or was set to something else
    "{s}:{c}@host/db",
    "{s}me:{c}@host:$PORT/db",
    "{s}me:{c}@host:${{PORT}}/db",
    "{s}me:{c}@$HOST/db",
    "{s}me:{c}@$HOST:5432/db",
    "{s}me:{c}@${{HOST:-{c}}}/db",
    "{s}me:{c}@host/db?sslmode=",
    "{s}me:pw@host/db?password=&application_name={c}",
    "{s}me:pw@host/db?sslmode={c}",
    "{s}me:pw@host/db?sslmode=$MODE{c}",
    "{s}me:pw@host/db?={c}",
    "{s}me:pw@host/db?{c}",
    "{s}me:pw@host/db?{c}=",
    "{s}me:pw@host/db?{c}=x",
    "{s}me:{c}@host/db?password",
    "{s}me:pw@host/db?Password={c}",
    "{s}me:pw@host/db?passwd={c}",
    "{s}me:pw@host/db?sslpasswort={c}",
    "{s}me:pw@host/db?token={c}",
    "{s}me:pw@host/db?sslmode=require&&{c}",
    "{s}me:pw@host/db?sslmode=require;password={c}",
    "{s}me:pw@host/db??password={c}",
    "{s}me:pw@host/db?password={c}?x",
    "{s}me:pw@host/db?password={c}%00",
    "{s}me:pw@host/db?password={c}%ff",
    # hosts and ports
    "{s}me:pw@host:{c}/db",
    "{s}me:{c}@host:/db:x@y",
    "{s}me:{c}@host:0/db",
    "{s}me:{c}@host:65536/db",
    "{s}me:{c}@host:-1/db",
    "{s}me:{c}@host:5432x/db",
    "{s}me:{c}@host: 5432/db",
    "{s}me:{c}@host:5432:5433/db",
    "{s}me:{c}@::1:5432/db",
    "{s}me:{c}@[::1/db",
    "{s}me:{c}@[::1]5432/db",
    "{s}me:{c}@[{c}::x]/db",
    "{s}me:{c}@ho st/db",
    "{s}me:{c}@host#x/db",
    "{s}me:{c}@host;x/db",
    "{s}me:{c}@h1,,h2/db",
    "{s}me:{c}@h1:1,h2:{c}/db",
    "{s}me:{c}@h1,h2/db?port=1,2,3",
    "{s}me:{c}@host/db?port={c}",
    "{s}me:{c}@host/db?port=1,{c}",
    "{s}me:{c}@/db?host=h1:{c}",
    "{s}me:{c}@/db?host=h1&host={c}:x",
    "{s}me:{c}@/db?host=@{c}",
    "{s}me:{c}@/db?host=a b",
    "{s}me:{c}@/db?hostaddr={c}!",
    # values that a driver would show
    "{s}me:pw@host/db?connect_timeout={c}",
    "{s}me:pw@host/db?connect_timeout=1&keepalives={c}",
    "{s}me:pw@host/db?tcp_user_timeout={c}",
    "{s}me:pw@host/db?target_session_attrs={c}",
    "{s}me:pw@host/db?channel_binding={c}",
    "{s}me:pw@host/db?gssencmode={c}",
    "{s}me:pw@host/db?sslnegotiation={c}",
    "{s}me:pw@host/db?load_balance_hosts={c}",
    "{s}me:pw@host/db?ssl={c}",
    "{s}me:pw@host/db?sslcertmode={c}",
    "postgresql+psycopg://me:pw@host/db?prepare_threshold={c}",
    "postgresql+psycopg://me:pw@host/db?command_timeout={c}",
    "postgresql+asyncpg://me:pw@host/db?command_timeout={c}",
    "postgresql+asyncpg://me:pw@host/db?statement_cache_size={c}",
    "postgresql+asyncpg://me:pw@host/db?prepare_threshold={c}",
    # what asyncpg has no word for
    "postgresql+asyncpg://me:{c}@host/db?channel_binding=require",
    "postgresql+asyncpg://me:{c}@host/db?requirepeer={c}",
    "postgresql+asyncpg://me:{c}@host/db?require_auth={c}",
    "postgresql+asyncpg://me:pw@host/db?oauth_client_secret={c}",
    "postgresql+asyncpg://me:{c}@host/db?hostaddr=127.0.0.1",
]

# These reach the driver, and then nobody: their secrets stay secret all the same.
UNREACHABLE = [
    "{s}me:{c}@127.0.0.1:1/db",
    "{s}me:{c}@x@127.0.0.1:1/db",
    "{s}me:x@{c}@127.0.0.1:1/db",
    "{s}me:{c}:x@127.0.0.1:1/db",
    "{s}me:x/{c}@127.0.0.1:1/db",
    "{s}me:{c}%@127.0.0.1:1/db",
    "{s}me:{c}#@127.0.0.1:1/db",
    "{s}me:{c}@127.0.0.1:1,127.0.0.1:2/db",
    "{s}me:{c}@[::1]:1/db",
    "{s}me:{c}@%2Fnowhere/db",
    "{s}me:{c}@/db?host=/nowhere",
    "{s}me@127.0.0.1:1/db?password={c}",
    "{s}127.0.0.1:1/db?user=me@tenant&password={c}@x",
    "{s}me@127.0.0.1:1/db?sslpassword={c}",
    "{s}me:{c}@127.0.0.1:1/db?sslmode=disable",
    "{s}me:{c}@127.0.0.1:1/db?sslmode=verify-full&sslrootcert=/nowhere",
    "{s}me:{c}@127.0.0.1:1/db?options=-c%20search_path%3D{c}",
    '"{s}me:{c}@127.0.0.1:1/db"',
    "'{s}me:{c}@127.0.0.1:1/db'\n",
]

SCHEMES = ["postgresql+psycopg://", "postgresql+asyncpg://"]


def filled(templates: list[str]) -> list[str]:
    # An address needs no look-up by those that SQLAlchemy can read.
    at = [template.replace("@host", "@127.0.0.1") for template in templates]
    urls = [template.format(s=scheme, c=CANARY) for template in at for scheme in SCHEMES]
    return list(dict.fromkeys(urls))


def said_by(call: Callable[[], object]) -> str:
    """All that a call would leave on a screen or in a log, the traceback of what it raised included."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            call()
    except MigrationError as exc:
        said.write(f"MigrationError: {exc}\n{exc!r}\n{exc.args}")
        said.write("".join(traceback.format_exception(exc)))
    except SystemExit as exc:
        said.write(f"exit {exc.code:d}")
    finally:
        logging.getLogger().removeHandler(handler)
    return said.getvalue()


def typed(*line: str) -> Callable[[], object]:
    return lambda: sys.exit(main(line))


def by_url_object(url: str) -> object:
    """What SQLAlchemy makes of it, rightly or not."""
    with suppress(Exception):
        parsed = make_url(url)
        return schema.check(parsed)
    raise MigrationError("SQLAlchemy can't read it")


def by_engine(url: str) -> object:
    """An engine of an application's, over psycopg: asyncpg has none but async ones."""
    engine = None
    with suppress(Exception):
        engine = create_engine(url.replace("postgresql+asyncpg:", "postgresql+psycopg:"))
    if engine is None:
        raise MigrationError("SQLAlchemy can't read it")
    return schema.current(engine)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the run's own database nor its services."""
    for name in [name for name in os.environ if name == "DATABASE_URL" or name.startswith("PG")]:
        monkeypatch.delenv(name)


class TestNothingSecretIsShown:
    def test_there_are_a_hundred(self) -> None:
        assert len(REFUSED) >= 100
        assert all(CANARY in url for url in filled([*REFUSED, *UNREACHABLE]))

    @pytest.mark.parametrize(
        "entry",
        [
            schema.upgrade,
            lambda url: schema.downgrade(url, "base"),
            lambda url: schema.stamp(url, "head"),
            schema.current,
            schema.check,
            adoption.plan,
            by_url_object,
            by_engine,
        ],
        ids=["upgrade", "downgrade", "stamp", "current", "check", "adopt", "URL", "Engine"],
    )
    def test_by_python(self, entry: Callable[[str], object]) -> None:
        """By no function, neither in what it raises nor in what that was raised from."""
        for url in filled(REFUSED):
            said = said_by(lambda url=url: entry(url))  # type: ignore[misc] # bound at once
            assert "MigrationError: " in said, url
            assert CANARY not in said, url

    def test_what_cannot_be_reached(self) -> None:
        for url in filled(UNREACHABLE):
            said = said_by(typed("saga", "stats", "--url", url))
            assert said.startswith("saga-store: ")
            assert CANARY not in said, url
            for entry in (schema.check, by_engine):
                said = said_by(lambda url=url, entry=entry: entry(url))  # type: ignore[misc] # bound at once
                assert "MigrationError: " in said, url
                assert CANARY not in said, url

    @pytest.mark.parametrize(
        "verb",
        [
            ["upgrade"],
            ["downgrade", "base"],
            ["current"],
            ["check"],
            ["adopt"],
            ["grants", "--check", "--role=a"],
            ["saga", "stats"],
        ],
        ids=" ".join,
    )
    @pytest.mark.parametrize("how", ["option", "environment", "json"])
    def test_by_the_command(self, verb: list[str], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """In one line, and the command exits with 1."""
        for url in filled(REFUSED):
            if how != "option" and "\0" not in url:
                monkeypatch.setenv("DATABASE_URL", url)
            option = [f"--url={url}"] if how == "option" or "\0" in url else []
            said = said_by(typed(*verb, *option, *(["--json"] if how == "json" else [])))
            assert said.startswith("saga-store: "), url
            assert said.count("\n") == (2 if how == "json" else 1), url
            assert said.endswith("\nexit 1"), url
            assert CANARY not in said, url

    @pytest.mark.parametrize(
        "line",
        [
            ["{url}"],
            ["upgrade", "{url}"],
            ["downgrade", "{url}"],
            ["stamp", "{url}"],
            ["current", "{url}"],
            ["current", "--schema", "{url}"],
            ["current", "--schema={url}"],
            ["upgrade", "--lock-wait", "{url}"],
            ["sql", "{url}"],
            ["grants", "--role", "{url}"],
            ["check", "--uri={url}"],
            ["check", "--url", "postgresql://h/d", "{url}"],
        ],
        ids=" ".join,
    )
    def test_where_no_url_belongs(self, line: list[str]) -> None:
        """A URL that was put in a wrong place isn't repeated either."""
        for url in ("postgresql://me:c4n4ry@h/d", "mysql://me:c4n4ry@h/d"):
            said = said_by(typed(*[word.format(url=url) for word in line]))
            assert said.endswith("exit 2"), said
            assert "behind --url" in said
            assert CANARY not in said

    @pytest.mark.parametrize(
        "url",
        ["postgresql://me:12/c4n4ry@h/d", "postgresql://me:c4n4ry@h:$PORT/d", "'postgresql://me:c4n4ry@127.0.0.1:1/d'"],
    )
    def test_by_alembic(self, url: str) -> None:
        """One line, and no traceback."""
        for line in (["upgrade", "head"], ["-x", f"schema={url}", "current"], ["-x", f"lock_wait={url}", "current"]):
            done = subprocess.run(
                [sys.executable, "-m", "alembic", *line],
                capture_output=True,
                text=True,
                check=False,
                cwd=ROOT,
                env={"PATH": os.environ["PATH"], "DATABASE_URL": url},
            )
            assert done.returncode != 0
            assert CANARY not in done.stdout + done.stderr
            assert "Traceback" not in done.stderr
            # Alembic prints it, and logs it as well.
            assert [len(said.splitlines()) for said in (done.stdout, done.stderr)] == [1, 1]

    def test_the_address_itself(self) -> None:
        """It can be logged."""
        address = Address.read("postgresql://me:c4n4ry@h/d?sslpassword=c4n4ry&options=-cx.y%3Dc4n4ry")
        assert str(address) == "d at h as me, over psycopg"
        assert repr(address) == "Address(driver='psycopg')"
        hidden = address.hide('FATAL: invalid value for parameter "x.y": "c4n4ry"\n  and more')
        assert hidden == 'FATAL: invalid value for parameter "x.y": "***" and more'

    @pytest.mark.parametrize("driver", DRIVERS)
    def test_what_the_server_repeats(self, empty_database: Database, driver: str) -> None:
        """A server quotes a setting that it refuses."""
        url = f"{empty_database.url(driver)}?options=-cstatement_timeout%3Dc4n4ry"
        assert CANARY not in said_by(typed("saga", "stats", "--url", url))
        said = said_by(lambda: schema.check(url))
        assert 'invalid value for parameter "statement_timeout": "***"' in said
        assert CANARY not in said


def where(url: str | URL) -> tuple[object, ...]:
    """Whom the server saw, and how."""
    query = "SELECT current_user, current_database(), current_schema(), current_setting('application_name')"
    return connected(url, lambda connection: tuple(connection.execute(text(query)).one()))


@pytest.mark.parametrize("driver", DRIVERS)
class TestWhatWorks:
    """Against a real server, over both drivers."""

    @pytest.fixture
    def secretive(self, empty_database: Database) -> Iterator[Database]:
        """A role whose password has everything in it that a URL is fond of."""
        name, password = f"url_{os.urandom(4).hex()}", "p@s:s#[%]&=+ w?/rd"
        with psycopg.connect(empty_database.url(), autocommit=True) as admin:
            admin.execute(SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(Identifier(name), Literal(password)))
            yield Database(empty_database.address.set(username=name, password=password))
            admin.execute(SQL("DROP ROLE {}").format(Identifier(name)))

    def test_forms(
        self, empty_database: Database, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One server, named in all the ways that there are."""
        at, scheme = empty_database.address, f"postgresql+{driver}://"
        user, password, host, port, name = (
            quote(str(part or ""), safe="") for part in (at.username, at.password, at.host, at.port, at.database)
        )
        login = f"{user}:{password}" if password else user
        service = tmp_path / "services"
        lines = {"host": at.host, "port": at.port, "dbname": at.database, "user": at.username, "password": at.password}
        service.write_text(
            "[shop]\n" + "".join(f"{key}={value}\n" for key, value in lines.items() if value) + "application_name=a%b\n"
        )
        monkeypatch.setenv("PGSERVICEFILE", str(service))
        secret = f"&password={password}" if password else ""
        for url in [
            f"{scheme}{login}@{host}:{port}/{name}",
            f"  '{scheme}{login}@{host}:{port}/{name}'\n",
            f'"{scheme}{login}@{host}:{port}/{name}"',
            f"{scheme}{login}@{host}:{port}/{name}?",
            f"{scheme}{login}@127.0.0.1:1,{host}:{port}/{name}",
            f"{scheme}{login}@127.0.0.1:1,{host}:{port}/{name}?target_session_attrs=read-write",
            f"{scheme}/?host={host}&port={port}&user={user}&dbname={name}{secret}",
            f"{scheme}/{name}?host={host}:{port}&user={user}{secret}",
            f"{scheme}{login}@/{name}?host=127.0.0.1:1&host={host}:{port}",
            f"{scheme}{login}@/{name}?host=127.0.0.1,{host}&port=1,{port}",
            f"{scheme}{login}@{host}:{port}/{name}?sslmode=prefer&connect_timeout=10&keepalives=1&channel_binding=prefer",
            f"{scheme}{login}@{host}:{port}/{name}?ssl=false&gssencmode=disable&client_encoding=utf8",
            f"{scheme}/?service=shop",
        ]:
            assert where(url)[:2] == (at.username, at.database), url
        assert where(f"{scheme}/?service=shop&application_name=mine")[3] == "mine"
        assert where(f"{scheme}/?service=shop")[3] == "a%b"

    def test_settings_reach_the_server(self, empty_database: Database, driver: str) -> None:
        """``options`` and the application's name, as libpq sends them."""
        with psycopg.connect(empty_database.url(), autocommit=True) as admin:
            admin.execute("CREATE SCHEMA shop")
        query = urlencode({"options": "-c search_path=shop -c statement_timeout=90s", "application_name": "deploy job"})
        assert where(f"{empty_database.url(driver)}?{query}")[2:] == ("shop", "deploy job")
        assert schema.upgrade(f"{empty_database.url(driver)}?{query}")
        with psycopg.connect(empty_database.url()) as admin:
            assert admin.execute("SELECT to_regclass('shop.saga_logs') IS NOT NULL").fetchone() == (True,)

    def test_a_password_with_everything_in_it(self, secretive: Database, driver: str) -> None:
        """As an object, as SQLAlchemy writes it, and raw, as far as it is clear where it ends."""
        at = secretive.address.set(drivername=f"postgresql+{driver}")
        place = f"{at.host}:{at.port}/{at.database}"
        for url in (
            at,
            at.render_as_string(hide_password=False),
            f"postgresql+{driver}://{at.username}:p@s:s#[%]&=+ w%3F%2Frd@{place}",
        ):
            assert Address.read(url).said["password"] == at.password
            assert where(url)[0] == at.username


def test_a_raw_slash_in_a_password() -> None:
    """SQLAlchemy takes it, so that the application's own URL does for its migrations."""
    for url, password in [
        ("postgresql://me:pa/ss+w@h:1/d", "pa/ss+w"),
        ("postgresql://me:p/a/s@s@h/d", "p/a/s@s"),
        ("postgresql://me:1a/2@h", "1a/2"),
    ]:
        said = Address.read(url).said
        assert (said["user"], said["password"], said["host"]) == ("me", password, "h")


def test_any_name_of_a_database(empty_database: Database) -> None:
    """Percent-encoded in text; and as an object, unless it looks as if a password had been cut in two."""
    name = f"{os.urandom(4).hex()} %/:?#é"
    for database in (name, f"{name}@x"):
        with psycopg.connect(empty_database.url(), autocommit=True) as admin:
            admin.execute(SQL("CREATE DATABASE {}").format(Identifier(database)))
            try:
                for driver in DRIVERS:
                    url = empty_database.address.set(drivername=f"postgresql+{driver}", database="")
                    text = url.render_as_string(hide_password=False).rstrip("/")
                    assert where(f"{text}/{quote(database, safe='')}")[1] == database
                    if "@" not in database:
                        assert where(url.set(database=database))[1] == database
            finally:
                admin.execute(SQL("DROP DATABASE {}").format(Identifier(database)))


def test_another_database_by_an_engine() -> None:
    with pytest.raises(MigrationError, match="needs PostgreSQL, and this is sqlite: pass another Engine"):
        schema.check(create_engine("sqlite://"))


@pytest.mark.parametrize("driver", DRIVERS)
async def test_an_async_engine_that_gets_no_connection(driver: str) -> None:
    """A readiness probe's, whose answer is logged; SQLAlchemy took the end of the password for the host."""
    for url in (f"postgresql+{driver}://me:c4n4ry@127.0.0.1:1/d", f"postgresql+{driver}://me:x@c4n4ry@127.0.0.1:1/d"):
        engine = create_async_engine(url)
        with pytest.raises(MigrationError, match="can't connect") as caught:
            await schema.acheck(engine)
        assert CANARY not in "".join(traceback.format_exception(caught.value))
        await engine.dispose()


class TestAsyncpg:
    """What is in libpq's words becomes asyncpg's, which are looked at, for no server here has TLS."""

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("sslmode=require", {"dsn": "postgresql://?sslmode=require"}),
            ("ssl=true", {"dsn": "postgresql://?sslmode=require"}),
            ("ssl=verify-full", {"dsn": "postgresql://?sslmode=verify-full"}),
            (
                "sslmode=verify-ca&sslrootcert=/ca.pem&sslpassword=a%26b",
                {"dsn": "postgresql://?sslmode=verify-ca&sslpassword=a%26b&sslrootcert=%2Fca.pem"},
            ),
            ("sslnegotiation=direct&sslmode=require", {"dsn": "postgresql://?sslmode=require", "direct_tls": True}),
            ("options=-csearch_path%3Da", {"server_settings": {"options": "-csearch_path=a"}}),
            ("fallback_application_name=x", {"server_settings": {"application_name": "x"}}),
            ("application_name=y&fallback_application_name=x", {"server_settings": {"application_name": "y"}}),
            ("target_session_attrs=primary", {"target_session_attrs": "primary"}),
            ("connect_timeout=7", {"timeout": 7}),
            ("connect_timeout=0", {"timeout": None}),
            ("command_timeout=1.5", {"command_timeout": 1.5}),
            ("passfile=/p", {"passfile": "/p"}),
            ("statement_cache_size=0", {"statement_cache_size": 0}),
        ],
    )
    def test_words(self, query: str, expected: dict[str, object]) -> None:
        address = Address.read(f"postgresql+asyncpg://me@h/d?{query}")
        base = {"user": "me", "database": "d", "host": ["h"]}
        assert connect_arguments(address) == base | expected

    def test_certificates_of_the_system(self) -> None:
        """libpq's ``sslrootcert=system`` is Python's default."""
        arguments = connect_arguments(
            Address.read("postgresql+asyncpg://me@h/d?sslmode=verify-full&sslrootcert=system")
        )
        assert arguments["ssl"].verify_mode is ssl.CERT_REQUIRED
        assert arguments["ssl"].check_hostname

    def test_a_service_that_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """asyncpg by itself would go to the default server."""
        monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "none"))
        with pytest.raises(MigrationError, match="there is no service 'shop'"):
            schema.check("postgresql+asyncpg:///?service=shop")
