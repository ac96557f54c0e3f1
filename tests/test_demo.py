"""``make demo``: the story comes out well, again and again, also after it was interrupted."""

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import psycopg

from tests.databases import Database

ROOT = Path(__file__).parent.parent
MODULE = "examples.order_saga"


def demo(url: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", MODULE]
    environment = os.environ | {"DATABASE_URL": url}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


def story(url: str) -> str:
    """Run the demo to its happy end, and return what it tells."""
    done = demo(url)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def leave_an_order_behind(url: str, order_id: uuid.UUID) -> None:
    """Kill a worker after it has charged, and tell nobody: so does a demo that is killed itself."""
    command = [sys.executable, "-m", f"{MODULE}.worker", "run", str(order_id), "alice", "1", "--hang"]
    environment = os.environ | {"DATABASE_URL": url}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout
        for line in worker.stdout:
            if "the bank has charged" in line:
                worker.kill()


def test_story(database: Database) -> None:
    """A worker is killed, its order recovered and another one compensated; the next run does it all again."""
    first = story(database.url("asyncpg"))
    assert "kill -9" in first
    assert "TakePayment: that was done before, so not again" in first
    assert "order failed: the account of bob doesn't cover 36.00" in first
    assert first.count("  ok  ") == 6
    assert re.search(r"saga-store saga show [0-9a-f]{8} --schema saga_store_demo\n\nDemoOrderSaga", first)
    assert "Completed at " in first
    [page] = re.findall(r"The same as a page for a browser: (.*/\.demo/alices_order\.html)", first)
    html = Path(page).read_text(encoding="utf-8")
    assert re.search(r"<h1>DemoOrderSaga .*Completed at ", html, re.DOTALL)
    assert "TakePayment" in html

    order_id = uuid.uuid4()
    leave_an_order_behind(database.url("psycopg"), order_id)
    second = story(database.url())
    assert f"recovering order {order_id}" in second
    assert second.count("  ok  ") == 6


def test_a_database_of_somebody_elses(database: Database) -> None:
    """It says that it goes there, and keeps to a schema of its own: other sagas are neither seen nor touched."""
    with psycopg.connect(database.url(), autocommit=True) as admin:
        admin.execute(
            "INSERT INTO saga_executions (id, name, status, context) "
            "VALUES (gen_random_uuid(), 'DemoOrderSaga', 'RUNNING', '{}')"
        )
        before = admin.execute("SELECT * FROM saga_executions").fetchall()
        told = story(database.url())
        assert "It is the one at DATABASE_URL, in a schema of its own, saga_store_demo" in told
        assert admin.execute("SELECT * FROM saga_executions").fetchall() == before
        query = "SELECT DISTINCT schemaname FROM pg_tables WHERE schemaname !~ '^(pg_|information_schema)' ORDER BY 1"
        assert admin.execute(query).fetchall() == [("public",), ("saga_store_demo",)]


def test_database_out_of_reach() -> None:
    """A database that can't be reached ends it with a message, and no traceback."""
    done = demo("postgresql://saga:wrong@127.0.0.1:1/nowhere")
    assert done.returncode == 1
    assert "Is the server up, and DATABASE_URL right?" in done.stdout
    assert "The demo failed: saga-store" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
