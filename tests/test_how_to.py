"""docs/how-to: the code of each page runs as it stands, and prints what its comments say."""

import ast
import asyncio
import inspect
import os
import signal
from collections.abc import Iterator
from types import FunctionType
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from celery.contrib.testing.worker import start_worker
from celery.signals import setup_logging
from celery.utils.time import get_exponential_backoff_interval
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store import Checkpoint, SagaStatus, schema
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.browser import served
from tests.connections import engine_on
from tests.databases import Database, Databases
from tests.pages import ROOT, Block, blocks_of
from tests.test_recovery import wait_for

# One that a process has created, and that no message came of.
FORGOTTEN = """
INSERT INTO saga_executions (id, name, status, context, updated_at)
VALUES (%s, 'order', 'PENDING', '{}', now() - interval '1 minute')
"""
RUNNER = (ROOT / "examples" / "by_hand" / "runner.py").read_text()


def blocks(page: str, language: str = "python") -> list[Block]:
    return [block for block in blocks_of(f"docs/how-to/{page}.md") if block.language == language]


async def run(
    page: str, some: list[Block], database: Database, capsys: pytest.CaptureFixture[str]
) -> dict[str, object]:
    """Run the blocks one after the other, as if they were typed, and return the names that they leave behind."""
    names: dict[str, object] = {"__name__": page}
    for block in some:
        # The empty lines let a traceback name the page's own line.
        code = compile(
            "\n" * (block.line - 1) + block.on(database), f"{page}.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        result = FunctionType(code, names)()
        if inspect.isawaitable(result):
            await result
        assert capsys.readouterr().out.splitlines() == block.printed, str(block)
    for engine in names.values():
        if isinstance(engine, AsyncEngine):
            await engine.dispose()
    return names


class TestByHand:
    async def test_the_page(self, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
        code = [block for block in blocks("write-a-saga-by-hand") if block.section != "The runner"]
        assert len(code) == 4
        await run("write-a-saga-by-hand", code, database, capsys)

    def test_the_runner_is_that_of_the_example(self) -> None:
        [shown] = [block.text for block in blocks("write-a-saga-by-hand") if block.section == "The runner"]
        assert shown == RUNNER


class TestPlainWorker:
    async def test_the_page(self, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
        """What the blocks do is done, and the script ends by SIGTERM with the saga that it was given finished."""
        code = blocks("plain-worker")
        assert len(code) == 3
        names = await run("plain-worker", code, database, capsys)
        main, order_id = names["main"], uuid4()
        assert callable(main)
        async with engine_on(database.url("asyncpg")) as engine:
            storage = SqlAlchemySagaStorage(engine)
            await storage.save(Checkpoint(order_id, name="order", status=SagaStatus.RUNNING))
            age = text("UPDATE saga_executions SET updated_at = now() - interval '1 minute'")
            async with engine.begin() as connection:
                await connection.execute(age)
            working = asyncio.create_task(main())
            while (await storage.get_saga(order_id)).status is not SagaStatus.COMPLETED:
                assert not working.done()
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            await working


@pytest.mark.parametrize("page", ["fastapi", "litestar"])
class TestWebFrameworks:
    def test_the_application(self, page: str, database: Database, admin: psycopg.Connection) -> None:
        """An order that is sent twice is placed once, and ends; there are figures, pages, and a probe that tells."""
        admin.execute("CREATE TABLE orders (id uuid PRIMARY KEY)")
        [block] = blocks(page)
        names: dict[str, Any] = {"__name__": page}
        exec(compile(block.on(database), f"{page}.md", "exec"), names)  # noqa: S102 - it is the page's
        order_id = uuid4()
        with served({page: names["app"]}, lifespan="on") as addresses, httpx.Client(base_url=addresses[page]) as client:
            for _ in range(2):
                assert client.put(f"/orders/{order_id}", json={"total": 24}).status_code == 202
            wait_for(admin, f"SELECT FROM saga_executions WHERE id = '{order_id}' AND status = 'COMPLETED'")
            ready = client.get("/ready")
            assert (ready.status_code, ready.text.strip('"')) == (200, "current")
            assert "saga_store_up 1.0" in client.get("/metrics").text
            assert str(order_id) in client.get(f"/ops/sagas/sagas/{order_id}").text
            schema.downgrade(database.url("psycopg"), "-1")
            assert client.get("/ready").status_code == 503
        assert admin.execute("SELECT id FROM orders").fetchall() == [(order_id,)]

    def test_it_may_be_begun_again(
        self, page: str, databases: Databases, template: Database, database: Database
    ) -> None:
        """Each lifespan has its own engine and worker, and the pages show what is in the database of now."""
        [block] = blocks(page)
        names: dict[str, Any] = {"__name__": page}
        exec(compile(block.on(database), f"{page}.md", "exec"), names)  # noqa: S102 - it is the page's
        with databases.clone(template) as other:
            for each in (database, other):
                names["URL"], order_id = each.url("asyncpg"), uuid4()
                with psycopg.connect(each.url(), autocommit=True) as admin:
                    admin.execute("CREATE TABLE orders (id uuid PRIMARY KEY)")
                    with (
                        served({page: names["app"]}, lifespan="on") as addresses,
                        httpx.Client(base_url=addresses[page]) as client,
                    ):
                        assert client.put(f"/orders/{order_id}", json={"total": 24}).status_code == 202
                        wait_for(admin, f"SELECT FROM saga_executions WHERE id = '{order_id}' AND status = 'COMPLETED'")
                        assert client.get(f"/ops/sagas/sagas/{order_id}").status_code == 200


@pytest.mark.usefixtures("logging_as_it_is")
class TestCelery:
    @pytest.fixture
    def logging_as_it_is(self) -> Iterator[None]:
        """Keep Celery from setting up the logging of the whole process, which other tests look at."""

        def leave_it(**_: object) -> None: ...

        setup_logging.connect(leave_it)
        yield
        setup_logging.disconnect(leave_it)

    def test_the_tasks(self, database: Database, admin: psycopg.Connection) -> None:
        """An order is seen through, once more by a repeated message, and one that no message came of is recovered."""
        admin.execute("CREATE TABLE orders (id uuid PRIMARY KEY)")
        tasks, placing = blocks("celery")
        names: dict[str, Any] = {"__name__": "celery_page"}
        for block in (tasks, placing):
            exec(compile(block.on(database), "celery.md", "exec"), names)  # noqa: S102 - it is the page's
        order_id, forgotten = uuid4(), uuid4()
        with start_worker(names["app"], pool="solo", perform_ping_check=False):
            asyncio.run(names["place"](order_id))
            wait_for(admin, f"SELECT FROM saga_executions WHERE id = '{order_id}' AND status = 'COMPLETED'")
            names["see_through"].delay(str(order_id))
            admin.execute(FORGOTTEN, [forgotten])
            names["app"].tasks["recover"].delay()
            wait_for(admin, f"SELECT FROM saga_executions WHERE id = '{forgotten}' AND status = 'COMPLETED'")
        task = names["see_through"]
        pauses = [
            get_exponential_backoff_interval(task.retry_backoff, number, task.retry_backoff_max)
            for number in range(task.max_retries)
        ]
        assert sum(pauses) / 2 > names["LEASE"].total_seconds()  # each is drawn between nothing and this
        entries = admin.execute("SELECT status FROM saga_logs WHERE saga_id = %s ORDER BY id", [order_id]).fetchall()
        assert entries == [("STARTED",), ("COMPLETED",)]
