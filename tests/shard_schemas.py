"""Shards that are schemas of one database, of which one can be made to look as if its server were down."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from saga_store.shard_records import shard_index
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.databases import Database

SHARD_SCHEMAS = ("saga_00", "saga_01", "saga_02")
ALL = ("--shards", str(len(SHARD_SCHEMAS)))
SECRET = "hunter2-s3cret"  # noqa: S105 - what must not be seen
# Nobody listens there.
NOWHERE = f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/sagas"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Shards:
    """A database with three shards, and a folder for files that say where they are."""

    database: Database
    folder: Path

    def without(self, *down: int) -> tuple[str, str]:
        """Return the options by which these shards are looked for where nobody listens."""
        tables = []
        for place, schema in enumerate(SHARD_SCHEMAS):
            url = f'url = "{NOWHERE}"\n' if place in down else ""
            tables.append(f'[[shards]]\n{url}schema = "{schema}"\n')
        path = self.folder / f"without-{'-'.join(map(str, down))}.toml"
        path.write_text("".join(tables))
        return "--shards", str(path)

    def do(self, work: Callable[[ShardedSagaStorage], Awaitable[_T]], *, down: tuple[int, ...] = ()) -> _T:
        """Do something on a storage that is made of them."""

        async def run() -> _T:
            engine = create_async_engine(self.database.url("psycopg"), poolclass=NullPool)
            nowhere = create_async_engine(NOWHERE, poolclass=NullPool)
            try:
                return await work(self.storage(engine, nowhere, down))
            finally:
                await engine.dispose()
                await nowhere.dispose()

        return asyncio.run(run())

    @staticmethod
    def storage(engine: AsyncEngine, nowhere: AsyncEngine, down: tuple[int, ...]) -> ShardedSagaStorage:
        return ShardedSagaStorage(
            SqlAlchemySagaStorage(nowhere if place in down else engine, schema=schema)
            for place, schema in enumerate(SHARD_SCHEMAS)
        )


def ids_of(shard: int, count: int, *, first: int = 1) -> list[UUID]:
    """Return ids whose sagas live in this shard, with first digits of their own."""
    ids = (UUID(int=number << 96 | number) for number in itertools.count(first))
    there = (saga_id for saga_id in ids if shard_index(saga_id, len(SHARD_SCHEMAS)) == shard)
    return list(itertools.islice(there, count))
