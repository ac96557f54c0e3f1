"""Settings of databases, roles and clients, none of which changes what is written or read."""

import asyncio
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from uuid import uuid4

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from saga_store import InvalidSagaDataError, SagaNotFoundError, StorageUnavailableError
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.connections import engine_on
from tests.databases import Database, Databases
from tests.houses.life import live_through

MakeEngine = Callable[..., AsyncEngine]
WHOLE = os.environ.get("SAGA_STORE_TEST_HOUSES") == "complete"

# As they stand behind SET.
SETTINGS = [
    "datestyle = 'SQL, DMY'",
    "datestyle = 'German'",
    "timezone = 'Asia/Kathmandu'",
    "intervalstyle = 'sql_standard'",
    "client_encoding = 'LATIN9'",
    "bytea_output = 'escape'",
    "array_nulls = off",
    "extra_float_digits = -15",
    "standard_conforming_strings = off",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_isolation = 'repeatable read'",
    "default_transaction_deferrable = on",
    "statement_timeout = '20s'",
    "lock_timeout = '5s'",
    "idle_in_transaction_session_timeout = '20s'",
    'search_path = "$user", public',
    "search_path = public, pg_catalog",
    "row_security = off",
    "quote_all_identifiers = on",
    "plan_cache_mode = force_generic_plan",
    "plan_cache_mode = force_custom_plan",
    "synchronous_commit = off",
    "enable_indexscan = off",
    "session_replication_role = replica",
    "lc_messages = 'C'",
    "xmloption = document",
]
# What has shown faults, or is the likeliest to.
SAMPLE = {0, 2, 3, 4, 5, 6, 9, 12, 13, 16}


@pytest.fixture(params=[s for n, s in enumerate(SETTINGS) if WHOLE or n in SAMPLE])
def house(request: pytest.FixtureRequest, databases: Databases, template: Database) -> Iterator[Database]:
    with databases.clone(template) as database:
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute(SQL("ALTER DATABASE {} SET ").format(Identifier(database.name)) + SQL(request.param))
        yield database


async def test_a_saga_s_life(house: Database, driver: str) -> None:
    """By an engine, a sessionmaker, a session and a connection."""
    async with engine_on(house.url(driver)) as engine:
        await live_through(SqlAlchemySagaStorage(engine))
        await live_through(SqlAlchemySagaStorage(async_sessionmaker(engine), group_commit=False))
        async with AsyncSession(engine) as session:
            await live_through(SqlAlchemySagaStorage(session))
            await session.commit()
        async with engine.connect() as connection:
            await live_through(SqlAlchemySagaStorage(connection))
            await connection.commit()


@pytest.mark.parametrize(
    "options",
    [
        {"poolclass": NullPool},
        {"pool_size": 1, "max_overflow": 0},
        {"pool_size": 3, "max_overflow": 0, "pool_use_lifo": True, "pool_pre_ping": True},
        {"poolclass": AsyncAdaptedQueuePool, "pool_recycle": 0},
        {"isolation_level": "AUTOCOMMIT"},
        {"isolation_level": "SERIALIZABLE"},
        {"pool_reset_on_return": None},
    ],
    ids=str,
)
async def test_pools_of_all_kinds(make_engine: MakeEngine, driver: str, options: dict[str, object]) -> None:
    await live_through(SqlAlchemySagaStorage(make_engine(driver, **options)))


async def test_a_read_only_default_is_refused(make_engine: MakeEngine, driver: str, admin: psycopg.Connection) -> None:
    """Reads work; a write says what stands in its way."""
    admin.execute(f"ALTER DATABASE {admin.info.dbname} SET default_transaction_read_only = on".encode())
    storage = SqlAlchemySagaStorage(make_engine(driver), retry_for=timedelta())
    with pytest.raises(StorageUnavailableError, match="default_transaction_read_only"):
        await storage.create_saga(uuid4(), "order", {})
    with pytest.raises(SagaNotFoundError):
        await storage.get_saga(uuid4())


ENCODED = {
    "asyncpg": {"server_settings": {"client_encoding": "LATIN1"}},
    "psycopg": {"client_encoding": "LATIN1"},
}


async def test_a_text_that_the_client_encoding_can_t_hold(
    make_engine: MakeEngine, driver: str, admin: psycopg.Connection
) -> None:
    """It is its own caller's error, the neighbours' writes are stored; and what is stored already can be read."""
    storage = SqlAlchemySagaStorage(make_engine(driver, connect_args=ENCODED[driver]))
    names = ["café"] * 10 + ["7 €"] + ["thé"] * 10
    ids = [uuid4() for _ in names]
    pairs = zip(ids, names, strict=True)
    answers = await asyncio.gather(*(storage.create_saga(*pair, {"€": 1}) for pair in pairs), return_exceptions=True)
    assert isinstance(answers.pop(10), InvalidSagaDataError)
    assert answers == [None] * 20
    with pytest.raises(SagaNotFoundError):
        await storage.get_saga(ids[10])
    admin.execute("UPDATE saga_executions SET name = '7 €', context = '{\"水\": 1}' WHERE id = %s", [ids[0]])
    saga = await storage.get_saga(ids[0])
    assert (saga.name, saga.context) == ("7 €", {"水": 1})
    assert len(await storage.find_stale_sagas(stale_after=timedelta())) == 20


async def test_a_timeout_of_statements_is_told_to_all_at_once(
    make_engine: MakeEngine, driver: str, admin: psycopg.Connection
) -> None:
    """A batch isn't tried again in halves for what is nobody's fault."""
    admin.execute(f"ALTER DATABASE {admin.info.dbname} SET statement_timeout = '200ms'".encode())
    storage = SqlAlchemySagaStorage(make_engine(driver))
    ids = [uuid4() for _ in range(32)]
    await asyncio.gather(*(storage.create_saga(saga_id, "order", {}) for saga_id in ids))
    with psycopg.connect(admin.info.dsn, password=admin.info.password) as holder:
        holder.execute("LOCK TABLE saga_executions IN ACCESS EXCLUSIVE MODE")
        calls = [storage.update_context(saga_id, {"n": 1}) for saga_id in ids]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(answer) for answer in answers} == {StorageUnavailableError}
    assert {getattr(answer, "sqlstate", None) for answer in answers} == {"57014"}
    # One statement of the first caller's, and two of the crowd behind it.
    assert len({id(getattr(answer, "__cause__", None)) for answer in answers}) <= 3
