"""A short form of `make crash`: each kind of fault, and nothing lost, twice, half-written or out of order.

What can be where, when something dies (c: client, s: server):

1. the statement hasn't left c: nothing is written, and c is told so, or that it isn't known;
2. it is under way, or waits in s for a lock: it may be executed after c has been told that it isn't known, and after
   other writes of c; so it may come late, but once;
3. s has executed it and hasn't committed: it is rolled back, whole;
4. s has committed and c wasn't told: it is there, whole;
5. c was told: it is there, whatever dies afterwards;
6. c dies at any of these: as if it had not been told.
"""

import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.crash.bed import in_memory
from tests.crash.checker import Fault, Finding, Verdict
from tests.crash.faults import FAULTS, schedule
from tests.crash.journal import Answer, Answered, Asked, Operation
from tests.crash.plan import Plan
from tests.crash.report import Result, summary
from tests.crash.run import crash

# Each kind once or twice; the writes between two of them are counted, so that no speed is presumed.
FAULT_COUNT = 16


class TestCrash:
    async def test_no_fault_breaks_a_promise(self, tmp_path: Path) -> None:
        """Of writes in flight while server, clients and connections die, each is as its caller was told."""
        plan = Plan("make test", FAULT_COUNT, clients=2, tasks=6, writes=(5, 40), folder=in_memory())
        result = await crash(plan, io.StringIO())

        assert not result.failed(definite=False), summary(result)
        assert result.faults.total() == FAULT_COUNT
        assert result.faults.keys() | set(result.left_out) == FAULTS.keys()
        assert result.verdict.answers[Answer.OK] > FAULT_COUNT
        assert result.verdict.answers[Answer.REFUSED] > 0
        result.save(tmp_path / "latest.json")
        assert json.loads((tmp_path / "latest.json").read_text())["found"]["lost"] == 0


class TestSchedule:
    def test_each_fault_comes_up(self) -> None:
        """Once at least, before any comes a second time by chance."""
        drawn = schedule(random.Random(1), list(FAULTS), len(FAULTS) + 3)  # noqa: S311 - repeatable

        assert set(drawn) == set(FAULTS)
        assert len(drawn) == len(FAULTS) + 3


UNDECIDED = Operation(Asked("x", "save", "a", at=0, fenced=True), Answered("x", Answer.UNKNOWN, at=5_200_000_000))


class TestResult:
    def test_any_finding_fails_the_run_and_is_shown(self) -> None:
        result = made(findings=[Finding(Fault.LOST, "a", "save x")])

        assert result.failed(definite=False)
        assert "lost: save x" in summary(result)

    def test_what_stayed_unknown_although_versioned_fails_it_where_that_is_asked_for(self) -> None:
        assert not made(undecided=[UNDECIDED]).failed(definite=False)
        assert made(undecided=[UNDECIDED]).failed(definite=True)
        assert not made().failed(definite=True)
        assert "save x: unknown after 5.2 s" in summary(made(undecided=[UNDECIDED]))


def made(*, undecided: Sequence[Operation] = (), findings: Sequence[Finding] = ()) -> Result:
    return Result("seed", "PostgreSQL 18", {}, 4, 1.0, Counter(), [], Verdict(Counter(), undecided, findings))
