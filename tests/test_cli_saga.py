"""The verbs of saga-store saga: what they show of real rows, to a person and to a machine, and what settle does."""

import asyncio
import json
import re
import shlex
import time
import unicodedata
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.inspection import SagaQuery
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.databases import Database

HOSTILE = "x\x1b[31m\u202e<script>`$(id)`'\";\n\u200b\U0001f600"
STARTED = LogStep("pay", "act", SagaStepStatus.STARTED)
FAILED = LogStep("pay", "act", SagaStepStatus.FAILED, "order 7 declined")

Command: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sagas(database: Database) -> dict[str, UUID]:
    """Make a saga in doubt, one with an error, one that is finished, and an exhausted one of hostile text."""
    ids = {name: uuid4() for name in ("doubtful", "failing", "done", "hostile")}
    checkpoints = [
        Checkpoint(ids["doubtful"], name="order", status=SagaStatus.RUNNING, steps=[STARTED]),
        Checkpoint(ids["failing"], name="order", status=SagaStatus.COMPENSATING, steps=[STARTED, FAILED]),
        Checkpoint(ids["done"], name="order", status=SagaStatus.COMPLETED),
        Checkpoint(
            ids["hostile"],
            name=HOSTILE,
            recovery_attempts=9,
            steps=[LogStep(HOSTILE, "act", SagaStepStatus.FAILED, HOSTILE)],
        ),
    ]

    async def make() -> None:
        engine = create_async_engine(database.url("psycopg"), poolclass=NullPool)
        storage = SqlAlchemySagaStorage(engine)
        for checkpoint in checkpoints:
            await storage.save(checkpoint)
        await engine.dispose()

    asyncio.run(make())
    return ids


@pytest.fixture(params=["postgresql", "postgresql+asyncpg"])
def command(
    request: pytest.FixtureRequest, database: Database, sagas: dict[str, UUID], capsys: pytest.CaptureFixture[str]
) -> Command:
    assert sagas
    url = database.url().replace("postgresql", request.param, 1)

    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        code = main(["saga", verb, "--url", url, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def facts(command: Command, *line: str) -> Any:  # noqa: ANN401 - JSON
    code, out, _ = command(*line, "--json")
    assert code in {Exit.DONE, Exit.ATTENTION}
    return json.loads(out)


class TestShowing:
    def test_list(self, command: Command, sagas: dict[str, UUID]) -> None:
        """Newest first, a line each, by filters and by pages; as JSON with the names and values of the library."""
        code, out, _ = command("list")
        assert code == Exit.DONE
        assert [line[:8] for line in out.splitlines()[1:]] == [saga_id.hex[:8] for saga_id in reversed(sagas.values())]
        listed = facts(command, "list", "--name", "order", "--in-doubt", "--stale-after", "0")
        [saga] = listed["sagas"]
        assert (saga["id"], saga["condition"], saga["in_doubt"]) == (str(sagas["doubtful"]), "stale", True)
        assert saga["last_entry"]["status"] == "STARTED"
        assert 0 < saga["silent_for"] < timedelta(hours=1).total_seconds()
        first = facts(command, "list", "--limit", "3")
        assert len(facts(command, "list", "--limit", "3", "--after", first["after"])["sagas"]) == 1
        assert f"--after {first['after']}" in command("list", "--limit", "3")[1]

    def test_lines_tell_what_no_page_could_read(
        self, command: Command, sagas: dict[str, UUID], admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of all pages, and not just of the last."""
        monkeypatch.setattr("saga_store.cli.saga._LONGEST_PAGE", 1)
        newest = sagas["hostile"]
        admin.execute("UPDATE saga_executions SET updated_at = 'infinity' WHERE id = %s", [newest])
        code, out, err = command("list", "--ndjson")
        assert (code, len(out.splitlines()), f"can't be read: {newest}" in err) == (Exit.DONE, 3, True)
        log = (
            "INSERT INTO saga_logs (saga_id, step_name, action, status, created_at) "
            "VALUES (%s, 'saga_store.break_lease', 'act', 'COMPLETED', %s) RETURNING id"
        )
        _, [entry_id] = (admin.execute(log, [newest, when]).fetchall()[0] for when in ("now", "infinity"))
        code, out, err = command("interventions", "--ndjson")
        assert (code, len(out.splitlines()), f"can't be read: {entry_id}" in err) == (Exit.DONE, 1, True)

    def test_a_time_that_the_local_zone_has_not(
        self, command: Command, sagas: dict[str, UUID], admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Is told in UTC: of what is created when time begins, west of there."""
        admin.execute("UPDATE saga_executions SET created_at = '0001-01-01 00:00+00'")
        admin.execute("UPDATE saga_logs SET created_at = '0001-01-01 00:00+00'")
        monkeypatch.setenv("TZ", "America/New_York")
        time.tzset()
        try:
            for line in (("list",), ("show", str(sagas["doubtful"])), ("show", str(sagas["failing"])), ("stuck",)):
                code, out, _ = command(*line, "--local")
                assert code in {Exit.DONE, Exit.ATTENTION}
                assert out
        finally:
            monkeypatch.undo()
            time.tzset()

    def test_stuck(self, command: Command) -> None:
        """Groups by reason; the exit code says whether there are any."""
        code, out, _ = command("stuck", "--stale-after", "0")
        assert code == Exit.ATTENTION
        assert "order # declined" in out
        groups = facts(command, "stuck", "--stale-after", "0", "--name", "order")["groups"]
        assert {(group["condition"], group["step_name"], group["error"]) for group in groups} == {
            ("stale", "pay", None),
            ("stale", "pay", "order # declined"),
        }
        assert command("stuck", "--name", "none")[:2] == (Exit.DONE, "nothing is stuck\n")

    def test_stuck_with_what_is_in_doubt(self, command: Command, sagas: dict[str, UUID]) -> None:
        """A saga that has failed with a step in doubt needs somebody, as the metric and the pages have it."""
        saga_id = str(sagas["doubtful"])
        assert command("give-up", saga_id, "--reason", "lost", "--by", "alice")[0] == Exit.DONE
        code, out, _ = command("stuck", "--name", "order")
        assert (code, "1 saga needs attention" in out, saga_id[:8] in out) == (Exit.ATTENTION, True, True)
        [group] = facts(command, "stuck", "--name", "order", "--status", "FAILED")["groups"]
        assert (group["condition"], group["in_doubt"], group["examples"]) == ("finished", 1, [saga_id])
        assert command("stuck", "--name", "order", "--status", "RUNNING")[0] == Exit.DONE
        settled = ("settle", saga_id, "--status", "FAILED", "--reason", "never arrived", "--by", "alice")
        assert command(*settled)[0] == Exit.DONE
        assert command("stuck", "--name", "order")[0] == Exit.DONE

    def test_show(self, command: Command, sagas: dict[str, UUID]) -> None:
        """A saga by its id's first digits, with its attempts."""
        code, out, _ = command("show", sagas["failing"].hex[:8])
        assert code == Exit.DONE
        assert str(sagas["failing"]) in out
        assert "order 7 declined" in out
        shown = facts(command, "show", str(sagas["doubtful"]))
        [attempt] = shown["attempts"]
        assert (attempt["step_name"], attempt["state"], attempt["ended"]) == ("pay", "in_doubt", None)
        assert [entry["id"] for entry in shown["history"]] == [attempt["entry_id"]]

    @pytest.mark.parametrize(
        ("given", "code", "said"),
        [
            (str(UUID(int=7)), Exit.FAILED, "there is no saga"),
            ("00000000", Exit.FAILED, "is no saga's"),
            ("1234", Exit.USAGE, "first 8 digits"),
            ("no-digits", Exit.USAGE, "hexadecimal"),
        ],
    )
    def test_an_unknown_id_gets_a_line(self, command: Command, given: str, code: Exit, said: str) -> None:
        """What is no saga's id is said in one line."""
        found, out, err = command("show", given)
        assert (found, out) == (code, "")
        assert said in err
        assert err.count("\n") == 1

    def test_stats(self, command: Command) -> None:
        """Unfinished sagas by name and condition, and what else is counted."""
        code, out, _ = command("stats")
        assert code == Exit.DONE
        assert "steps in doubt: 1" in out
        stats = facts(command, "stats", "--stale-after", "0")
        assert {"name": "order", "condition": "stale", "count": 2} in stats["unfinished"]
        assert stats["in_doubt_steps"] == 1

    def test_every_character_is_seen(self, command: Command, sagas: dict[str, UUID]) -> None:
        """Text holds no control, bidi or invisible character but our line ends; JSON holds what is stored."""
        for line in (("list",), ("stuck",), ("show", str(sagas["hostile"])), ("stats",)):
            _, out, _ = command(*line)
            assert {unicodedata.category(char) for char in out.replace("\n", "")} & {"Cc", "Cf", "Zl", "Zp"} == set()
            assert r"x\e[31m\u202e" in out
        saga = facts(command, "show", str(sagas["hostile"]))["saga"]
        assert (saga["name"], saga["last_error"]["details"]) == (HOSTILE, HOSTILE)

    @pytest.mark.parametrize(
        "line",
        [
            ("list", "--status", "DONE"),
            ("list", "--silent-for", "soon"),
            ("list", "--created-after", "32nd"),
            ("list", "--condition", "stuck"),
            ("list", "--field", "customer"),
            ("list", "--no-such-option=\x1b[31m\u202e"),
            ("interventions", "--since", "2026-13-01"),
        ],
    )
    def test_wrong_usage(self, command: Command, line: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        """Filters that can't be read are wrong usage, and one line says what is wrong."""
        with pytest.raises(SystemExit) as end:
            command(*line)
        printed = capsys.readouterr()
        assert (end.value.code, printed.out, printed.err.count("\n")) == (Exit.USAGE, "", 1)
        assert printed.err.strip().isprintable()

    def test_wrong_questions(self, command: Command) -> None:
        """Cursors and limits that can't be used are told in one line, and so are names."""
        for line in (
            ("list", "--after", "x"),
            ("list", "--limit", "0"),
            ("list", "--name", ""),
            ("stuck", "--step", ""),
            ("stuck", "--limit", "-1"),
            ("show", "01234567", "--last", "-1"),
            ("list", "--field", "n=NaN"),
            ("list", "--created-after", "999999999d"),
            ("list", "--created-after", "0001-01-01T00:00:00+14:00"),
            ("interventions", "--since", "999999999d"),
            ("interventions", "--after", "x"),
        ):
            code, out, err = command(*line)
            assert (code, out, err.count("\n")) == (Exit.USAGE, "", 1)


class TestSchema:
    def test_a_schema_is_looked_in(self, command: Command, admin: psycopg.Connection) -> None:
        """With --schema the tables of that one are shown, and of no other."""
        admin.execute('CREATE SCHEMA "shop ""x"" %"')
        for table in ("saga_executions", "saga_logs"):
            admin.execute(f'CREATE TABLE "shop ""x"" %"."{table}" (LIKE public.{table} INCLUDING ALL)'.encode())
        assert command("list", "--schema", 'shop "x" %')[:2] == (Exit.DONE, "none\n")


class TestSettling:
    def test_settle(self, command: Command, sagas: dict[str, UUID]) -> None:
        """A dry run writes nothing; a second settling is refused; both are seen among the interventions."""
        who = ("--status", "COMPLETED", "--reason", "seen at the bank", "--by", "alice")
        code, out, _ = command("settle", str(sagas["doubtful"])[:8], *who, "--dry-run")
        assert (code, out[:12]) == (Exit.DONE, "would settle")
        assert facts(command, "interventions")["interventions"] == []
        assert facts(command, "settle", str(sagas["doubtful"]), *who)["settled"] is True
        code, _, err = command("settle", str(sagas["doubtful"]), *who)
        assert code == Exit.REFUSED
        assert "no such step is in doubt" in err
        [act] = facts(command, "interventions", "--since", "1h", "--by", "alice")["interventions"]
        assert (act["verb"], act["reason"], act["saga_id"]) == (
            "settle_step",
            "seen at the bank",
            str(sagas["doubtful"]),
        )
        assert "seen at the bank" in command("interventions")[1]
        assert "by alice" in command("show", str(sagas["doubtful"]))[1]

    def test_which_of_several(self, command: Command, sagas: dict[str, UUID], admin: psycopg.Connection) -> None:
        """If several steps are in doubt, one has to be named; they are listed by their entries."""
        admin.execute(
            "INSERT INTO saga_logs (saga_id, step_name, action, status) VALUES (%s, 'ship', 'act', 'STARTED')",
            [sagas["doubtful"]],
        )
        who = ("--status", "FAILED", "--reason", "seen", "--by", "alice")
        code, _, err = command("settle", str(sagas["doubtful"]), *who)
        assert code == Exit.REFUSED
        assert "say which by --entry" in err
        entry = err.split("entry ")[-1].split()[0]
        assert f"entry {entry} (act ship" in err
        assert command("settle", str(sagas["doubtful"]), "--entry", entry, *who)[0] == Exit.DONE
        assert command("settle", str(sagas["doubtful"]), "--entry", "-5", *who)[0] == Exit.REFUSED


def test_conditions_are_as_in_the_library(command: Command) -> None:
    """The defaults of the command are those of a query."""
    listed = facts(command, "list", "--condition", "exhausted")
    assert [saga["recovery_attempts"] for saga in listed["sagas"]] == [9]
    assert SagaQuery().max_attempts == 5


DOCS = Path(__file__).parent.parent / "docs"
COMMANDS = [
    line.partition("  #")[0].strip()
    for name in ("operations.md", "inspection.md", "recovery.md")
    for line in re.findall(r"^saga-store saga .*$", (DOCS / name).read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_what_the_docs_say_to_type(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command of the runbook and its like can be typed; it fails for want of a database, and for nothing else."""
    assert main([*shlex.split(line)[1:], "--url", "postgresql://127.0.0.1:1/none"]) == Exit.FAILED
    assert "can't connect to" in capsys.readouterr().err
