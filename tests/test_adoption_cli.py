"""`saga-store adopt`, as it is typed."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from saga_store import adoption, schema
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.schema.fingerprint import State
from tests.cqrs_tables import ENTRIES_OF_EACH, SAGAS, execute
from tests.databases import Database
from tests.test_migrations import fingerprint

PAGE = Path(__file__).parent.parent / "docs" / "adoption.md"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(cqrs_database: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on a database in which python-cqrs was at work; return exit code, output and messages."""
    monkeypatch.setenv("DATABASE_URL", cqrs_database.url())

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(["adopt", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


class TestAdopt:
    def test_it_is_a_dry_run_unless_told_otherwise(self, cqrs_database: Database, run: Run) -> None:
        """Rows, steps, whom they keep waiting, and their SQL are printed; nothing changes."""
        before = fingerprint(cqrs_database)
        code, out, _ = run("--rewrite-below", "0")

        assert code == Exit.DONE
        assert f"saga_logs: {SAGAS * ENTRIES_OF_EACH:,} rows" in out
        assert "saga_logs: swap the columns\n   keeps waiting: everybody, for milliseconds" in out
        assert "ALTER TABLE saga_logs RENAME COLUMN status_converted TO status;" in out
        assert "saga-store adopt --execute does it" in out
        assert run("--rewrite-below", "0", "--dry-run") == (code, out, "")
        assert fingerprint(cqrs_database) == before

    def test_there_back_and_to_the_end(self, cqrs_database: Database, run: Run) -> None:
        url = cqrs_database.url("psycopg")
        for goal in ([], ["--undo"], []):
            assert run(*goal, "--execute")[0] == Exit.DONE
            assert run(*goal, "--execute")[1].startswith("nothing to do")
        assert schema.check(url).state is State.CURRENT
        assert "there is no way back" in run("--finish")[1]
        assert run("--finish", "--execute")[0] == Exit.DONE
        assert adoption.plan(url, "finish").steps == ()

    def test_what_it_refuses_it_names(self, cqrs_database: Database, run: Run) -> None:
        """The dry run exits as the attempt does, so that a pipeline can tell beforehand."""
        execute(cqrs_database, "ALTER TABLE saga_logs ADD COLUMN note text, ADD COLUMN more text")
        differences = [f"column saga_logs.{name}: unexpected, is text" for name in ("more", "note")]

        code, out, _ = run()
        assert (code, [line in out for line in differences]) == (Exit.FAILED, [True, True])
        code, _, err = run("--execute")
        assert (code, [line in err for line in differences]) == (Exit.FAILED, [True, True])

    def test_a_machine_gets_json(self, run: Run) -> None:
        code, out, _ = run("--json")
        planned = json.loads(out)
        done = json.loads(run("--json", "--execute")[1])

        assert code == Exit.DONE
        assert planned["executed"] is False
        assert planned["refusals"] == []
        assert planned["rows"] == {"saga_executions": SAGAS, "saga_logs": SAGAS * ENTRIES_OF_EACH}
        assert done["executed"] is True
        assert done["steps"] == planned["steps"]

    def test_other_names_of_the_tables_are_refused(
        self, cqrs_database: Database, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where python-cqrs was told to use other tables, those of the usual names may be anybody's."""
        before = fingerprint(cqrs_database)
        monkeypatch.setenv("CQRS_SAGA_LOG_TABLE_NAME", "order_logs")
        code, _, err = run("--execute")

        assert code == Exit.FAILED
        assert "CQRS_SAGA_LOG_TABLE_NAME=order_logs" in err
        assert fingerprint(cqrs_database) == before


class TestThePage:
    def test_its_commands_succeed_in_their_order(self, cqrs_database: Database, run: Run) -> None:
        """From the first look to the end, by way of there and back."""
        blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
        lines = [line.split()[1:] for block in blocks for line in block.splitlines() if line.startswith("saga-store")]

        assert lines[-1] == ["adopt", "--finish", "--execute"]
        for verb, *arguments in lines:
            assert (run(*arguments)[0] if verb == "adopt" else main([verb, *arguments])) == Exit.DONE
        assert schema.check(cqrs_database.url("psycopg")).state is State.CURRENT
