"""The saga that every row runs, an order of three steps, and the crowd that runs it."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar
from uuid import UUID, uuid4

from benchmarks.machine import busy

NAME = "OrderSaga"
STEPS = ("ReserveStock", "TakePayment", "ShipParcel")
LOG_ENTRIES = 2 * len(STEPS)

T = TypeVar("T")


class Clock:
    """Remembers how long each call took, in seconds."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    async def time(self, call: Awaitable[T]) -> T:
        start = time.perf_counter()
        try:
            return await call
        finally:
            self.calls.append(time.perf_counter() - start)


RunSaga: TypeAlias = Callable[[Clock], Awaitable[None]]
"""Runs one new saga from its creation to COMPLETED, and has the clock time its calls."""


def new_order() -> dict[str, Any]:
    return {
        "order_id": "o-20300102-0042",
        "customer": "alice@example.org",
        "items": [{"sku": "book-17", "quantity": 1, "price": 24.5}, {"sku": "pen-3", "quantity": 2, "price": 5.75}],
        "total": 36.0,
        "receipts": {},
    }


def receipt(step: str) -> str:
    """Return what a step leaves in the context: there is nothing else that it does."""
    return f"{step}-20300102-0042"


class Words(NamedTuple):
    """A storage's own words for the statuses that the saga passes through."""

    running: Any
    completed: Any
    step_started: Any
    step_completed: Any


class SixMethods(Protocol):
    """What python-cqrs's storage and ours have in common."""

    async def create_saga(self, saga_id: UUID, name: str, context: dict[str, Any], /) -> None: ...

    async def update_context(self, saga_id: UUID, context: dict[str, Any], /) -> None: ...

    async def update_status(self, saga_id: UUID, status: Any, /) -> None: ...  # noqa: ANN401 - each has its own enum

    async def log_step(self, saga_id: UUID, step_name: str, action: Any, status: Any, /) -> None: ...  # noqa: ANN401


async def run_by_calls(storage: SixMethods, words: Words, clock: Clock) -> None:
    """Run a saga in 12 calls: create, RUNNING, three times STARTED, context and COMPLETED, and COMPLETED."""
    saga_id, order = uuid4(), new_order()
    await clock.time(storage.create_saga(saga_id, NAME, order))
    await clock.time(storage.update_status(saga_id, words.running))
    for step in STEPS:
        await clock.time(storage.log_step(saga_id, step, "act", words.step_started))
        order["receipts"][step] = receipt(step)
        await clock.time(storage.update_context(saga_id, order))
        await clock.time(storage.log_step(saga_id, step, "act", words.step_completed))
    await clock.time(storage.update_status(saga_id, words.completed))


async def run_crowd(run_saga: RunSaga, clock: Clock, *, at_a_time: int, tickets: Iterator[object]) -> int:
    """Run a saga for each ticket, so many at a time; return how many."""
    done = 0

    async def worker() -> None:
        nonlocal done
        for _ in tickets:
            await run_saga(clock)
            done += 1

    async with asyncio.TaskGroup() as workers:
        for _ in range(at_a_time):
            workers.create_task(worker())
    return done


def tickets_for(seconds: float) -> Iterator[None]:
    """Let sagas start for so long; those that have started are finished, and counted."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        yield


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one crowd did; ``cpu_seconds`` are the client's own, and ``busy_seconds`` those of all on this machine."""

    sagas: int
    seconds: float
    cpu_seconds: float
    busy_seconds: float | None
    calls: int
    p50: float
    p99: float


async def measure(run_saga: RunSaga, *, at_a_time: int, seconds: float) -> Measurement:
    clock = Clock()
    gc.collect()
    start, cpu_start, busy_start = time.perf_counter(), time.process_time(), busy()
    sagas = await run_crowd(run_saga, clock, at_a_time=at_a_time, tickets=tickets_for(seconds))
    elapsed, cpu, busy_end = time.perf_counter() - start, time.process_time() - cpu_start, busy()
    others = None if busy_start is None or busy_end is None else busy_end - busy_start
    ordered = sorted(clock.calls)
    return Measurement(sagas, elapsed, cpu, others, len(ordered), quantile(ordered, 0.5), quantile(ordered, 0.99))


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
