"""docs/how-to: the code of each page runs as it stands, and prints what its comments say."""

import ast
import asyncio
import inspect
import os
import re
import signal
from pathlib import Path
from types import FunctionType
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store import Checkpoint, SagaStatus
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.connections import engine_on
from tests.databases import Database
from tests.test_readme import LINK, Block, blocks_of, shell

ROOT = Path(__file__).parent.parent
HOW_TO = ROOT / "docs" / "how-to"
PAGES = {path.stem: path for path in HOW_TO.glob("*.md")}
RUNNER = (ROOT / "examples" / "by_hand" / "runner.py").read_text()


def blocks(page: str, language: str = "python") -> list[Block]:
    return [block for block in blocks_of((HOW_TO / f"{page}.md").read_text()) if block.language == language]


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


class TestEveryPage:
    @pytest.mark.parametrize("page", PAGES)
    def test_every_relative_link_leads_somewhere(self, page: str) -> None:
        links = [link.partition("#")[0] for link in LINK.findall(PAGES[page].read_text()) if "://" not in link]
        assert not [link for link in links if not (HOW_TO / link).exists()]

    @pytest.mark.parametrize("page", PAGES)
    def test_every_target_of_make_that_is_named_exists(self, page: str) -> None:
        for target in re.findall(r"`make ([\w-]+)`", PAGES[page].read_text()):
            done = shell(f"make --dry-run {target}")
            assert done.returncode == 0, done.stderr


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
