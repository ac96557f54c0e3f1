"""The plugin as its users meet it: in projects of their own, with pytest-asyncio, with anyio, and with neither."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saga_store.testing.postgres import PostgresServer

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "test-your-code.md"
[SCOPE] = re.findall(r"`(asyncio_default_fixture_loop_scope = \w+)`", PAGE.read_text())
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)

STORY = """
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import text

from saga_store import SagaStatus


async def story(storage, clock):
    saga_id = uuid4()
    await storage.create_saga(saga_id, "order", {"total": 12})
    assert await storage.find_stale_sagas(stale_after=timedelta(hours=1)) == []
    async with storage.run(saga_id, owner="w", lease=timedelta(hours=1)):
        clock.advance(timedelta(hours=2))
        [saga] = await storage.find_stale_sagas(stale_after=timedelta(hours=1))
    assert saga.id == saga_id
    await storage.update_status(saga_id, SagaStatus.COMPLETED)


async def orders(engine):
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE orders (id integer)"))
"""
BARE = """
import asyncio


@pytest.mark.parametrize("time", [1, 2])
def test_postgresql(saga_storage, saga_store_engine, saga_store_clock, time):
    asyncio.run(orders(saga_store_engine))
    asyncio.run(story(saga_storage, saga_store_clock))
    asyncio.run(story(saga_storage, saga_store_clock))


def test_memory(memory_saga_storage, saga_store_clock):
    asyncio.run(story(memory_saga_storage, saga_store_clock))
"""
ASYNC = """
@pytest.mark.{mark}
@pytest.mark.parametrize("time", [1, 2])
async def test_postgresql(saga_storage, saga_store_engine, saga_store_clock, time):
    await orders(saga_store_engine)
    await story(saga_storage, saga_store_clock)


@pytest.mark.{mark}
async def test_memory(memory_saga_storage, saga_store_clock):
    await story(memory_saga_storage, saga_store_clock)
"""
ANYIO = """
@pytest.fixture
def anyio_backend():
    return "asyncio"
"""
LAZY = """
import sys


def test_nothing_is_loaded():
    assert "pytest_saga_store" in sys.modules
    assert not [name for name in sys.modules if name.partition(".")[0] in {"saga_store", "sqlalchemy", "psycopg"}]
"""
LOCKED = """
import asyncio


def test_locked(saga_storage, saga_store_engine, saga_store_clock):
    async def lock():
        await saga_storage.create_saga(uuid4(), "order", {})
        async with saga_store_engine.begin() as connection:
            await connection.execute(text("SELECT FROM saga_executions FOR UPDATE"))
            with pytest.raises(TimeoutError, match="commit or roll back before the clock"):
                saga_store_clock.advance(timedelta(hours=1))

    asyncio.run(lock())


def test_backwards(saga_store_clock):
    with pytest.raises(ValueError, match="that isn't negative"):
        saga_store_clock.advance(timedelta(hours=-1))
"""

PLUGINS = {
    "neither": (BARE, ["no:asyncio", "no:anyio"]),
    "pytest-asyncio": (ASYNC.format(mark="asyncio"), ["no:anyio"]),
    "anyio": (ANYIO + ASYNC.format(mark="anyio"), ["no:asyncio"]),
}


def run(
    folder: Path, test: str, *without: str, server: str = "embedded", settings: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run pytest in a project that consists of this test, with the plugin that its entry point names."""
    if "no:asyncio" not in without:
        settings += f"{SCOPE}\n"  # or pytest-asyncio would warn
    (folder / "pytest.ini").write_text(f"[pytest]\nfilterwarnings = error\n{settings}")
    (folder / "test_mine.py").write_text(test)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAGA_STORE")}
    if server:
        environment["SAGA_STORE_TEST_PG"] = server
    options = [word for plugin in ("no:randomly", "no:cacheprovider", *without) for word in ("-p", plugin)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_with_each_plugin(server: PostgresServer, tmp_path: Path, plugin: str, driver: str) -> None:
    """Storage, engine, twin and clock work; each test has an empty database of its own."""
    tests, without = PLUGINS[plugin]
    done = run(tmp_path, STORY + tests, *without, server=server.url, settings=f"saga_store_driver = {driver}\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_the_page_can_be_typed(server: PostgresServer, tmp_path: Path) -> None:
    """Its blocks, one after the other, are a file of tests that pass."""
    done = run(tmp_path, "\n\n".join(BLOCKS), server=server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_a_clock_that_cant_be_moved_says_why(server: PostgresServer, tmp_path: Path) -> None:
    done = run(tmp_path, STORY + LOCKED, server=server.url)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_loaded_before_it_is_used(tmp_path: Path) -> None:
    """A project that only has saga-store installed pays nothing for the plugin."""
    done = run(tmp_path, LAZY)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("choice", "remedy"),
    [("oracle", "Choose auto, docker, embedded or a URL"), ("postgresql://127.0.0.1:1/x", "Start it")],
)
def test_a_server_that_cant_be_had_fails_the_test(tmp_path: Path, choice: str, remedy: str) -> None:
    """It is no skip, and the remedy stands there."""
    done = run(tmp_path, STORY + BARE, server="", settings=f"saga_store_pg = {choice}\n")
    assert done.returncode == 1
    assert "1 passed, 2 errors" in done.stdout
    assert "(saga_store_pg=" in done.stdout
    assert remedy in done.stdout


@pytest.mark.parametrize("place", ["variable", "setting"])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://shop:geheim@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?password=geheim",
        "postgresql://shop:ge/heim@127.0.0.1:1/x",
        "postgresql://shop:geheim und so@127.0.0.1:1/x",
        "host=127.0.0.1 password=geheim",
    ],
)
def test_no_password_is_shown(tmp_path: Path, url: str, place: str) -> None:
    """Of a server that can't be had it is said where it was named, and nothing that could be part of a password."""
    name = "saga_store_pg" if place == "setting" else "SAGA_STORE_TEST_PG"
    server, settings = ("", f"saga_store_pg = {url}\n") if place == "setting" else (url, "")
    done = run(tmp_path, STORY + BARE, server=server, settings=settings)
    assert done.returncode == 1
    assert f"({name}=...)" in done.stdout
    assert "heim" not in done.stdout + done.stderr


def test_a_driver_that_isnt_one_is_named(server: PostgresServer, tmp_path: Path) -> None:
    done = run(tmp_path, STORY + BARE, server=server.url, settings="saga_store_driver = pg8000\n")
    assert "saga_store_driver must be asyncpg or psycopg, not 'pg8000'" in done.stdout
