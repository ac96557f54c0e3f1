"""Which database: the one at DATABASE_URL, or an embedded PostgreSQL that keeps its data in ``.demo``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from saga_store.testing.postgres import embedded

ROOT = Path(__file__).parents[2]


@contextmanager
def database() -> Iterator[tuple[str, str]]:
    """Yield the database's URL, and a few words on what it is."""
    if given := os.environ.get("DATABASE_URL"):
        yield given, "the one at DATABASE_URL"
        return
    with embedded(data=ROOT / ".demo", durable=True) as server:
        yield server.url, f"PostgreSQL {server.version}, {server.how}, its data in .demo"


def connect(url: str) -> AsyncEngine:
    """Make an engine, over psycopg unless the URL names another driver."""
    parsed = make_url(url)
    if parsed.drivername in {"postgres", "postgresql"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    return create_async_engine(parsed)
