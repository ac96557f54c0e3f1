"""docs/how-to/psql.md: its queries, in a database where there is something to find."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from uuid import UUID

import psycopg
import pytest

from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.connections import engine_on, until_blocked
from tests.databases import Database
from tests.pages import Block, blocks_of

BLOCKS = [block for block in blocks_of("docs/how-to/psql.md") if block.language == "sql"]
WRONG = [block for block in BLOCKS if block.section in {"Stuck sagas", "Steps in doubt", "Who keeps others waiting"}]
STUCK = UUID("00000000-0000-0000-0000-000000000001")


@dataclass(frozen=True)
class Trouble:
    """A database where something is wrong."""

    connection: psycopg.Connection
    forgotten: int


class TestQueries:
    @pytest.fixture
    async def trouble(self, database: Database) -> AsyncIterator[Trouble]:
        """A saga whose worker died an hour ago among others that are well, and a transaction that was forgotten."""
        step = LogStep("TakePayment", "act", SagaStepStatus.STARTED)
        done = LogStep("TakePayment", "act", SagaStepStatus.COMPLETED)
        async with engine_on(database.url("asyncpg")) as engine:
            storage = SqlAlchemySagaStorage(engine)
            await storage.save(Checkpoint(STUCK, name="order", status=SagaStatus.RUNNING, steps=[step]))
            for number, status in enumerate(SagaStatus, start=2):
                await storage.save(Checkpoint(UUID(int=number), name="order", status=status, steps=[step, done]))
        update = "UPDATE saga_executions SET name = 'refund' WHERE id = %s"
        with psycopg.connect(database.url()) as forgotten, psycopg.connect(database.url(), autocommit=True) as mine:
            mine.execute("UPDATE saga_executions SET updated_at = now() - interval '1 hour' WHERE id = %s", [STUCK])
            mine.execute("UPDATE saga_logs SET created_at = now() - interval '1 hour' WHERE saga_id = %s", [STUCK])
            forgotten.execute(update, [STUCK])
            async with await psycopg.AsyncConnection.connect(database.url(), autocommit=True) as waiter:
                waiting = asyncio.create_task(waiter.execute(update, [STUCK]))
                await until_blocked(database)
                yield Trouble(mine, forgotten.info.backend_pid)
                forgotten.rollback()
                await waiting

    @pytest.mark.parametrize("block", WRONG, ids=str)
    def test_finds_what_is_wrong_and_nothing_else(self, block: Block, trouble: Trouble) -> None:
        rows = trouble.connection.execute(block.text.encode()).fetchall()
        assert [row[0] for row in rows] in ([STUCK], [trouble.forgotten])

    def test_finished_sagas_arent_read(self, trouble: Trouble) -> None:
        """The query for stuck sagas can use the partial index, which doesn't hold the finished ones."""
        query = next(block.text for block in BLOCKS if "silent_for" in block.text)
        trouble.connection.execute("SET enable_seqscan = off")
        plan = trouble.connection.execute(f"EXPLAIN {query}".encode()).fetchall()
        assert "ix_saga_executions_recovery" in str(plan)

    @pytest.mark.parametrize("block", [block for block in BLOCKS if block not in WRONG], ids=str)
    def test_the_others_find_what_is_there(self, block: Block, trouble: Trouble) -> None:
        trouble.connection.execute(
            "UPDATE saga_executions SET lease_owner = 'worker-1', lease_expires_at = now() + interval '1 hour' "
            "WHERE status = 'RUNNING' AND id <> %s",
            [STUCK],
        )
        rows = trouble.connection.execute(block.text.encode()).fetchall()
        [failed] = trouble.connection.execute("SELECT id FROM saga_executions WHERE status = 'FAILED'").fetchall()
        assert [row[0] for row in rows] == ["worker-1" if block.section == "Who holds what" else failed[0]]
