"""Narrow, closed and full outputs, and databases in other encodings: no traceback, and exit codes that stay true."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from saga_store import schema
from saga_store.cli import main
from saga_store.cli.exits import Exit
from tests.databases import Database
from tests.test_grants import role_on

DRIVERS = ["psycopg", "asyncpg"]


def typed(line: str, url: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a shell, with what the shell does to its descriptors."""
    return subprocess.run(
        ["bash", "-c", f"exec '{sys.executable}' -m saga_store {line}"],  # noqa: S607 - whichever bash there is
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "DATABASE_URL": url} | environment,
    )


def has_tables(database: Database) -> bool:
    with psycopg.connect(database.url()) as connection:
        return connection.execute("SELECT to_regclass('saga_logs') IS NOT NULL").fetchone() == (True,)


class TestOutputs:
    @pytest.mark.parametrize(
        "where", [">/dev/full", ">&-", "2>/dev/full", "2>&-", ">/dev/full 2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"]
    )
    def test_work_that_was_done_is_no_failure(self, empty_database: Database, where: str) -> None:
        """An upgrade whose last line couldn't be printed is an upgrade, and the next one has nothing to do."""
        done = typed(f"upgrade {where}", empty_database.url())
        assert done.returncode == Exit.DONE
        assert has_tables(empty_database)
        assert "Traceback" not in done.stdout + done.stderr
        if "2>" not in where:
            assert "saga-store: what was done couldn't be printed: stdout" in done.stderr
        assert typed(f"check {where}", empty_database.url()).returncode == Exit.DONE
        assert typed(f"downgrade base {where} --json", empty_database.url()).returncode == Exit.DONE
        assert typed(f"check {where}", empty_database.url()).returncode == Exit.BEHIND

    @pytest.mark.parametrize(
        ("line", "code"),
        [
            ("sql {}", Exit.FAILED),
            ("history {}", Exit.FAILED),
            ("grants --role app {}", Exit.FAILED),
            ("current {}", Exit.FAILED),
            ("check --json {}", Exit.FAILED),
            ("bogus {}", Exit.USAGE),
            ("upgrade --schema= {}", Exit.USAGE),
        ],
    )
    @pytest.mark.parametrize("where", [">/dev/full", ">&-", ">/dev/full 2>/dev/full", ">&- 2>&-"])
    def test_what_was_only_to_be_read_fails(self, line: str, code: Exit, where: str) -> None:
        """A script of which a part is missing is none; and what goes wrong is told where somebody can read it."""
        done = typed(line.format(where))
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        if "2>" not in where:
            assert done.stderr

    def test_a_narrow_output(self, empty_database: Database) -> None:
        """Escapes for a person; but no script in which a name has become another."""
        ascii_only = {"PYTHONIOENCODING": "ascii:strict"}
        done = typed("upgrade --schema schön --create-schema", empty_database.url(), **ascii_only)
        assert done.returncode == Exit.DONE, done.stderr
        done = typed("grants --check --role größe --schema schön", empty_database.url(), **ascii_only)
        assert (done.returncode, done.stdout.splitlines()[0]) == (
            Exit.DRIFTED,
            r"gr\xf6\xdfe: there is no role of this name",
        )
        done = typed("grants --role größe", **ascii_only)
        assert (done.returncode, done.stdout) == (Exit.FAILED, "")
        assert r"stdout is ascii, which has no '\xf6': set PYTHONIOENCODING=utf-8" in done.stderr
        assert typed("grants --role größe --json", **ascii_only).returncode == Exit.DONE
        done = typed("downgrade base --schema größer", empty_database.url(), **ascii_only)
        assert done.returncode == Exit.FAILED
        assert "Traceback" not in done.stderr

    def test_a_reader_who_has_had_enough(self, empty_database: Database) -> None:
        """What was done is done; and nobody is told who doesn't listen."""
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-m", "saga_store", "upgrade", "--url", empty_database.url()],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(writing)
        assert done.returncode == Exit.DONE
        assert "saga-store:" not in done.stderr


class TestUsage:
    @pytest.mark.parametrize(
        "verb", ["upgrade", "downgrade base", "check", "current", "sql", "adopt", "grants --role a"]
    )
    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("", "must not be empty"),
            ("x" * 64, "must be at most 63 bytes long"),
            ("$user", "has a meaning of its own in a search_path"),
            ("pg_temp", "has a meaning of its own in a search_path"),
            ("\udcff", "must be text that UTF-8 can hold"),
        ],
    )
    def test_what_can_be_no_schema(self, verb: str, name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Wrong usage, before anything is done."""
        with pytest.raises(SystemExit) as info:
            main([*verb.split(), "--schema", name])
        assert info.value.code == Exit.USAGE
        assert says in capsys.readouterr().err


@contextmanager
def encoded(database: Database, encoding: str) -> Iterator[Database]:
    """A database of this encoding, and of no locale, beside another one."""
    name = Identifier(f"saga_test_{uuid4().hex[:16]}")
    with psycopg.connect(database.url(), autocommit=True) as admin:
        how = SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C'")
        admin.execute(how.format(name, encoding))
        try:
            yield Database(database.address.set(database=name._obj[0]))  # noqa: SLF001 - its text
        finally:
            admin.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.mark.parametrize("driver", DRIVERS)
class TestEncodings:
    @pytest.mark.parametrize(
        ("encoding", "name"), [("SQL_ASCII", "größe"), ("LATIN1", "größe"), ("EUC_JP", "注文"), ("UTF8", "注文 größe")]
    )
    def test_every_verb(self, empty_database: Database, driver: str, encoding: str, name: str) -> None:
        """In a schema and with a role whose names the encoding holds."""
        with encoded(empty_database, encoding) as database, role_on(empty_database, f"{name}{uuid4().hex[:8]}") as role:
            url = database.url(driver)
            verbs: list[Callable[[], object]] = [
                lambda: schema.upgrade(url, schema=name, create_schema=True),
                lambda: schema.check(url, schema=name).state is schema.State.CURRENT,
                lambda: schema.current(url, schema=name),
                lambda: schema.check_grants(url, role, schema=name),
                lambda: schema.downgrade(url, "base", schema=name),
            ]
            assert [bool(verb()) for verb in verbs] == [True] * len(verbs)

    def test_a_name_that_the_database_cannot_hold(
        self, empty_database: Database, driver: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with encoded(empty_database, "LATIN1") as database:
            assert (
                main(["upgrade", "--schema", "注文", "--create-schema", "--url", database.url(driver)]) == Exit.FAILED
            )
        said = capsys.readouterr().err
        assert "has no equivalent in encoding" in said
        assert "Traceback" not in said


def test_an_engine_of_ones_own_in_sql_ascii(empty_database: Database) -> None:
    """psycopg returns bytes there unless it is told otherwise, which SQLAlchemy can't do with: say what to tell it."""
    with encoded(empty_database, "SQL_ASCII") as database:
        engine = create_engine(database.url("psycopg"), poolclass=NullPool)
        with pytest.raises(schema.MigrationError, match=r"create_engine\(\.\.\., client_encoding='utf8'\)"):
            schema.check(engine)
        engine = create_engine(database.url("psycopg"), poolclass=NullPool, client_encoding="utf8")
        assert schema.check(engine).state is schema.State.BEHIND
