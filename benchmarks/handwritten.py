"""The rows that a careful author would write for one saga only: asyncpg, SQL, and nothing else."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import asyncpg  # type: ignore[import-untyped] # it has no types

from benchmarks.workload import NAME, STEPS, Clock, RunSaga, Words, new_order, receipt, run_by_calls
from saga_store.sqlalchemy.group_commit import LEAST_SHARED, MAX_BATCH_ROWS, MAX_FLUSHES
from saga_store.sqlalchemy.write_parameters import ids_as_text
from saga_store.sqlalchemy.write_sql import APPEND, NEW, UPDATE, write_many, write_one

WORDS = Words("RUNNING", "COMPLETED", "STARTED", "COMPLETED")
CREATE = "INSERT INTO saga_executions (id, name, context) VALUES ($1, $2, $3)"
SET_STATUS = "UPDATE saga_executions SET status = $2, version = version + 1, updated_at = now() WHERE id = $1"
SET_CONTEXT = "UPDATE saga_executions SET context = $2, version = version + 1, updated_at = now() WHERE id = $1"
LOG = "INSERT INTO saga_logs (saga_id, step_name, action, status) VALUES ($1, $2, $3, $4)"


@asynccontextmanager
async def open_statements(url: str, connections: int) -> AsyncIterator["Statements"]:
    async with asyncpg.create_pool(
        url, min_size=1, max_size=connections, max_inactive_connection_lifetime=0, reset=_keep
    ) as pool:
        yield Statements(pool)


@asynccontextmanager
async def statements(url: str, connections: int) -> AsyncIterator[RunSaga]:
    async with open_statements(url, connections) as calls:
        yield partial(run_by_calls, calls, WORDS)


async def _keep(_connection: object) -> None:
    """Spare it the round trip that resets a connection: nothing here changes one."""


class Statements:
    """The calls, a statement each; they keep to what every revision of the schema has."""

    def __init__(self, pool: Any) -> None:  # noqa: ANN401 - asyncpg's pool is generic in private types
        self._pool = pool

    async def create_saga(self, saga_id: UUID, name: str, context: dict[str, Any], /) -> None:
        await self._pool.execute(CREATE, saga_id, name, json.dumps(context))

    async def update_context(self, saga_id: UUID, context: dict[str, Any], /) -> None:
        await self._pool.execute(SET_CONTEXT, saga_id, json.dumps(context))

    async def update_status(self, saga_id: UUID, status: str, /) -> None:
        await self._pool.execute(SET_STATUS, saga_id, status)

    async def log_step(self, saga_id: UUID, step_name: str, action: str, status: str, /) -> None:
        await self._pool.execute(LOG, saga_id, step_name, action, status)


class _Write(NamedTuple):
    answer: asyncio.Future[None]
    saga_id: UUID
    name: str | None
    status: str | None
    context: str | None
    steps: tuple[tuple[str, str], ...]


class Batches:
    """The floor: our statements and our way to batch, but nothing is checked, and nothing lies in between."""

    def __init__(self, savers: list["_Writer"]) -> None:
        self._idle = savers
        self._queue: list[_Write] = []
        self._in_flight = 0
        self._flushers: set[asyncio.Task[None]] = set()

    def write(
        self,
        saga_id: UUID,
        *,
        name: str | None = None,
        status: str | None = None,
        context: dict[str, Any] | None = None,
        steps: tuple[tuple[str, str], ...] = (),
    ) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        text = None if context is None else json.dumps(context)
        self._queue.append(_Write(loop.create_future(), saga_id, name, status, text, steps))
        answer = self._queue[-1].answer
        self._flush_what_is_queued()
        return answer

    def _flush_what_is_queued(self) -> None:
        worth_it = max(LEAST_SHARED, self._in_flight // 2) if len(self._idle) < MAX_FLUSHES else 1
        if self._idle and len(self._queue) >= worth_it:
            flusher = asyncio.get_running_loop().create_task(self._flush_all(self._idle.pop()))
            self._flushers.add(flusher)
            flusher.add_done_callback(self._flushers.discard)

    async def _flush_all(self, saver: "_Writer") -> None:
        while self._queue:
            share = len(self._queue)
            if share + self._in_flight >= 2 * LEAST_SHARED:
                share = (share + self._in_flight + 1) // 2
            share = min(share, MAX_BATCH_ROWS)
            batch, self._queue = self._queue[:share], self._queue[share:]
            self._in_flight += share
            self._flush_what_is_queued()
            await self._flush(saver, batch)
            self._in_flight -= share
        self._idle.append(saver)

    async def _flush(self, saver: "_Writer", batch: list[_Write]) -> None:
        try:
            written = await saver.save(batch)
        except Exception as exc:  # noqa: BLE001 - whatever it is, those who wait have to hear of it
            written, refusal = set(), exc
        else:
            refusal = RuntimeError("the saga is there already, or isn't there")
        for write in batch:
            if write.saga_id.int in written:
                write.answer.set_result(None)
            else:
                write.answer.set_exception(refusal)


class _Writer:
    """A connection, and the statements that it has prepared."""

    def __init__(self, connection: Any) -> None:  # noqa: ANN401 - asyncpg has no types
        self._connection = connection
        self._prepared: dict[str, Any] = {}

    async def save(self, batch: list[_Write]) -> set[int]:
        """Return the integers of the ids of the sagas that were written."""
        if len(batch) == 1:
            values = _values_of_one(*batch)
            statement = write_one(frozenset(values), waits=False)
        else:
            values = _values_of_many(batch)
            statement = write_many(frozenset(values))
        numbered = statement.spelled(None).numbered
        prepared = self._prepared.get(numbered)
        if prepared is None:
            prepared = self._prepared[numbered] = await self._connection.prepare(numbered)
        rows = await prepared.fetch(*[values.get(name) for name in statement.names])
        return {row[0].int for row in rows}


def _values_of_one(write: _Write) -> dict[str, Any]:
    values = {"saga_id": write.saga_id, "name": write.name, "status": write.status, "context": write.context}
    present = {name: value for name, value in values.items() if value is not None}
    if len(write.steps) == 1:
        [(name, status)] = write.steps
        present |= {f"{APPEND}step_name": name, f"{APPEND}step_action": "act", f"{APPEND}step_status": status}
    elif write.steps:
        present |= _steps([write])
    return present


def _values_of_many(batch: list[_Write]) -> dict[str, Any]:
    new = sorted([write for write in batch if write.name is not None], key=lambda write: write.saga_id.int)
    changed = [write for write in batch if write.name is None and (write.status is not None or write.context)]
    only_logged = [write for write in batch if write.name is None and write.status is None and write.context is None]
    values: dict[str, Any] = {}
    if new:
        values |= {NEW + name: column for name, column in _columns(new).items()}
        values[f"{NEW}name"] = [write.name for write in new]
    if changed:
        values |= {UPDATE + name: column for name, column in _columns(changed).items()}
    if any(write.steps for write in changed):
        values |= _steps(changed)
    if only_logged:
        values |= {APPEND + name: column for name, column in _steps(only_logged).items()}
    return values


def _columns(batch: list[_Write]) -> dict[str, Any]:
    return {
        "saga_id": ids_as_text(write.saga_id for write in batch),
        "status": ",".join(write.status or "" for write in batch),
        "context": [write.context for write in batch],
    }


def _steps(batch: list[_Write]) -> dict[str, Any]:
    steps = [(write.saga_id, *step) for write in batch for step in write.steps]
    return {
        "step_saga_id": ids_as_text(step[0] for step in steps),
        "step_name": [step[1] for step in steps],
        "step_action": ",".join(["act"] * len(steps)),
        "step_status": ",".join(step[2] for step in steps),
    }


@asynccontextmanager
async def _batches(url: str) -> AsyncIterator[Batches]:
    connections = [await asyncpg.connect(url) for _ in range(MAX_FLUSHES)]
    try:
        yield Batches([_Writer(connection) for connection in connections])
    finally:
        for connection in connections:
            await connection.close()


@asynccontextmanager
async def batched_calls(url: str, _connections: int) -> AsyncIterator[RunSaga]:
    async with _batches(url) as batches:
        yield partial(_run_by_calls, batches)


@asynccontextmanager
async def batched_checkpoints(url: str, _connections: int) -> AsyncIterator[RunSaga]:
    async with _batches(url) as batches:
        yield partial(_run_by_checkpoints, batches)


async def _run_by_calls(batches: Batches, clock: Clock) -> None:
    saga_id, order = uuid4(), new_order()
    await clock.time(batches.write(saga_id, name=NAME, context=order))
    await clock.time(batches.write(saga_id, status="RUNNING"))
    for step in STEPS:
        await clock.time(batches.write(saga_id, steps=((step, "STARTED"),)))
        order["receipts"][step] = receipt(step)
        await clock.time(batches.write(saga_id, context=order))
        await clock.time(batches.write(saga_id, steps=((step, "COMPLETED"),)))
    await clock.time(batches.write(saga_id, status="COMPLETED"))


async def _run_by_checkpoints(batches: Batches, clock: Clock) -> None:
    saga_id, order = uuid4(), new_order()
    await clock.time(batches.write(saga_id, name=NAME, context=order))
    await clock.time(batches.write(saga_id, status="RUNNING"))
    for step in STEPS:
        order["receipts"][step] = receipt(step)
        await clock.time(batches.write(saga_id, context=order, steps=((step, "STARTED"), (step, "COMPLETED"))))
    await clock.time(batches.write(saga_id, status="COMPLETED"))
