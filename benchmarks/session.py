"""One session of measuring: rounds in which every row has its turn at every crowd, then the counts."""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from benchmarks import ours
from benchmarks.beds import MIGRATED, Bed, make_beds
from benchmarks.claims import time_claims
from benchmarks.rows import CONNECTIONS, Row
from benchmarks.server import Server
from benchmarks.workload import Clock, Measurement, measure, run_crowd, tickets_for
from saga_store.sqlalchemy import SqlAlchemySagaStorage

# The crowds that update contexts, and how often each context is updated at most.
HOT_CROWDS = (1, 64)
HOT_UPDATES = 10
# PostgreSQL plans a prepared statement anew five times, on each connection, before it keeps a plan; and of a crowd the
# statements differ by what is written together, so that the last of them come late.
WARM_UP_SECONDS = 0.5
WARM_UP_CROWD = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        crowds: How many sagas at a time.
        rounds: How often each row has its turn at each crowd.
        seconds: How long sagas are started in a turn.
        budget: Make fewer rounds if they would take more seconds.
        pairs: Lonely calls of each kind in a round.
        counted: At least so many sagas are counted by.
        hot_sagas: So many sagas have their context updated, again and again.
        finished: Finished sagas among which stale ones are claimed.
        seed: Of the order of turns.
    """

    crowds: tuple[int, ...]
    rounds: int
    seconds: float
    budget: float
    pairs: int
    counted: int
    hot_sagas: int
    finished: int
    seed: int


@dataclass(slots=True)
class Findings:
    """By row and crowd: a measurement for each round, and what the server counted for one saga."""

    measurements: dict[tuple[str, int], list[Measurement]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[tuple[str, int], dict[str, float | None]] = field(default_factory=dict)
    lonely: list[tuple[float, float]] = field(default_factory=list)
    hot: dict[int, float] = field(default_factory=dict)
    claims: tuple[float, float] | None = None


class Session:
    """Measures rows on a server."""

    def __init__(self, server: Server, rows: tuple[Row, ...], plan: Plan, say: Callable[[str], None]) -> None:
        self._server = server
        self._rows = rows
        self._plan = plan
        self._say = say
        self._say("making the databases")
        self.beds = make_beds(server, rows)
        self.findings = Findings()

    def run(self) -> Findings:
        self._measure_rounds()
        self._say(f"claiming stale sagas, without and with {self._plan.finished:,} finished ones")
        claims = self._server.create("bench_claims", template=MIGRATED)
        self.findings.claims = time_claims(claims, finished=self._plan.finished)
        self._count_all()
        return self.findings

    def _measure_rounds(self) -> None:
        plan, start = self._plan, time.monotonic()
        order = random.Random(plan.seed)  # noqa: S311 - it shuffles turns
        for number in range(1, plan.rounds + 1):
            self._server.checkpoint()
            for crowd in order.sample(plan.crowds, len(plan.crowds)):
                # The rows of one crowd stand side by side, so that what is compared was measured within seconds.
                for row in order.sample(self._rows, len(self._rows)):
                    self._measure(row, crowd, f"round {number}/{plan.rounds}")
            self._measure_lonely_calls()
            taken = time.monotonic() - start
            if number < plan.rounds and taken * (number + 1) / number > plan.budget:
                self._say(f"stopping after {number} rounds, which took {taken:.0f} s")
                break

    def _measure(self, row: Row, crowd: int, where: str) -> None:
        bed = self.beds[row.key]

        async def turn() -> tuple[int, Measurement]:
            async with row.open(bed.url, CONNECTIONS) as run_saga:
                some = tickets_for(WARM_UP_SECONDS)
                warmed_up = await run_crowd(run_saga, Clock(), at_a_time=_warm(crowd), tickets=some)
                return warmed_up, await measure(run_saga, at_a_time=crowd, seconds=self._plan.seconds)

        warmed_up, measured = asyncio.run(turn())
        bed.settle(warmed_up + measured.sagas)
        self.findings.measurements[row.key, crowd].append(measured)
        self._say(f"{where}, {crowd:>3} at a time: {row.title:<44} {measured.sagas / measured.seconds:7,.0f} sagas/s")

    def _measure_lonely_calls(self) -> None:
        if bed := self.beds.get("methods"):
            pair = asyncio.run(ours.time_lonely_calls(bed.url, pairs=self._plan.pairs))
            self.findings.lonely.append(pair)

    def _count_all(self) -> None:
        self._server.begin_counting()
        for row in self._rows:
            self._say(f"counting statements: {row.title}")
            for crowd in self._plan.crowds:
                self.findings.counts[row.key, crowd] = self._count(row, crowd)
        if bed := self.beds.get("methods"):
            self._say("counting HOT updates")
            for crowd in HOT_CROWDS:
                self.findings.hot[crowd] = self._count_hot(bed, crowd)

    def _count(self, row: Row, crowd: int) -> dict[str, float | None]:
        bed, sagas = self.beds[row.key], max(crowd, self._plan.counted)

        async def turn(counted: int) -> None:
            async with row.open(bed.url, CONNECTIONS) as run_saga:
                for some in (2 * _warm(crowd), counted):
                    await run_crowd(run_saga, Clock(), at_a_time=crowd, tickets=_some(some))

        # What opening, warming up and closing costs falls out of the difference.
        without = self._server.count(bed.name, lambda: asyncio.run(turn(0)))
        whole = self._server.count(bed.name, lambda: asyncio.run(turn(sagas)))
        counters = whole - without
        bed.settle(4 * _warm(crowd) + sagas)
        return {
            "statements": counters.statements / sagas,
            "transactions": counters.transactions / sagas,
            "wal_bytes": counters.wal_bytes / sagas,
            "hot": whole.hot,
        }

    def _count_hot(self, bed: Bed, crowd: int) -> float:
        """Return which share of the updates of contexts alone is HOT."""
        ids = asyncio.run(ours.create_running(bed.url, self._plan.hot_sagas))

        async def turn() -> None:
            async with ours.engine_on(bed.url, connections=CONNECTIONS) as engine:
                update = ours.update_contexts(SqlAlchemySagaStorage(engine), ids)
                await run_crowd(update, Clock(), at_a_time=crowd, tickets=_some(len(ids) * min(crowd, HOT_UPDATES)))

        return self._server.count(bed.name, lambda: asyncio.run(turn())).hot or 0.0


def _warm(crowd: int) -> int:
    """Return how many warm up: connections are opened, statements prepared and plans cached when they have."""
    return min(crowd, WARM_UP_CROWD)


def _some(number: int) -> Iterator[int]:
    return iter(range(number))
