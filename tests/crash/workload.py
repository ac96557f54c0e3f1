"""What a client asks of its storage: all ways to write, to sagas of its own and to sagas that others write, too."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import Any
from uuid import UUID, uuid5

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from saga_store import (
    Checkpoint,
    ISagaStorage,
    LogStep,
    SagaArchivedError,
    SagaNotFoundError,
    SagaRun,
    SagaStatus,
    SagaStepStatus,
    SagaStoreError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.errors import SchemaError
from saga_store.sharding import ShardedSagaStorage
from saga_store.storage import SagaStorage
from tests.crash.journal import Answer, Answered, Asked, Journal, now
from tests.crash.tables import details

SHARED = UUID("5a6a0000-0000-4000-8000-000000000000")
SHARED_AT_ONCE = 3
SHARED_VERSIONS = 60
STATUSES = tuple(SagaStatus)
NAME = "crash"
# Some entries are long, so that a small disk fills up soon.
PADDING = (0, 0, 0, 1500)
PAUSE_SECONDS = 0.05
LONGEST_COMMIT_SECONDS = 0.005


class Client:
    """Asks, and notes what it asked and what it was told."""

    def __init__(
        self, storage: SagaStorage, engines: Sequence[AsyncEngine], journal: Journal, name: str, *, ordered: bool
    ) -> None:
        self.storage = storage
        self._engines = engines
        self.ordered = ordered
        self._journal = journal
        self._name = name
        self._asked = 0

    def asking(self, call: str, saga: UUID, **facts: Any) -> Asked:  # noqa: ANN401 - what Asked takes
        self._asked += 1
        return Asked(f"{self._name}.{self._asked}", call, str(saga), now(), **facts)

    def engine_of(self, saga: UUID) -> AsyncEngine:
        """Return the engine on the saga's database."""
        return self._engines[self.storage.shard_of(saga) if isinstance(self.storage, ShardedSagaStorage) else 0]

    async def ask(self, asked: Asked, call: Callable[[], Awaitable[int | None]]) -> Answered:
        await self._journal.note(asked)
        return await self.call(asked, call)

    async def ask_at_once(self, calls: Sequence[tuple[Asked, Callable[[], Awaitable[int | None]]]]) -> None:
        """Ask for several, in this order, without waiting for one before the next."""
        await asyncio.gather(*(self._journal.note(asked) for asked, _ in calls))
        await asyncio.gather(*(self.call(asked, call) for asked, call in calls))

    async def call(self, asked: Asked, call: Callable[[], Awaitable[int | None]]) -> Answered:
        try:
            version = await call()
        except Exception as exc:  # noqa: BLE001 - what isn't of the contract is for the checker to report
            code = getattr(exc, "sqlstate", None)
            error = type(exc).__name__ if isinstance(exc, SagaStoreError) else repr(exc)
            if not isinstance(exc, SagaStoreError):  # of which nothing is known but where it comes from
                frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in extract_tb(exc.__traceback__)]
                exc.add_note(" ".join(frames))
            notes = "; ".join(getattr(exc, "__notes__", ()))
            answered = Answered(asked.token, _meaning(exc), now(), error=error, code=code, notes=notes)
        else:
            answered = Answered(asked.token, Answer.OK, now(), version)
        await self._journal.note(answered)
        if answered.answer in {Answer.UNAVAILABLE, Answer.UNKNOWN}:
            await asyncio.sleep(PAUSE_SECONDS)  # the server is down, perhaps
        return answered


def _meaning(exc: Exception) -> Answer:
    if isinstance(exc, UnknownOutcomeError):
        return Answer.UNKNOWN
    if isinstance(exc, StorageUnavailableError | SchemaError):
        return Answer.UNAVAILABLE
    return Answer.REFUSED if isinstance(exc, SagaStoreError) else Answer.UNEXPECTED


def steps(token: str, count: int, padding: int = 0) -> tuple[LogStep, ...]:
    return tuple(
        LogStep(f"step {index}", "act", SagaStepStatus.COMPLETED, details(token, index, padding))
        for index in range(count)
    )


async def log(storage: ISagaStorage, saga: UUID, asked: Asked, padding: int = 0) -> None:
    for step in steps(asked.token, asked.steps, padding):
        await storage.log_step(saga, step.step_name, step.action, step.status, step.details)


@dataclass
class OwnSaga:
    """A saga that one task writes, with each method of the contract, and knows the version of as far as it can."""

    client: Client
    rng: random.Random
    saga: UUID
    version: int | None = None
    # Once the outcome of a status alone is open, the checker couldn't tell the next one from it.
    sets_status: bool = True
    seen: list[str] = field(default_factory=list)

    async def create(self) -> bool:
        asked = self.client.asking("create_saga", self.saga, creates=True, context=True)
        answered = await self.client.ask(
            asked, lambda: self.client.storage.create_saga(self.saga, NAME, {"token": asked.token})
        )
        self.version = 1
        return answered.answer is Answer.OK

    async def write(self) -> None:
        ways = [self.log, self.change_context, self.checkpoint, self.log_fenced, self.run]
        if self.sets_status:
            ways.append(self.change_status)
        if self.client.ordered:
            ways.append(self.burst)
        if self.version is None:
            await self.look()
        await self.rng.choice(ways)()

    async def look(self) -> None:
        """Find out the version, and read as an engine does."""
        try:
            await self.client.storage.load_saga_state(self.saga)
            await self.client.storage.get_step_history(self.saga)
            self.version = (await self.client.storage.get_saga(self.saga)).version
        except SagaArchivedError:
            pass  # whatever is written to it is refused, until it is restored
        except StorageUnavailableError:
            await asyncio.sleep(PAUSE_SECONDS)

    async def log(self) -> None:
        asked = self.client.asking("log_step", self.saga, steps=1)
        padding = self.rng.choice(PADDING)
        await self.client.ask(asked, lambda: log(self.client.storage, self.saga, asked, padding))

    async def change_context(self) -> None:
        expects = self._maybe_expects()
        asked = self.client.asking(
            "update_context", self.saga, context=True, fenced=expects is not None, expects=expects
        )
        context = {"token": asked.token}
        await self._change(
            asked, lambda: self.client.storage.update_context(self.saga, context, expected_version=expects)
        )

    async def change_status(self) -> None:
        expects = self._maybe_expects()
        status = self.rng.choice(STATUSES)
        asked = self.client.asking(
            "update_status", self.saga, status=status, fenced=expects is not None, expects=expects
        )
        answered = await self._change(
            asked, lambda: self.client.storage.update_status(self.saga, status, expected_version=expects)
        )
        self.sets_status = answered.answer is not Answer.UNKNOWN

    async def checkpoint(self) -> None:
        expects = self._maybe_expects()
        status, count = self.rng.choice(STATUSES), self.rng.randint(1, 4)
        asked = self.client.asking(
            "save", self.saga, status=status, context=True, steps=count, fenced=expects is not None, expects=expects
        )
        checkpoint = Checkpoint(
            self.saga,
            status=status,
            context={"token": asked.token},
            steps=steps(asked.token, count, self.rng.choice(PADDING)),
            expected_version=expects,
        )
        await self._change(asked, lambda: self.client.storage.save(checkpoint))

    async def log_fenced(self) -> None:
        if self.version is None:
            return
        count = self.rng.randint(1, 3)
        asked = self.client.asking("save", self.saga, steps=count, fenced=True, expects=self.version)
        checkpoint = Checkpoint(self.saga, steps=steps(asked.token, count), expected_version=self.version)
        await self._change(asked, lambda: self.client.storage.save(checkpoint))

    async def run(self) -> None:
        await run(self.client, self.rng, self.saga)
        self.version = None

    async def burst(self) -> None:
        """Several calls at once: their order is that of the calls."""
        lane = f"{self.saga}/{now()}"
        calls: list[tuple[Asked, Callable[[], Awaitable[int | None]]]] = []
        for _ in range(self.rng.randint(2, 5)):
            if self.rng.random() < 0.5:
                asked = self.client.asking("log_step", self.saga, steps=1, lane=lane)
                calls.append((asked, lambda asked=asked: log(self.client.storage, self.saga, asked)))  # type: ignore[misc] # mypy can't infer a lambda with a default
            else:
                asked = self.client.asking("update_context", self.saga, context=True, lane=lane)
                calls.append(
                    (
                        asked,
                        lambda asked=asked: self.client.storage.update_context(self.saga, {"token": asked.token}),  # type: ignore[misc] # as above
                    )
                )
        await self.client.ask_at_once(calls)
        self.version = None

    async def _change(self, asked: Asked, call: Callable[[], Awaitable[int | None]]) -> Answered:
        answered = await self.client.ask(asked, call)
        if answered.answer is not Answer.OK:
            self.version = None
        elif self.version is not None and asked.changes_row:
            self.version += 1
        return answered

    def _maybe_expects(self) -> int | None:
        return self.version if self.rng.random() < 0.5 else None


async def run(client: Client, rng: random.Random, saga: UUID) -> Answered:
    """Write a scoped run; sometimes log entries alone."""
    count, changes = rng.randint(1, 3), rng.random() < 0.7
    status = rng.choice(STATUSES) if changes else None
    way: Callable[[SagaRun], Awaitable[None]]
    chance = rng.random()
    if chance < 0.2:
        call, way = "run, into a session", partial(into_a_session, saga=saga, engine=client.engine_of(saga), rng=rng)
    elif chance < 0.4:
        call, way = "run, cancelled and repeated", partial(cancelled_and_repeated, rng=rng)
    else:
        call, way = "run", SagaRun.commit
    # Of a COMMIT of the application's the storage need not find out what came.
    fenced = call != "run, into a session"
    asked = client.asking(call, saga, status=status, context=changes, steps=count, fenced=fenced)

    async def commit() -> int | None:
        async with client.storage.run(saga) as unit:
            if status:
                await unit.update_status(saga, status)
                await unit.update_context(saga, {"token": asked.token})
            await log(unit, saga, asked)
            await way(unit)
            return unit.version

    return await client.ask(asked, commit)


async def cancelled_and_repeated(unit: SagaRun, rng: random.Random) -> None:
    """Cancel a commit wherever it is, and call it again: what is buffered comes once."""
    first = asyncio.ensure_future(unit.commit())
    await asyncio.sleep(rng.uniform(0, LONGEST_COMMIT_SECONDS))
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    await unit.commit()


async def into_a_session(unit: SagaRun, saga: UUID, engine: AsyncEngine, rng: random.Random) -> None:
    """Commit in a transaction of the application's; one time in five that is rolled back, and the run commits alone."""
    session = AsyncSession(engine)
    try:
        await unit.commit(into=session)
        commits = rng.random() < 0.8
        try:
            await (session.commit() if commits else session.rollback())
        except (SQLAlchemyError, OSError) as exc:
            # They are the application's: nobody repeats a COMMIT.
            raise UnknownOutcomeError(saga) if commits else StorageUnavailableError(str(exc)) from exc
    finally:
        with suppress(SQLAlchemyError, OSError):  # likewise: its ROLLBACK, on a connection that is gone
            await session.close()
    await unit.commit()  # what was rolled back is in the buffer again, and otherwise there is nothing


class SharedSagas:
    """Sagas that all clients write, each for a while; whoever comes first creates it."""

    def __init__(self, client: Client, rng: random.Random) -> None:
        self._client = client
        self._rng = rng
        self._generations = [0] * SHARED_AT_ONCE

    async def write(self) -> None:
        slot = self._rng.randrange(SHARED_AT_ONCE)
        saga = uuid5(SHARED, f"{slot}/{self._generations[slot]}")
        try:
            version = (await self._client.storage.get_saga(saga)).version
        except SagaArchivedError:
            self._generations[slot] += 1
            return
        except SagaNotFoundError:
            await self._create(saga)
            return
        except StorageUnavailableError:
            await asyncio.sleep(PAUSE_SECONDS)
            return
        if version >= SHARED_VERSIONS:
            self._generations[slot] += 1
        way = self._rng.random()
        if way < 0.4:
            await self._save(saga, version)
        elif way < 0.6:
            await run(self._client, self._rng, saga)
        elif way < 0.8:
            await self._save(saga, None)
        else:
            asked = self._client.asking("log_step", saga, steps=1)
            await self._client.ask(asked, lambda: log(self._client.storage, saga, asked))

    async def _create(self, saga: UUID) -> None:
        asked = self._client.asking("save", saga, creates=True, context=True, steps=2)
        checkpoint = Checkpoint(saga, name=NAME, context={"token": asked.token}, steps=steps(asked.token, 2))
        await self._client.ask(asked, lambda: self._client.storage.save(checkpoint))

    async def _save(self, saga: UUID, expects: int | None) -> None:
        count = self._rng.randint(0, 3)
        asked = self._client.asking(
            "save", saga, context=True, steps=count, fenced=expects is not None, expects=expects
        )
        checkpoint = Checkpoint(
            saga, context={"token": asked.token}, steps=steps(asked.token, count), expected_version=expects
        )
        await self._client.ask(asked, lambda: self._client.storage.save(checkpoint))
