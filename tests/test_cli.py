"""The command saga-store: what it prints where, how it exits, and that it needs no checkout."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psycopg
import pytest

from saga_store import schema
from saga_store.cli import main
from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.schema.session import KEY
from tests.databases import Database
from tests.programs import dump
from tests.wheel import Environment

IDS = [revision.revision for revision in schema.history()]
FIRST, HEAD = IDS[0], IDS[-1]


@pytest.fixture(autouse=True)
def database_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment of the run leaks in."""
    monkeypatch.delenv("DATABASE_URL", raising=False)


def run(*line: str | Path, url: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": url}
    return subprocess.run(
        [str(word) for word in line], capture_output=True, text=True, check=False, cwd="/", env=environment
    )


class TestVerbs:
    def test_up_check_and_down(self, empty_database: Database, capsys: pytest.CaptureFixture[str]) -> None:
        """Each says in a line what it did."""
        url = ["--url", empty_database.url()]
        for line, code, said in [
            (["upgrade", FIRST], Exit.DONE, f"applied {FIRST}"),
            (["check"], Exit.BEHIND, f"behind: the database is at {FIRST}, {HEAD} is needed"),
            (["upgrade"], Exit.DONE, f"applied {', '.join(IDS[1:])}"),
            (["upgrade"], Exit.DONE, "nothing to do"),
            (["current"], Exit.DONE, HEAD),
            (["check"], Exit.DONE, f"current: the database is at {HEAD}, {HEAD} is needed"),
            (["downgrade", FIRST], Exit.DONE, f"undid {', '.join(IDS[:0:-1])}"),
            (["stamp", "base"], Exit.DONE, "none"),
        ]:
            assert main([line[0], *url, *line[1:]]) == code
            assert capsys.readouterr().out == said + "\n"

    def test_check_tells_behind_from_ahead_from_drifted(
        self, database: Database, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """By its exit code, with a line for each difference."""
        with psycopg.connect(database.url(), autocommit=True) as connection:
            connection.execute("DROP INDEX ix_saga_logs_created_at")
            assert main(["check", "--url", database.url()]) == Exit.DRIFTED
            said = capsys.readouterr().out.splitlines()
            assert said[0].startswith("drifted: ")
            assert said[1].startswith("index saga_logs.ix_saga_logs_created_at: missing, should be")
            connection.execute("UPDATE saga_store_version SET version_num = 'saga_store_9999'")
            assert main(["check", "--url", database.url()]) == Exit.AHEAD
            assert "ahead: the database is at saga_store_9999" in capsys.readouterr().out

    def test_json_is_one_object(self, empty_database: Database, capsys: pytest.CaptureFixture[str]) -> None:
        url = ["--url", empty_database.url(), "--json"]
        found = []
        for verb in ("upgrade", "current", "check"):
            main([verb, *url])
            found.append(json.loads(capsys.readouterr().out))
        assert found == [
            {"applied": IDS},
            {"revision": HEAD},
            {"state": "current", "found": HEAD, "needed": HEAD, "differences": [], "notes": []},
        ]
        main(["history", "--json"])
        assert [line["revision"] for line in json.loads(capsys.readouterr().out)["revisions"]] == IDS

    def test_what_a_person_reads_meanwhile_goes_to_stderr(self, empty_database: Database) -> None:
        """So that stdout can be piped on."""
        done = run(sys.executable, "-m", "saga_store", "upgrade", url=empty_database.url())
        assert done.stdout == f"applied {', '.join(IDS)}\n"
        assert f"Running upgrade  -> {FIRST}" in done.stderr

    def test_sql_is_what_it_says_and_nothing_else(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["sql", f"{FIRST}:{HEAD}"]) == Exit.DONE
        assert capsys.readouterr().out == schema.sql(FIRST, HEAD).rstrip() + "\n"

    def test_a_reader_that_has_had_enough_is_no_error(self) -> None:
        """As in `saga-store sql | head`: no traceback."""
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "saga_store", "history"]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (Exit.FAILED, b"")


class TestFailures:
    def test_a_lock_that_is_not_to_be_had_has_a_code_of_its_own(
        self, empty_database: Database, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A pipeline may try again later."""
        key = KEY.format(schema="'public'")
        with psycopg.connect(empty_database.url(), autocommit=True) as other:
            other.execute(f"SELECT pg_advisory_lock({key})".encode())
            assert main(["upgrade", "--url", empty_database.url(), "--lock-wait", "0.1"]) == Exit.LOCKED
        assert "saga-store: another migration of schema 'public' hasn't ended" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (["upgrade"], "no database given: set DATABASE_URL"),
            (["check", "--url", "mysql://localhost/shop"], "needs PostgreSQL over psycopg or asyncpg"),
            (
                ["current", "--url", "postgresql://me:secret@127.0.0.1:1/shop"],
                "can't connect to shop at 127.0.0.1:1 as me",
            ),
            (["sql", "saga_store_9999:head"], "there is no revision 'saga_store_9999'"),
        ],
    )
    def test_what_went_wrong_stands_in_one_message(
        self, line: list[str], says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(line) == Exit.FAILED
        said = capsys.readouterr()
        assert said.err.startswith("saga-store: ")
        assert says in said.err
        assert "secret" not in said.err
        assert said.out == ""

    @pytest.mark.parametrize("line", [["upgrade", "--lock-wait", "soon"], ["upgrade", "--lock-wait", "-1"]])
    def test_wrong_usage_exits_as_argparse_does(self, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as info:
            main(line)
        assert info.value.code == Exit.USAGE
        assert "usage: saga-store" in capsys.readouterr().err

    def test_alone_it_prints_its_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        """All of it, with each command; but it was told to do nothing, which a pipeline has to notice."""
        assert main([]) == Exit.USAGE
        said = capsys.readouterr().out
        assert said.startswith("usage: saga-store")
        assert "Bring the database up to date." in said

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as info:
            main(["--version"])
        assert info.value.code == Exit.DONE
        assert capsys.readouterr().out == f"saga-store {version('saga-store')}\n"

    def test_a_failure_for_a_machine(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["current", "--json"]) == Exit.FAILED
        assert json.loads(capsys.readouterr().out)["exit_code"] == Exit.FAILED


class TestProgress:
    def test_on_a_terminal_a_line_is_written_over(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        console = Console(as_json=False)
        progress = schema.Progress("saga_executions", total=9_000)
        console.report(progress.advanced(5_000))
        console.report(progress.ended())
        shown = "\r\033[Ksaga_executions: 5,000 of about 9,000 rows\r\033[Ksaga_executions: done\n"
        assert capsys.readouterr().err == shown

    def test_in_a_log_what_takes_no_time_is_not_mentioned(self, capsys: pytest.CaptureFixture[str]) -> None:
        console = Console(as_json=False)
        console.report(schema.Progress("saga_executions").advanced(5_000))
        assert capsys.readouterr().err == ""


class TestFromTheWheel:
    def test_it_does_everything_without_a_checkout(self, installed: Environment, empty_database: Database) -> None:
        """In another folder, with nothing but what was installed: up, check, SQL and down."""
        command, url = installed.programs / "saga-store", empty_database.url()
        where = run(
            installed.programs / "python", "-c", "import saga_store.migrations as m; print(m.VERSIONS)", url=url
        )
        assert str(installed.folder) in where.stdout, where.stderr
        for line in (["upgrade"], ["check"], ["sql"], ["downgrade", "base"]):
            done = run(command, *line, url=url)
            assert done.returncode == 0, done.stderr
        assert schema.current(url) is None

    def test_it_makes_the_same_schema_as_alembic_from_the_checkout(
        self, installed: Environment, empty_database: Database, database: Database
    ) -> None:
        done = run(installed.programs / "python", "-m", "saga_store", "upgrade", url=empty_database.url())
        assert done.returncode == 0, done.stderr
        assert dump(empty_database) == dump(database)
