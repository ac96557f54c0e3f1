"""Which database: the one at DATABASE_URL, or an embedded PostgreSQL that keeps its data in ``.demo``.

In either of them the demo keeps to a schema of its own, so that it can't meet anybody else's sagas.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from saga_store.testing.postgres import embedded

SCHEMA = "saga_store_demo"
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".demo"
"""What the demo leaves behind: an embedded server's data, and alice's order as a page."""


@contextmanager
def database() -> Iterator[tuple[str, str]]:
    """Yield the database's URL, and a few words on what it is."""
    if given := os.environ.get("DATABASE_URL"):
        where = f"the one at DATABASE_URL, in a schema of its own, {SCHEMA}; nothing else there is touched"
        yield (
            given,
            f"{where}.\n  DROP SCHEMA {SCHEMA} CASCADE removes it; without DATABASE_URL it has a server of its own",
        )
        return
    with embedded(data=FOLDER, durable=True) as server:
        yield server.url, f"PostgreSQL {server.version}, {server.how}, its data in .demo"


def connect(url: str) -> AsyncEngine:
    """Make an engine, over psycopg unless the URL names another driver."""
    parsed = make_url(url)
    if parsed.drivername in {"postgres", "postgresql"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    engine = create_async_engine(parsed)
    event.listen(engine.sync_engine, "connect", _enter_schema)
    return engine


def _enter_schema(connection: DBAPIConnection, _record: object) -> None:
    """Let names mean those of the demo's schema, in each new session."""
    before, connection.autocommit = connection.autocommit, True  # or a rollback would undo it
    cursor = connection.cursor()
    cursor.execute(f"SET search_path = {SCHEMA}")
    cursor.close()
    connection.autocommit = before
