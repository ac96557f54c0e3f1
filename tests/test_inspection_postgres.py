"""What views do on PostgreSQL where roles, rows and settings aren't what one would expect."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TypeAlias
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus, StorageUnavailableError
from saga_store.inspection import SagaCondition, SagaQuery
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.statement import Statement
from tests.databases import Database

pytestmark = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])

MakeEngine: TypeAlias = Callable[..., AsyncEngine]
View: TypeAlias = Callable[[SqlAlchemySagaStorage], Awaitable[object]]

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
VIEWS: list[View] = [
    lambda storage: storage.find_sagas(),
    lambda storage: storage.find_sagas(SagaQuery(conditions=[SagaCondition.STALE], context={"a": 1})),
    lambda storage: storage.count_sagas(),
    lambda storage: storage.group_sagas(),
    lambda storage: storage.find_interventions(since=LONG_AGO),
    lambda storage: storage.get_figures(),
]


async def new_saga(storage: SqlAlchemySagaStorage) -> UUID:
    saga_id = uuid4()
    step = LogStep("pay", "act", SagaStepStatus.STARTED)
    await storage.save(Checkpoint(saga_id, name="order", status=SagaStatus.RUNNING, context={"a": 1}, steps=[step]))
    return saga_id


async def test_a_role_that_only_reads_sees_everything(
    make_engine: MakeEngine, admin: psycopg.Connection, driver: str
) -> None:
    """SELECT on both tables is all that a view needs; without it the error says which grant is lacking."""
    saga_id = await new_saga(SqlAlchemySagaStorage(make_engine(driver)))
    role = Identifier(f"reader_{uuid4().hex}")
    admin.execute(SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        engine = make_engine(driver)
        async with engine.connect() as connection:
            await connection.execute(text(f"SET ROLE {role.as_string()}"))
            await connection.commit()
            storage = SqlAlchemySagaStorage(connection)
            with pytest.raises(StorageUnavailableError, match="GRANT SELECT ON saga_executions, saga_logs") as refusal:
                await storage.find_sagas()
            assert refusal.value.sqlstate == "42501"
            await connection.rollback()
            admin.execute(SQL("GRANT SELECT ON saga_executions, saga_logs TO {}").format(role))
            await connection.execute(text(f"SET ROLE {role.as_string()}"))
            for view in VIEWS:
                await view(storage)
            assert [saga.id for saga in (await storage.find_sagas()).sagas] == [saga_id]
            await connection.rollback()
    finally:
        admin.execute(SQL("DROP OWNED BY {}").format(role))
        admin.execute(SQL("DROP ROLE {}").format(role))


@pytest.mark.parametrize("moment", ["-infinity", "infinity", "0044-03-15 BC", "12345-01-01"])
async def test_a_row_that_cannot_be_read_stops_no_list(
    make_engine: MakeEngine, admin: psycopg.Connection, driver: str, moment: str
) -> None:
    """Pages go on past it, and name it; counts, groups and figures go on, too."""
    storage = SqlAlchemySagaStorage(make_engine(driver))
    ids = [await new_saga(storage) for _ in range(3)]
    admin.execute("UPDATE saga_executions SET created_at = %s WHERE id = %s", [moment, ids[1]])
    for query in (SagaQuery(), SagaQuery(name="order", in_doubt=True)):
        seen: list[UUID] = []
        unreadable: list[UUID] = []
        page = await storage.find_sagas(query, limit=1)
        while True:
            seen += [saga.id for saga in page.sagas]
            unreadable += page.unreadable
            if page.after is None:
                break
            page = await storage.find_sagas(query, limit=1, after=page.after)
        assert (seen, unreadable) == ([ids[2], ids[0]], [ids[1]])
    for view in VIEWS:
        await view(storage)


@pytest.mark.parametrize(
    ("update", "value"),
    [
        ("updated_at = %s", "-infinity"),
        ("lease_owner = 'x', lease_expires_at = %s", "infinity"),
        ("context = %s", "[1]"),
        ("context = %s", '{"a": "' + "\\u0000\\ud800" + '", "b": 1e400}'),
        ("context = %s", "[" * 3000 + "]" * 3000),
    ],
)
async def test_odd_rows_stop_no_view(
    make_engine: MakeEngine, admin: psycopg.Connection, driver: str, update: str, value: str
) -> None:
    """Whatever SQL has put into a row, the others are told."""
    storage = SqlAlchemySagaStorage(make_engine(driver))
    odd, good = [await new_saga(storage) for _ in range(2)]
    admin.execute(b"UPDATE saga_executions SET " + update.encode() + b" WHERE id = %s", [value, odd])
    for view in VIEWS:
        await view(storage)
    page = await storage.find_sagas(SagaQuery(context={"a": 1}))
    assert good in [saga.id for saga in page.sagas]


@pytest.mark.parametrize(
    "setting",
    [
        "datestyle = 'SQL, DMY'",
        "timezone = 'Asia/Kolkata'",
        "bytea_output = escape",
        "intervalstyle = sql_standard",
        "default_transaction_isolation = serializable",
        "default_transaction_read_only = on",
        "plan_cache_mode = force_generic_plan",
        "standard_conforming_strings = on",
        "row_security = off",
    ],
)
async def test_no_setting_changes_what_is_seen(
    make_engine: MakeEngine, database: Database, admin: psycopg.Connection, driver: str, setting: str
) -> None:
    """Dates, bytes, isolation and plans may be set as anybody likes."""
    writer = SqlAlchemySagaStorage(make_engine(driver))
    saga_id = await new_saga(writer)
    saga = await writer.get_saga(saga_id)
    before = await writer.find_sagas()
    admin.execute(SQL("ALTER DATABASE {} SET ").format(Identifier(database.name)) + SQL(setting))
    storage = SqlAlchemySagaStorage(make_engine(driver))
    for _ in range(7):  # psycopg prepares a statement that comes often
        page = await storage.find_sagas(SagaQuery(name="order", created_after=saga.created_at, context={"a": 1}))
        [seen], [seen_before] = page.sagas, before.sagas
        assert (seen.created_at, seen.updated_at) == (saga.created_at, saga.updated_at)
        assert seen.last_entry == seen_before.last_entry
    for view in VIEWS:
        await view(storage)


async def test_a_view_ends_after_its_time(
    make_engine: MakeEngine, admin: psycopg.Connection, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view that takes too long is cut short, with a remedy; the connection is as before afterwards."""
    engine = make_engine(driver)
    storage = SqlAlchemySagaStorage(engine, retry_for=timedelta(0))
    with psycopg.connect(admin.info.dsn, password=admin.info.password) as blocker:
        blocker.execute("LOCK TABLE saga_logs IN ACCESS EXCLUSIVE MODE")
        patience = Statement(
            "SELECT set_config('transaction_read_only', 'on', TRUE), set_config('statement_timeout', '100', TRUE)"
        )
        monkeypatch.setattr("saga_store.sqlalchemy.inspection_sql.READ_ONLY", patience)
        with pytest.raises(StorageUnavailableError, match="ask for less") as late:
            await storage.group_sagas()
    assert late.value.sqlstate == "57014"
    async with engine.connect() as connection:
        assert (await connection.execute(text("SHOW statement_timeout"))).scalar_one() == "0"
        assert (await connection.execute(text("SHOW transaction_read_only"))).scalar_one() == "off"
    await new_saga(storage)
