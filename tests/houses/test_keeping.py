"""Sagas are archived, verified, restored and forgotten alike, whatever a database, a pool or a driver has set."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.pool import NullPool

from saga_store import InvalidSagaDataError, SagaArchivedError, StorageUnavailableError
from saga_store.retention import Target, archive, find_archived, restore, verify
from saga_store.retention.target import Writing
from saga_store.retention_model import ArchiveState
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.connections import engine_on
from tests.databases import Database, Databases
from tests.houses.test_settings import ENCODED, SAMPLE, SETTINGS, WHOLE
from tests.retention.world import ALL, check_nothing_is_lost, make_finished, record, records

MakeEngine = Callable[..., AsyncEngine]


async def keep_through(storage: SqlAlchemySagaStorage, folder: Path) -> None:
    """Archive, verify, look up, restore, hold and release, archive again, forget."""
    target = Target(str(folder))
    originals = await records(storage, await make_finished(storage, 7))
    held, back, *_ = originals
    await storage.hold_saga(held, by="ann", reason="a court asks")
    done = await archive(storage, target, ALL, by="wörker", sagas_per_archive=3)
    assert (done.sagas, done.removed, done.is_complete, done.unreadable) == (6, 6, True, [])
    assert not (await verify(target, storage)).problems
    del originals[held]
    assert await check_nothing_is_lost(storage, target, originals) == originals.keys()
    with pytest.raises(SagaArchivedError) as caught:
        await storage.get_saga(back)
    assert caught.value.archive is not None
    found = await find_archived(storage, back)
    assert found is not None
    assert found.record == originals[back]
    await restore(storage, back)
    assert await record(storage, back) == originals[back]
    for saga_id in (held, back):
        await storage.release_saga(saga_id, by="ann", reason="closed")
    assert (await archive(storage, target, ALL, by="wörker")).removed == 2
    archives = (await storage.find_archives()).archives
    assert {row.state for row in archives} == {ArchiveState.REMOVED}
    assert {row.by for row in archives} == {"wörker"}
    forgotten = 0
    while gone := await storage.forget_stubs(older_than=timedelta()):
        forgotten += gone
    assert forgotten == 7


# Those that change what a statement of a second says, or how long it may take.
STRICT = ["statement_timeout = '1s'", "lock_timeout = '100ms'", "idle_in_transaction_session_timeout = '1s'"]


@pytest.fixture
def house_of_timeouts(databases: Databases, template: Database) -> Iterator[Database]:
    with databases.clone(template) as database:
        with psycopg.connect(database.url(), autocommit=True) as admin:
            for setting in STRICT:
                admin.execute(SQL("ALTER DATABASE {} SET ").format(Identifier(database.name)) + SQL(setting))
        yield database


@pytest.fixture(params=[s for n, s in enumerate(SETTINGS) if (WHOLE or n in SAMPLE) and "LATIN9" not in s] + STRICT)
def house(request: pytest.FixtureRequest, databases: Databases, template: Database) -> Iterator[Database]:
    with databases.clone(template) as database:
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute(SQL("ALTER DATABASE {} SET ").format(Identifier(database.name)) + SQL(request.param))
        yield database


async def test_settings(house: Database, driver: str, tmp_path: Path) -> None:
    async with engine_on(house.url(driver)) as engine:
        await keep_through(SqlAlchemySagaStorage(engine), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"poolclass": NullPool},
        {"pool_size": 2, "max_overflow": 0},
        {"pool_size": 3, "max_overflow": 0, "pool_use_lifo": True, "pool_pre_ping": True},
        {"isolation_level": "AUTOCOMMIT"},
        {"isolation_level": "SERIALIZABLE"},
        {"pool_reset_on_return": None},
    ],
    ids=str,
)
async def test_pools(make_engine: MakeEngine, driver: str, options: dict[str, object], tmp_path: Path) -> None:
    await keep_through(SqlAlchemySagaStorage(make_engine(driver, **options)), tmp_path)


async def test_a_sessionmaker(make_engine: MakeEngine, driver: str, tmp_path: Path) -> None:
    maker = async_sessionmaker(make_engine(driver))
    await keep_through(SqlAlchemySagaStorage(maker, group_commit=False), tmp_path)


async def test_a_pool_of_one_is_too_small(make_engine: MakeEngine, driver: str, tmp_path: Path) -> None:
    """For an archiver has its turn by one connection, and works by others."""
    storage = SqlAlchemySagaStorage(make_engine(driver, pool_size=1, max_overflow=0, pool_timeout=0.5))
    [saga_id] = await make_finished(storage, 1)
    with pytest.raises(StorageUnavailableError, match="larger pool_size"):
        await archive(storage, Target(str(tmp_path)), ALL)
    assert await storage.find_stub(saga_id) is None


async def test_a_client_encoding_that_can_t_hold_it(make_engine: MakeEngine, driver: str, tmp_path: Path) -> None:
    """What others wrote is archived all the same; it comes back over a connection that can hold it, or not at all."""
    storage, target = SqlAlchemySagaStorage(make_engine(driver)), Target(str(tmp_path))
    originals = await records(storage, await make_finished(storage, 7))
    archiver = SqlAlchemySagaStorage(make_engine(driver, connect_args=ENCODED[driver]))
    assert (await archive(archiver, target, ALL)).removed == 7
    assert await check_nothing_is_lost(archiver, target, originals) == originals.keys()
    with pytest.raises(InvalidSagaDataError, match=r"line 1 to 7: .*codec can't encode"):
        await restore(archiver, archive=target)
    assert await check_nothing_is_lost(storage, target, originals) == originals.keys()
    assert (await restore(storage, archive=target)).restored == 7
    assert await records(storage, originals) == originals


async def test_a_slow_target_under_timeouts(
    house_of_timeouts: Database, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the database's waits for it idly."""
    finish = Writing.finish

    async def slow(writing: Writing) -> None:
        await asyncio.sleep(1.5)
        await finish(writing)

    monkeypatch.setattr(Writing, "finish", slow)
    async with engine_on(house_of_timeouts.url(driver)) as engine:
        await keep_through(SqlAlchemySagaStorage(engine), tmp_path)
