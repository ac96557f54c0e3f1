"""Real storages that are broken in one way each are found out by the crash test's journals, tables and checker."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store import Checkpoint, SagaStatus
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.connections import engine_on
from tests.crash import broken, tables
from tests.crash.checker import Fault, check
from tests.crash.journal import Answered, Journal, Record
from tests.crash.tables import AUDIT
from tests.crash.workload import Client, steps
from tests.databases import Database
from tests.proxy import Cut, Proxy


@dataclass
class Scene:
    """A client of a storage behind a proxy, with a journal, and a saga that was created rightly."""

    database: Database
    proxy: Proxy
    client: Client
    journals: Path
    saga: UUID

    async def save(self, expects: int | None = None) -> Answered:
        what = self.client.asking("save", self.saga, status="RUNNING", context=True, steps=2, expects=expects)
        checkpoint = Checkpoint(
            self.saga,
            status=SagaStatus.RUNNING,
            context={"token": what.token},
            steps=steps(what.token, 2),
            expected_version=expects,
        )
        return await self.client.ask(what, lambda: self.client.storage.save(checkpoint))

    def faults(self) -> set[Fault]:
        operations = Record.of(self.journals).operations()
        return {finding.fault for finding in check(operations, tables.read([self.database.url()])).findings}


@asynccontextmanager
async def scene(
    kind: Callable[[AsyncEngine], SqlAlchemySagaStorage], driver: str, database: Database, folder: Path
) -> AsyncIterator[Scene]:
    with psycopg.connect(database.url(), autocommit=True) as admin:
        admin.execute(AUDIT.encode())
    async with Proxy.before(database.url(driver)) as (proxy, url), engine_on(url) as engine:
        right, broken_one = SqlAlchemySagaStorage(engine), kind(engine)
        client = Client(broken_one, [engine], Journal(folder / "1.jsonl"), "1", ordered=True)
        saga = uuid4()
        created = client.asking("create_saga", saga, creates=True, context=True)
        await client.ask(created, lambda: right.create_saga(saga, "crash", {"token": created.token}))
        yield Scene(database, proxy, client, folder, saga)


async def undisturbed(scene: Scene) -> None:
    for _ in range(4):
        await scene.save()


async def executed_then_lost(scene: Scene) -> None:
    """The first write prepares the statement, so that the second one is a single round trip."""
    await undisturbed(scene)
    scene.proxy.cut = Cut.BEFORE_ANSWER
    await scene.save()


async def cut_after_the_answer(scene: Scene) -> None:
    await scene.save()
    scene.proxy.sever()
    if isinstance(scene.client.storage, broken.AcknowledgesBeforeCommit):
        with pytest.raises(DBAPIError):
            await scene.client.storage.commit()


async def cut_between_transactions(scene: Scene) -> None:
    """The first round trip of a storage that needs two has gone through, and the second never arrives."""
    await undisturbed(scene)
    scene.proxy.cut, scene.proxy.let_pass = Cut.BEFORE_SENDING, 1
    await scene.save()
    scene.proxy.cut = None


async def two_at_one_version(scene: Scene) -> None:
    await scene.save(expects=1)
    await scene.save(expects=1)


Act = Callable[[Scene], Awaitable[None]]
ACTS: list[Act] = [
    undisturbed,
    executed_then_lost,
    cut_after_the_answer,
    cut_between_transactions,
    two_at_one_version,
]
BROKEN: list[tuple[type[SqlAlchemySagaStorage], Act, Fault]] = [
    (broken.AcknowledgesBeforeCommit, cut_after_the_answer, Fault.LOST),
    (broken.RetriesBlindly, executed_then_lost, Fault.DUPLICATED),
    (broken.DeniesWhatItWrote, executed_then_lost, Fault.DENIED),
    (broken.Reorders, undisturbed, Fault.OUT_OF_ORDER),
    (broken.WritesLogsApart, undisturbed, Fault.HALF_WRITTEN),
    (broken.WritesLogsApart, cut_between_transactions, Fault.HALF_WRITTEN),
    (broken.ForgetsTheFence, two_at_one_version, Fault.WRONG_VERSION),
]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
class TestStorages:
    @pytest.mark.parametrize(("kind", "act", "fault"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
    async def test_a_broken_storage_is_found_out(  # noqa: PLR0913, PLR0917 - what it is run on
        self,
        kind: type[SqlAlchemySagaStorage],
        act: Act,
        fault: Fault,
        driver: str,
        database: Database,
        tmp_path: Path,
    ) -> None:
        """The verdict names the promise that the storage breaks."""
        async with scene(kind, driver, database, tmp_path) as set_up:
            await act(set_up)
            found = set_up.faults()

        assert fault in found

    @pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
    async def test_the_real_one_is_found_right(self, act: Act, driver: str, database: Database, tmp_path: Path) -> None:
        """The same happens to it, and the verdict names nothing."""
        async with scene(SqlAlchemySagaStorage, driver, database, tmp_path) as set_up:
            await act(set_up)
            found = set_up.faults()

        assert found == set()
