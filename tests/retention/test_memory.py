"""How much memory it takes to restore sagas with contexts of 50 MB."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.retention import archive
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.databases import Database, Databases
from tests.retention.world import ALL, make_finished

MB = 2**20
MOST_MB = 300
BIG = (
    "UPDATE saga_executions SET context = json_build_object('blob', repeat('x ', %s), 'at', now()) WHERE id = ANY (%s)"
)
CONTEXTS = "SELECT id, md5(CAST(context AS text)) FROM saga_executions ORDER BY id"


def restored(url: str, folder: Path, *saga: str) -> dict[str, Any]:
    """Restore in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.retention.restorer", url, str(folder), *saga]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_big_contexts_come_back_in_bounded_memory(  # noqa: PLR0913, PLR0917 - and the fixtures
    database: Database,
    databases: Databases,
    template: Database,
    admin: psycopg.Connection,
    make_engine: Callable[..., AsyncEngine],
    tmp_path: Path,
    driver: str,
) -> None:
    """Of two that follow each other, as new rows, once more, and one in its stub; to the letter each time."""
    storage = SqlAlchemySagaStorage(make_engine("psycopg"))
    ids = await make_finished(storage, 3)
    admin.execute(BIG, [25 * MB, ids[:2]])
    before = admin.execute(CONTEXTS).fetchall()
    await archive(storage, str(tmp_path), ALL)
    with databases.clone(template) as other:
        url = other.url(driver)
        new = restored(url, tmp_path)
        again = restored(url, tmp_path)
        with psycopg.connect(other.url()) as connection:
            assert connection.execute(CONTEXTS).fetchall() == before
    into_stub = restored(database.url(driver), tmp_path, str(ids[0]))
    assert (new["restored"], again["same"], into_stub["restored"]) == (3, 3, 1)
    assert max(new["peak_mb"], again["peak_mb"], into_stub["peak_mb"]) < MOST_MB
