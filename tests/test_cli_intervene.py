"""The verbs with which a person intervenes: on one saga, on those of a plan, and on one that a worker is at."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus, StepAction, schema
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing.postgres.restartable import restartable
from tests.databases import Database
from tests.terminal import Terminal

ROOT = Path(__file__).parent.parent
WHY = ("--reason", "ticket 7", "--by", "alice")
STARTED = LogStep("pay", "act", SagaStepStatus.STARTED)

Command: TypeAlias = Callable[..., tuple[int, str, str]]
Make: TypeAlias = Callable[..., list[UUID]]


@pytest.fixture
def make(database: Database) -> Make:
    """Make sagas alike on the test's database."""
    return partial(make_sagas, database)


def make_sagas(
    database: Database,
    count: int,
    name: str = "order",
    *,
    leased: bool = False,
    **checkpoint: Any,  # noqa: ANN401 - of a checkpoint
) -> list[UUID]:
    """Make sagas alike, the oldest first, by checkpoints; ``leased`` to worker-1."""

    async def work() -> list[UUID]:
        engine = create_async_engine(database.url("psycopg"), poolclass=NullPool)
        storage = SqlAlchemySagaStorage(engine)
        ids = [uuid4() for _ in range(count)]
        for saga_id in ids:
            await storage.save(Checkpoint(saga_id, name=name, **({"status": SagaStatus.RUNNING} | checkpoint)))
        if leased:
            claimed = await storage.claim_sagas(
                owner="worker-1", lease=timedelta(hours=1), limit=count, stale_after=timedelta(0), name=name
            )
            assert len(claimed) == count
        await engine.dispose()
        return ids

    return asyncio.run(work())


@pytest.fixture
def command(database: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("DATABASE_URL", database.url())

    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        code = main(["saga", verb, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@contextmanager
def process(database: Database, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """Run the command as a process of its own."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", "saga_store", "saga", *arguments],
        env=os.environ | {"DATABASE_URL": database.url()},
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def rows(admin: psycopg.Connection) -> dict[UUID, tuple[str, int, int, str | None]]:
    query = "SELECT id, status, version, recovery_attempts, lease_owner FROM saga_executions"
    return {saga_id: (status, *rest) for saga_id, status, *rest in admin.execute(query).fetchall()}


def statuses(admin: psycopg.Connection, ids: list[UUID]) -> list[str]:
    found = rows(admin)
    return [found[saga_id][0] for saga_id in ids]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_it_goes_on(admin: psycopg.Connection, ids: list[UUID]) -> None:
    """Wait until the sagas are given up, and whoever did that has heard so: they have sent something since."""
    wait_until(lambda: statuses(admin, ids) == ["FAILED"] * len(ids))
    seen = admin.execute("SELECT clock_timestamp()").fetchone()
    others = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND query_start > %s"
    )
    wait_until(lambda: bool(admin.execute(others, seen).fetchall()))


class TestOneSaga:
    @pytest.mark.parametrize(
        ("verb", "after"),
        [
            ("give-up", ("FAILED", 1, None)),
            ("break-lease", ("RUNNING", 1, None)),
        ],
    )
    def test_it_is_done_at_once(
        self, command: Command, make: Make, admin: psycopg.Connection, verb: str, after: tuple[str, int, str | None]
    ) -> None:
        """By the first digits of its id; a dry run says so and writes nothing; who and why are recorded."""
        [saga_id] = make(1, leased=True)
        before = rows(admin)
        code, out, _ = command(verb, saga_id.hex[:8], *WHY, "--dry-run")
        assert (code, out[:6], rows(admin)) == (Exit.DONE, "would ", before)
        code, out, _ = command(verb, saga_id.hex[:8], *WHY, "--json")
        done = json.loads(out)
        assert (code, done["saga_id"], done["outcome"]) == (Exit.DONE, str(saga_id), "done")
        status, version, *rest = rows(admin)[saga_id]
        assert (status, *rest) == after
        assert version == before[saga_id][1] + 1
        _, out, _ = command("interventions", "--json")
        [act] = json.loads(out)["interventions"]
        assert (act["by"], act["reason"], act["before"]["lease_owner"]) == ("alice", "ticket 7", "worker-1")

    @pytest.mark.parametrize(
        ("verb", "said"),
        [("retry", "FAILED already"), ("give-up", "FAILED already"), ("break-lease", "FAILED already")],
    )
    def test_what_makes_no_sense_is_refused(
        self, command: Command, make: Make, admin: psycopg.Connection, verb: str, said: str
    ) -> None:
        """A finished saga is left as it is, and that is exit code 8."""
        [saga_id] = make(1, status=SagaStatus.FAILED)
        before = rows(admin)
        code, out, err = command(verb, str(saga_id), *WHY)
        assert (code, out, rows(admin)) == (Exit.REFUSED, "", before)
        assert said in err
        assert err.count("\n") == 1

    def test_an_expected_version(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """If it is at another one the saga is left alone."""
        [saga_id] = make(1)
        code, _, err = command("give-up", str(saga_id), *WHY, "--expected-version", "7")
        assert (code, statuses(admin, [saga_id])) == (Exit.REFUSED, ["RUNNING"])
        assert "at version 1, not at the expected version 7" in err
        refused = command("give-up", str(saga_id), *WHY, "--expected-version", "7", "--dry-run")
        assert refused == (Exit.REFUSED, "", err)
        assert command("give-up", str(saga_id), *WHY, "--expected-version", "1")[0] == Exit.DONE

    def test_a_broken_row(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """A saga whose row can't be read can be given up."""
        [saga_id] = make(1)
        admin.execute("UPDATE saga_executions SET created_at = '-infinity'")
        assert command("show", str(saga_id))[0] == Exit.FAILED
        assert command("give-up", str(saga_id), *WHY)[0] == Exit.DONE
        assert statuses(admin, [saga_id]) == ["FAILED"]

    def test_an_ambiguous_id(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """Of an id that several sagas' begin with all are listed, and nothing is done."""
        make(2)
        admin.execute("UPDATE saga_executions SET id = CAST('aaaaaaaa' || substr(CAST(id AS text), 9) AS uuid)")
        code, out, err = command("give-up", "aaaaaaaa", *WHY)
        assert (code, out) == (Exit.FAILED, "")
        assert all(str(saga_id) in err for saga_id in rows(admin))
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("lock", "told"),
    [
        ("SELECT FROM saga_executions FOR UPDATE", ("unknown", None)),
        ("LOCK TABLE saga_executions", (None, "interrupted")),
    ],
)
def test_ctrl_c_while_one_saga_is_written(
    database: Database, make: Make, admin: psycopg.Connection, lock: str, told: tuple[str | None, str | None]
) -> None:
    """Nobody knows what came of it, and that is told as one object; while it is looked for, too."""
    [saga_id] = make(1, steps=[STARTED])
    waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with psycopg.connect(database.url()) as worker:
        worker.execute(lock.encode())
        with process(database, "settle", str(saga_id), "--status", "FAILED", *WHY, "--json") as running:
            wait_until(lambda: bool(admin.execute(waits).fetchall()))
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=60)
    assert (running.returncode, "Traceback" in err) == (Exit.INTERRUPTED, False)
    facts = json.loads(out)
    assert (facts.get("outcome"), facts.get("error")) == told
    assert rows(admin)[saga_id] == ("RUNNING", 1, 0, None)


class TestRetrying:
    def test_attempts_are_set_to_zero(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """Of a saga that nobody works on; who and why are recorded."""
        [saga_id] = make(1, recovery_attempts=5)
        assert command("retry", saga_id.hex[:8], *WHY, "--dry-run")[0] == Exit.DONE
        assert rows(admin)[saga_id] == ("RUNNING", 1, 5, None)
        assert command("retry", saga_id.hex[:8], *WHY)[0] == Exit.DONE
        assert rows(admin)[saga_id] == ("RUNNING", 2, 0, None)
        assert json.loads(command("interventions", "--json")[1])["interventions"][0]["by"] == "alice"

    def test_a_worker_at_it_is_left_alone(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """Whoever holds a saga, perhaps in the middle of a step, is fenced by no retry, however it is asked for."""
        ids = make(2, leased=True, steps=[STARTED])
        before = rows(admin)
        code, out, err = command("retry", str(ids[0]), *WHY)
        assert (code, out) == (Exit.REFUSED, "")
        assert "a worker is at it; break-lease first" in err
        assert command("retry", str(ids[0]), *WHY, "--dry-run")[0] == Exit.REFUSED
        _, out, _ = command("retry", "--name", "order", *WHY, "--yes", "--json")
        assert json.loads(out)["left_out"] == {"a worker is at it; break-lease first": 2}
        assert rows(admin) == before

    def test_one_that_renews_its_lease_after_the_plan(
        self, command: Command, make: Make, admin: psycopg.Connection, tmp_path: Path
    ) -> None:
        """Renewing leaves the version, so whether a worker is at it is asked again before it is written."""
        ids = make(2, leased=True)
        lasts = "UPDATE saga_executions SET lease_expires_at = now() + CAST(%s AS interval) WHERE id = %s"
        for saga_id in ids:
            admin.execute(lasts, ["-1 s", saga_id])
        _, plan, _ = command("retry", "--name", "order", *WHY, "--dry-run", "--json")
        (tmp_path / "plan").write_text(plan)
        admin.execute(lasts, ["1 h", ids[0]])
        code, out, _ = command("retry", "--plan", str(tmp_path / "plan"), *WHY, "--yes", "--json")
        outcomes = {one["saga_id"]: (one["outcome"], one["message"]) for one in json.loads(out)["results"]}
        assert (code, outcomes[str(ids[1])]) == (Exit.PARTLY, ("done", None))
        outcome, said = outcomes[str(ids[0])]
        assert outcome == "refused"
        assert "break-lease first" in said
        assert [rows(admin)[saga_id][2] for saga_id in ids] == [1, 0]

    def test_what_is_in_doubt_is_settled_first(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """Or it might happen twice, unless it is said that it may."""
        [saga_id] = make(1, recovery_attempts=5, steps=[STARTED])
        before = rows(admin)
        code, _, err = command("retry", str(saga_id), *WHY)
        assert (code, rows(admin)) == (Exit.REFUSED, before)
        assert "a step is in doubt; settle it first" in err
        _, out, _ = command("retry", "--name", "order", *WHY, "--yes", "--json")
        [(why, count)] = json.loads(out)["left_out"].items()
        assert ("settle it first" in why, count, rows(admin)) == (True, 1, before)
        assert command("retry", str(saga_id), *WHY, "--repeatable", "--dry-run")[0] == Exit.DONE
        assert command("retry", "--name", "order", *WHY, "--repeatable", "--yes")[0] == Exit.DONE
        assert rows(admin)[saga_id][2] == 0
        [saga_id] = make(1, "refund", recovery_attempts=5, steps=[STARTED])
        assert command("settle", str(saga_id), "--status", "FAILED", *WHY)[0] == Exit.DONE
        assert command("retry", str(saga_id), *WHY)[0] == Exit.DONE

    def test_a_broken_row(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """No worker claims what can't be read, and nobody can tell who is at it."""
        [saga_id] = make(1, recovery_attempts=5)
        admin.execute("UPDATE saga_executions SET created_at = '-infinity'")
        assert command("retry", str(saga_id), *WHY)[0] == Exit.REFUSED
        assert rows(admin)[saga_id][2] == 5


class TestHolding:
    def test_a_hold_and_its_end(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """Until it is released, or for as long as is said; whoever works on the saga goes on."""
        [saga_id] = make(1, status=SagaStatus.COMPLETED)
        query = (
            "SELECT version, retain_until = 'infinity', retain_until < now() + interval '31 days' FROM saga_executions"
        )
        assert command("hold", saga_id.hex[:8], *WHY)[:2] == (Exit.DONE, f"held: saga {saga_id}\n")
        assert admin.execute(query).fetchone() == (1, True, False)
        assert "kept until released" in command("show", str(saga_id))[1]
        assert command("hold", str(saga_id), *WHY, "--until", "30d")[0] == Exit.DONE
        assert admin.execute(query).fetchone() == (1, False, True)
        assert command("release", "--name", "order", *WHY, "--yes")[0] == Exit.DONE
        assert admin.execute(query).fetchone() == (1, None, None)
        code, _, err = command("release", str(saga_id), *WHY)
        assert (code, err.count("\n")) == (Exit.REFUSED, 1)
        code, _, err = command("hold", str(saga_id), *WHY, "--until", "2020-01-01")
        assert (code, err.count("\n")) == (Exit.USAGE, 1)


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((), "a filter must be given"),
            (("--yes",), "a filter must be given"),
            (("--stale-after", "1h", "--yes"), "a filter must be given"),
            (("", "--yes"), "first 8 digits"),
            (("0123456789", "--name", "order"), "can't be given both"),
            (("--name", "order", "--expected-version", "1"), "one saga's"),
            (("--name", "", "--yes"), "name"),
            (("--name", "order", "--max", "-1", "--yes"), "max"),
            (
                ("--name", "order", "--created-after", "9999-12-31T23:59:59-12:00", "--yes"),
                "between the years 1 and 9999",
            ),
        ],
    )
    def test_which_sagas(
        self, command: Command, make: Make, admin: psycopg.Connection, arguments: tuple[str, ...], said: str
    ) -> None:
        """Neither every saga nor none is meant by mistake: one line, exit code 2, and nothing is written."""
        ids = make(2)
        code, out, err = command("give-up", *arguments, *WHY)
        assert (code, out, statuses(admin, ids)) == (Exit.USAGE, "", ["RUNNING"] * 2)
        assert said in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize("who", [("--reason", ""), ("--reason", " "), ("--reason", "x", "--by", "")])
    def test_who_and_why(self, command: Command, make: Make, admin: psycopg.Connection, who: tuple[str, ...]) -> None:
        """Nobody intervenes without a reason and a name."""
        ids = make(1)
        code, _, err = command("give-up", str(ids[0]), *who)
        assert (code, err.count("\n"), statuses(admin, ids)) == (Exit.USAGE, 1, ["RUNNING"])

    def test_a_reason_has_to_be_given(self, command: Command) -> None:
        """As argparse has it."""
        with pytest.raises(SystemExit) as end:
            command("retry", "01234567")
        assert end.value.code == Exit.USAGE


class TestPlans:
    def test_those_of_the_plan_and_no_others(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """What the filters find, as a dry run shows it, is done; results come per saga."""
        mine, others = make(3), make(2, "refund")
        code, out, _ = command("give-up", "--name", "order", *WHY, "--dry-run", "--json")
        plan = json.loads(out)
        assert (code, plan["count"]) == (Exit.DONE, 3)
        assert {(one["saga_id"], one["version"]) for one in plan["plan"]} == {(str(saga_id), 1) for saga_id in mine}
        assert statuses(admin, mine) == ["RUNNING"] * 3
        code, out, _ = command("give-up", "--name", "order", *WHY, "--yes", "--json")
        results = json.loads(out)["results"]
        assert code == Exit.DONE
        assert {(one["saga_id"], one["outcome"]) for one in results} == {(str(saga_id), "done") for saga_id in mine}
        assert statuses(admin, mine + others) == ["FAILED"] * 3 + ["RUNNING"] * 2
        code, out, _ = command("give-up", "--name", "order", *WHY, "--yes")
        assert (code, out.splitlines()[-1]) == (Exit.DONE, "nothing to do")

    def test_a_line_for_each(self, command: Command, make: Make) -> None:
        """With --ndjson a plan and its results come in lines."""
        ids = {str(saga_id) for saga_id in make(3, recovery_attempts=5)}
        for options in (("--dry-run",), ("--yes",)):
            _, out, _ = command("retry", "--condition", "exhausted", *WHY, *options, "--ndjson")
            assert {json.loads(each)["saga_id"] for each in out.splitlines()} == ids

    def test_nobody_to_ask(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """Where no person can answer nothing is written, and what to do is said."""
        ids = make(2)
        code, out, err = command("give-up", "--name", "order", *WHY)
        assert (code, statuses(admin, ids)) == (Exit.REFUSED, ["RUNNING"] * 2)
        assert ids[0].hex[:8] in out
        assert "2 sagas would be written to, and there is nobody to ask: look at --dry-run, then say --yes" in err
        code, out, _ = command("give-up", "--name", "order", *WHY, "--json")
        assert (code, json.loads(out)["exit_code"]) == (Exit.REFUSED, Exit.REFUSED)

    def test_more_than_was_thought(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """A plan of more sagas than --max is refused whole."""
        ids = make(3)
        code, out, err = command("give-up", "--name", "order", *WHY, "--yes", "--max", "2")
        assert (code, out, statuses(admin, ids)) == (Exit.REFUSED, "", ["RUNNING"] * 3)
        assert "more than 2 sagas" in err
        assert command("give-up", "--name", "order", *WHY, "--yes", "--max", "3")[0] == Exit.DONE

    def test_what_makes_no_sense_is_left_out(self, command: Command, make: Make) -> None:
        """Sagas that can't be done this to are no part of the plan; how many, and why, is said."""
        make(2)
        make(1, recovery_attempts=3)
        make(1, status=SagaStatus.COMPLETED)
        _, out, _ = command("retry", "--name", "order", *WHY, "--dry-run", "--json")
        plan = json.loads(out)
        assert (plan["count"], plan["left_out"]) == (1, {"no recovery attempts to set to zero": 2})
        _, out, _ = command("break-lease", "--name", "order", *WHY, "--dry-run")
        assert "3 left out: under no lease" in out

    def test_settling_several(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """The step in doubt of each saga is settled; where there are several, that saga is left out."""
        ids = make(2, steps=[STARTED])
        make(1, steps=[STARTED, LogStep("ship", "act", SagaStepStatus.STARTED)])
        code, out, _ = command("settle", "--name", "order", "--status", "FAILED", *WHY, "--yes", "--json")
        assert code == Exit.DONE
        assert {one["saga_id"] for one in json.loads(out)["results"]} == set(map(str, ids))
        ended = "SELECT saga_id FROM saga_logs WHERE step_name = 'pay' AND status = 'FAILED'"
        assert {saga_id for (saga_id,) in admin.execute(ended)} == set(ids)

    def test_settling_a_step_that_was_begun_twice(
        self, command: Command, make: Make, admin: psycopg.Connection
    ) -> None:
        """It is one step in doubt: by its last entry, by an id as by filters; an earlier entry is refused."""
        [one, _] = make(2, steps=[STARTED, STARTED])
        query = "SELECT id FROM saga_logs WHERE saga_id = %s AND step_name = 'pay' AND status = 'STARTED' ORDER BY id"
        [earlier], [last] = admin.execute(query, [one]).fetchall()
        code, _, err = command("settle", str(one), "--entry", str(earlier), "--status", "FAILED", *WHY)
        assert code == Exit.REFUSED
        assert f"entry {last}" in err
        code, out, _ = command("settle", "--name", "order", "--status", "FAILED", *WHY, "--dry-run", "--json")
        plan = json.loads(out)
        assert (plan["count"], plan["left_out"]) == (2, {})
        assert last in {each["entry_id"] for each in plan["plan"]}
        assert command("settle", str(one), "--status", "COMPLETED", *WHY)[0] == Exit.DONE
        assert command("settle", str(one), "--entry", str(last), "--status", "FAILED", *WHY)[0] == Exit.REFUSED

    @pytest.mark.parametrize("words", [("act", "COMPENSATED", "COMPLETED"), ("compensate", "COMPLETED", "COMPENSATED")])
    def test_settling_by_the_wrong_word(
        self, command: Command, make: Make, admin: psycopg.Connection, words: tuple[StepAction, str, str]
    ) -> None:
        """Doing isn't said to be undone, nor undoing done, unless the action is named: it may be what was meant."""
        action, wrong, right = words
        [saga_id] = make(1, steps=[LogStep("pay", action, SagaStepStatus.STARTED)])
        ended = "SELECT status FROM saga_logs WHERE step_name = 'pay' AND status <> 'STARTED'"
        entry = str(admin.execute("SELECT max(id) FROM saga_logs").fetchall()[0][0])
        for more in ((), ("--entry", entry), ("--dry-run",)):
            code, _, err = command("settle", str(saga_id), "--status", wrong, *more, *WHY)
            assert code == Exit.REFUSED
            assert f"ends as {right} or FAILED, not as {wrong}" in err
        _, out, _ = command("settle", "--step", "pay", "--status", wrong, *WHY, "--yes", "--json")
        [(why, count)] = json.loads(out)["left_out"].items()
        assert (f"ends as {right} or FAILED" in why, count) == (True, 1)
        for fits in (right, "FAILED"):
            _, out, _ = command("settle", "--step", "pay", "--status", fits, *WHY, "--dry-run", "--json")
            assert json.loads(out)["count"] == 1
        other = "act" if action == "compensate" else "compensate"
        assert command("settle", str(saga_id), "--status", wrong, "--action", other, *WHY)[0] == Exit.REFUSED
        assert admin.execute(ended).fetchall() == []
        assert command("settle", str(saga_id), "--status", wrong, "--action", action, *WHY)[0] == Exit.DONE
        assert admin.execute(ended).fetchall() == [(wrong,)]

    def test_settling_the_undoing_of_an_outage(self, command: Command, make: Make, admin: psycopg.Connection) -> None:
        """What was being done in the same outage is left out; of one that is in doubt both ways, the action tells."""
        undoing = LogStep("pay", "compensate", SagaStepStatus.STARTED)
        [done], [undone], [both] = make(1, steps=[STARTED]), make(1, steps=[undoing]), make(1, steps=[STARTED, undoing])
        given = ("settle", "--step", "pay", "--status", "COMPENSATED", *WHY, "--yes", "--json")
        assert [one["saga_id"] for one in json.loads(command(*given)[1])["results"]] == [str(undone)]
        assert [one["saga_id"] for one in json.loads(command(*given, "--action", "compensate")[1])["results"]] == [
            str(both)
        ]
        ended = "SELECT saga_id, action FROM saga_logs WHERE step_name = 'pay' AND status <> 'STARTED' ORDER BY id"
        assert admin.execute(ended).fetchall() == [(undone, "compensate"), (both, "compensate")]
        assert done in rows(admin)

    def test_one_that_changes_after_the_plan(self, database: Database, make: Make, admin: psycopg.Connection) -> None:
        """It is left alone and reported, the others are done: exit code 9."""
        ids = make(3)
        with psycopg.connect(database.url()) as worker:
            # The plan sees what is committed; the write comes after the worker's.
            worker.execute("UPDATE saga_executions SET version = version + 1 WHERE id = %s", [ids[0]])
            with process(database, "give-up", "--name", "order", *WHY, "--yes", "--json") as running:
                wait_until(lambda: statuses(admin, ids[1:]) == ["FAILED"] * 2)
                worker.commit()
                out, _ = running.communicate(timeout=60)
        assert running.returncode == Exit.PARTLY
        outcomes = {one["saga_id"]: one["outcome"] for one in json.loads(out)["results"]}
        assert outcomes == {str(ids[0]): "changed", str(ids[1]): "done", str(ids[2]): "done"}
        assert rows(admin)[ids[0]] == ("RUNNING", 2, 0, None)

    def test_a_plan_that_was_looked_at(
        self, command: Command, make: Make, admin: psycopg.Connection, tmp_path: Path
    ) -> None:
        """What a dry run has printed can be carried out later: those sagas, as far as they are as they were then."""
        ids = make(4, steps=[STARTED])
        _, out, _ = command("give-up", "--name", "order", *WHY, "--dry-run", "--json")
        (tmp_path / "plan").write_text(out)
        _, lines, _ = command("give-up", "--name", "order", *WHY, "--dry-run", "--ndjson")
        (tmp_path / "lines").write_text(lines)
        admin.execute("UPDATE saga_executions SET version = 2 WHERE id = %s", [ids[0]])
        log = "INSERT INTO saga_logs (saga_id, step_name, action, status) VALUES (%s, 'pay', 'act', 'COMPLETED')"
        admin.execute(log, [ids[1]])
        admin.execute("DELETE FROM saga_logs WHERE saga_id = %s", [ids[2]])
        admin.execute("DELETE FROM saga_executions WHERE id = %s", [ids[2]])
        ids += make(1)
        code, out, _ = command("give-up", "--plan", str(tmp_path / "plan"), *WHY, "--yes", "--json")
        assert code == Exit.PARTLY
        outcomes = {UUID(one["saga_id"]): one["outcome"] for one in json.loads(out)["results"]}
        assert outcomes == {ids[0]: "changed", ids[1]: "changed", ids[2]: "changed", ids[3]: "done"}
        del ids[2]
        assert statuses(admin, ids) == ["RUNNING", "RUNNING", "FAILED", "RUNNING"]
        assert command("give-up", "--plan", str(tmp_path / "lines"), *WHY, "--yes")[0] == Exit.REFUSED

    def test_a_plan_is_for_what_it_was_made_for(
        self, command: Command, make: Make, admin: psycopg.Connection, tmp_path: Path
    ) -> None:
        """Another verb, another end of a step, and a plan that doesn't say are refused, and nothing is written."""
        [saga_id] = make(1, recovery_attempts=5, steps=[STARTED])
        before, path = rows(admin), tmp_path / "plan"
        _, out, _ = command("settle", "--name", "order", "--status", "FAILED", *WHY, "--dry-run", "--json")
        path.write_text(out)
        [planned] = json.loads(out)["plan"]
        assert (planned["verb"], planned["step_status"], planned["settled"]) == ("settle", "FAILED", False)
        assert (planned["status"], planned["outcome"], planned["message"]) == ("RUNNING", "planned", None)
        for line in (
            ("give-up",),
            ("retry", "--repeatable"),
            ("settle", "--status", "COMPLETED"),
            ("hold",),
        ):
            code, out, err = command(*line, "--plan", str(path), *WHY, "--yes")
            assert (code, out, err.count("\n"), rows(admin)) == (Exit.USAGE, "", 1, before)
        del planned["verb"]
        (tmp_path / "old").write_text(json.dumps(planned))
        again = ("settle", "--status", "FAILED", *WHY, "--yes", "--json", "--plan")
        assert command(*again, str(tmp_path / "old"))[0] == Exit.USAGE
        code, out, _ = command(*again, str(path))
        [result] = json.loads(out)["results"]
        assert (code, result["settled"], result["step_status"], result["status"]) == (0, True, "FAILED", "RUNNING")
        assert result["saga_id"] == str(saga_id)

    @pytest.mark.parametrize("spelled", ["as it is", "indented", "its list", "a line each"])
    def test_a_plan_of_one_saga(self, command: Command, make: Make, tmp_path: Path, spelled: str) -> None:
        """A dry run with an id is a plan, too, however its JSON was spelled since; what it says is what others say."""
        [saga_id] = make(1, recovery_attempts=5, steps=[LogStep("pay", "act", SagaStepStatus.FAILED)])
        _, out, _ = command("retry", str(saga_id), *WHY, "--dry-run", "--json")
        planned = json.loads(out)
        assert planned["last_entry_id"] > 0
        assert (planned["version"], planned["outcome"], planned["message"]) == (1, "planned", None)
        if spelled != "as it is":
            _, out, _ = command("retry", "--name", "order", *WHY, "--dry-run", "--json")
            assert json.loads(out)["plan"] == [planned]
        if spelled == "a line each":
            _, out, _ = command("retry", "--name", "order", *WHY, "--dry-run", "--ndjson")
        (tmp_path / "plan").write_text(
            {
                "indented": lambda: json.dumps(json.loads(out), indent=2),
                "its list": lambda: json.dumps(json.loads(out)["plan"], indent=2),
            }.get(spelled, lambda: out)()
        )
        code, out, _ = command("retry", "--plan", str(tmp_path / "plan"), *WHY, "--yes", "--json")
        assert (code, json.loads(out)["counts"]) == (Exit.DONE, {"done": 1})

    def test_an_empty_plan(self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a plan was to be is nothing, which isn't a plan of nothing."""
        (tmp_path / "plan").write_text("\n")
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        for name in (str(tmp_path / "plan"), "-"):
            code, out, err = command("give-up", "--plan", name, *WHY, "--yes")
            assert (code, out, "is empty" in err) == (Exit.USAGE, "", True)
        _, out, _ = command("give-up", "--name", "none", *WHY, "--dry-run", "--json")
        (tmp_path / "plan").write_text(out)
        assert command("give-up", "--plan", str(tmp_path / "plan"), *WHY, "--yes")[0] == Exit.DONE

    @pytest.mark.parametrize("plan", ["no JSON", "7", '{"saga_id": 7}', '{"plan": [{"saga_id": "x", "version": 1}]}'])
    def test_what_is_no_plan(self, command: Command, tmp_path: Path, plan: str) -> None:
        """Is wrong usage, in one line; so is one that isn't there, and one beside filters."""
        (tmp_path / "plan").write_text(plan)
        for given in (
            (str(tmp_path / "plan"),),
            (str(tmp_path / "none"),),
            (str(tmp_path / "plan"), "--name", "order"),
        ):
            code, out, err = command("give-up", "--plan", *given, *WHY, "--yes")
            assert (code, out, err.count("\n")) == (Exit.USAGE, "", 1)

    def test_one_that_fails_by_itself(
        self, command: Command, make: Make, admin: psycopg.Connection, tmp_path: Path
    ) -> None:
        """Of a saga whose history can't be read that is told; the others are done, and told as well."""
        ids = make(3, steps=[STARTED])
        _, out, _ = command("give-up", "--name", "order", *WHY, "--dry-run", "--json")
        (tmp_path / "plan").write_text(out)
        log = "INSERT INTO saga_logs (saga_id, step_name, action, status, created_at) VALUES (%s, 'pay', 'act', %s, %s)"
        admin.execute(log, [ids[1], "COMPLETED", "-infinity"])
        code, out, _ = command("give-up", "--plan", str(tmp_path / "plan"), *WHY, "--yes", "--json")
        outcomes = {UUID(one["saga_id"]): one["outcome"] for one in json.loads(out)["results"]}
        assert (code, outcomes) == (Exit.PARTLY, {ids[0]: "done", ids[1]: "failed", ids[2]: "done"})
        assert statuses(admin, ids) == ["FAILED", "RUNNING", "FAILED"]
        admin.execute(log, [ids[1], "STARTED", "2026-01-01"])
        ids += make(1, steps=[STARTED])
        _, out, _ = command("settle", "--in-doubt", "--status", "FAILED", *WHY, "--dry-run", "--json")
        assert json.loads(out)["left_out"] == {"a history that can't be read": 1}
        assert str(ids[3]) in {one["saga_id"] for one in json.loads(out)["plan"]}

    @pytest.mark.parametrize(("first", "told"), [("done", ["done", "unknown", "not tried"]), ("raises", None)])
    def test_an_error_that_nobody_foresaw(
        self, command: Command, make: Make, monkeypatch: pytest.MonkeyPatch, first: str, told: list[str] | None
    ) -> None:
        """What was written before is told; if there is nothing of the kind the error alone is."""
        ids = make(3)
        give_up, calls = SqlAlchemySagaStorage.give_up_saga, [first, "raises", "done"]

        async def breaking(self: SqlAlchemySagaStorage, saga_id: UUID, **given: Any) -> None:  # noqa: ANN401 - whatever
            if calls.pop(0) == "raises":
                raise SQLAlchemyError("out of the blue")
            await give_up(self, saga_id, **given)

        monkeypatch.setattr(SqlAlchemySagaStorage, "give_up_saga", breaking)
        code, out, err = command("give-up", "--name", "order", *WHY, "--yes", "--json")
        assert (code, "out of the blue" in err) == (Exit.FAILED, True)
        facts = json.loads(out)
        assert [one["outcome"] for one in facts.get("results", [])] == (told or [])
        assert ("error" in facts) is (told is None)
        assert len(ids) == len(calls) + (2 if told else 1)

    def test_ctrl_c_in_the_middle(self, database: Database, make: Make, admin: psycopg.Connection) -> None:
        """What was done is told, and of what was under way that nobody knows: exit code 130."""
        ids = make(3)
        with psycopg.connect(database.url()) as worker:
            worker.execute("SELECT FROM saga_executions WHERE id = %s FOR UPDATE", [ids[1]])
            with process(database, "give-up", "--name", "order", *WHY, "--yes", "--json") as running:
                wait_until_it_goes_on(admin, ids[2:])
                running.send_signal(signal.SIGINT)
                out, err = running.communicate(timeout=60)
        assert (running.returncode, "Traceback" in err) == (Exit.INTERRUPTED, False)
        outcomes = [(one["saga_id"], one["outcome"]) for one in json.loads(out)["results"]]
        assert outcomes == [(str(ids[2]), "done"), (str(ids[1]), "unknown"), (str(ids[0]), "not tried")]
        assert statuses(admin, ids) == ["RUNNING", "RUNNING", "FAILED"]


def test_the_server_dies_in_the_middle() -> None:
    """What was done stays done and is told, what failed too, and the rest isn't tried: exit code 9."""
    with restartable() as server:
        url = server.facts.url
        schema.upgrade(url)
        database = Database(make_url(url))
        ids = make_sagas(database, 3)
        # Its own connection is lost as well.
        with (
            suppress(psycopg.OperationalError),
            psycopg.connect(url) as worker,
            psycopg.connect(url, autocommit=True) as admin,
        ):
            worker.execute("SELECT FROM saga_executions WHERE id = %s FOR UPDATE", [ids[1]])
            with process(database, "give-up", "--name", "order", *WHY, "--yes", "--json") as running:
                wait_until_it_goes_on(admin, ids[2:])
                server.kill()
                out, err = running.communicate(timeout=60)
        assert (running.returncode, "Traceback" in err) == (Exit.PARTLY, False)
        done, lost, rest = json.loads(out)["results"]
        assert [one["saga_id"] for one in (done, lost, rest)] == [str(saga_id) for saga_id in reversed(ids)]
        # Whether the server had got the write when it died depends on the moment.
        assert (done["outcome"], lost["outcome"] in {"failed", "unknown"}, rest["outcome"]) == (
            "done",
            True,
            "not tried",
        )
        server.start()
        server.wait_until_ready()
        with psycopg.connect(url, autocommit=True) as admin:
            assert statuses(admin, ids) == ["RUNNING", "RUNNING", "FAILED"]


class TestAsking:
    def test_between_the_question_and_the_answer(
        self, database: Database, make: Make, admin: psycopg.Connection
    ) -> None:
        """A person sees the plan; what changes before they say yes is left alone, and what comes isn't touched."""
        ids = make(3, steps=[STARTED])
        url = database.url()
        with Terminal.running("saga", "give-up", "--name", "order", *WHY, "--url", url, columns=80) as terminal:
            terminal.wait_for("Give up 3 sagas? [y/N]")
            assert all(saga_id.hex[:8] in terminal.text for saga_id in ids)
            admin.execute("UPDATE saga_executions SET version = 2, status = 'COMPENSATING' WHERE id = %s", [ids[0]])
            # This leaves the version, but it is a sign of life.
            admin.execute(
                "INSERT INTO saga_logs (saga_id, step_name, action, status) VALUES (%s, 'pay', 'act', 'COMPLETED')",
                [ids[1]],
            )
            ids += make(1)
            terminal.type("y\n")
            assert terminal.end() == Exit.PARTLY
        assert "1 of 3 sagas: given up; 2 changed" in terminal.text
        assert statuses(admin, ids) == ["COMPENSATING", "RUNNING", "FAILED", "RUNNING"]

    def test_if_all_have_changed(self, database: Database, make: Make, admin: psycopg.Connection) -> None:
        """Nothing is written, and that is exit code 8."""
        [saga_id] = make(1)
        url = database.url()
        with Terminal.running("saga", "give-up", "--name", "order", *WHY, "--url", url, columns=60) as terminal:
            terminal.wait_for("Give up 1 saga? [y/N]")
            admin.execute("UPDATE saga_executions SET version = 9")
            terminal.type("yes\n")
            assert terminal.end() == Exit.REFUSED
        assert rows(admin)[saga_id] == ("RUNNING", 9, 0, None)

    @pytest.mark.parametrize(("answer", "code"), [("n\n", Exit.REFUSED), ("\x03", Exit.INTERRUPTED)])
    def test_no(self, database: Database, make: Make, admin: psycopg.Connection, answer: str, code: int) -> None:
        """Whatever isn't yes is no."""
        ids = make(2)
        url = database.url()
        with Terminal.running("saga", "give-up", "--name", "order", *WHY, "--url", url, columns=60) as terminal:
            terminal.wait_for("[y/N]")
            terminal.type(answer)
            assert terminal.end() == code
        assert statuses(admin, ids) == ["RUNNING"] * 2
        assert "Traceback" not in terminal.text


@pytest.mark.parametrize("verb", ["settle", "give-up", "break-lease"])
def test_a_worker_under_a_live_lease_is_fenced(
    database: Database, make: Make, admin: psycopg.Connection, verb: str
) -> None:
    """A process in the middle of a step, its lease alive, is refused when it commits; nothing of it is stored."""
    [saga_id] = make(1)
    worker_command = [sys.executable, "-m", "tests.fenced_worker", database.url("asyncpg"), str(saga_id)]
    pipe = subprocess.PIPE
    with subprocess.Popen(worker_command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as worker:
        assert worker.stdout
        assert worker.stdout.readline() == "started\n"
        held = "SELECT lease_owner, lease_expires_at > now() + interval '30 minutes' FROM saga_executions"
        assert admin.execute(held).fetchone() == ("worker-1", True)
        outcome = ("--status", "COMPLETED") if verb == "settle" else ()
        with process(database, verb, str(saga_id), *outcome, *WHY) as running:
            out, err = running.communicate(timeout=60)
        assert running.returncode == Exit.DONE, err
        assert str(saga_id) in out
        before = rows(admin)
        said, _ = worker.communicate("go on\n", timeout=60)
    assert (said, worker.returncode) == ("refused\n", 0)
    assert rows(admin) == before
    assert before[saga_id][0] == ("FAILED" if verb == "give-up" else "RUNNING")
    assert before[saga_id][3] is None
    entries = admin.execute("SELECT step_name, status, details FROM saga_logs ORDER BY id").fetchall()
    assert entries[0] == ("pay", "STARTED", None)
    assert all("by the worker" not in (details or "") for _, _, details in entries)
    if verb == "settle":
        assert [(step, status) for step, status, _ in entries[1:]] == [
            ("pay", "COMPLETED"),
            ("saga_store.settle_step", "COMPLETED"),
        ]


@pytest.mark.parametrize("driver", ["postgresql", "postgresql+asyncpg"])
def test_a_role_hears_which_grant_it_lacks(
    command: Command, make: Make, database: Database, admin: psycopg.Connection, driver: str
) -> None:
    """In one line; who runs what it says has what it takes, to look and to intervene."""
    [saga_id] = make(1)
    role = f'odd "role" {uuid4().hex[:8]}'
    admin.execute(SQL("CREATE ROLE {} LOGIN PASSWORD 'secret'").format(Identifier(role)))
    url = make_url(database.url()).set(drivername=driver, username=role, password="secret")  # noqa: S106 - the test's own
    where = ("--url", url.render_as_string(hide_password=False))
    try:
        admin.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        for verb in (("list",), ("give-up", str(saga_id), *WHY)):
            code, out, err = command(*verb, *where)
            assert (code, out, err.count("\n")) == (Exit.FAILED, "", 1)
            assert "42501" in err
            assert role in err
            admin.execute(err[err.index("GRANT ") :].encode())
            assert command(*verb, *where)[0] == Exit.DONE
        assert statuses(admin, [saga_id]) == ["FAILED"]
    finally:
        admin.execute(SQL("DROP OWNED BY {}").format(Identifier(role)))
        admin.execute(SQL("DROP ROLE {}").format(Identifier(role)))
