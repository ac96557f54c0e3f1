"""The storage that a verb works on: that of one database, or one that is made of all shards."""

import argparse
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.cli.migrate import given_url
from saga_store.cli.privileges import lacking
from saga_store.cli.shards import Shards, leaving_out, url_of
from saga_store.errors import SagaStoreError, SchemaError, StorageUnavailableError
from saga_store.retention.over_shards import first_line
from saga_store.schema.connections import engine_at, opened
from saga_store.schema.settings import MigrationError
from saga_store.schema.urls import Address
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.failures import PERMISSION_DENIED
from saga_store.sqlalchemy.repository import RETRY_FOR
from saga_store.storage import SagaStorage


class ToldError(StorageUnavailableError):
    """What is in the way, with what to do about it; the reason says all of it."""

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Opened:
    """A storage, and where each of its databases is."""

    storage: SagaStorage
    places: Sequence[tuple[AsyncEngine, str | None]]
    shards: Shards | None = None

    async def explained(self, exc: StorageUnavailableError | SchemaError, *, writes: bool) -> Exception:
        """Return what to say: if a privilege is lacking, which GRANT would give it."""
        # Without USAGE on their schema the tables look as if they weren't there.
        if isinstance(exc, SchemaError) or exc.sqlstate == PERMISSION_DENIED:
            for index, (engine, schema) in enumerate(self.places):
                if said := await lacking(engine, schema, writes=writes):
                    where = f"{self.shards.name(index)}: " if self.shards else ""
                    return ToldError(where + said, PERMISSION_DENIED)
        if self.shards is None:
            return exc
        if isinstance(exc, SchemaError):
            return ToldError(f"{exc}. `saga-store check --shards {self.shards.given}` tells of each shard")
        missing = missing_of(self.storage)
        said = reason_of(exc)
        if len(missing) == len(self.places):
            said = f"none of {len(missing)} shards can be reached; {reason_of(missing[0])}"
        return ToldError(f"nothing was written: {said}" if writes else said, exc.sqlstate)


@asynccontextmanager
async def opened_storage(
    given: argparse.Namespace, *, pools: bool = False, retry_for: timedelta = RETRY_FOR, records: bool = True
) -> AsyncIterator[Opened]:
    """Open what was given: the database, or all shards, of which some may be down.

    Args:
        given: What was given to the command.
        pools: Whether to keep connections, for those who send many statements.
        retry_for: As of the storages.
        records: As of ``ShardedSagaStorage``.

    Raises:
        MigrationError: A URL can't be used, or the database can't be reached.
    """
    shards: Shards | None = given.shards
    if shards is None:
        async with opened(given_url(given), pools=pools) as engine:
            storage = SqlAlchemySagaStorage(engine, schema=given.schema, retry_for=retry_for)
            yield Opened(storage, [(engine, given.schema)])
        return
    async with AsyncExitStack() as stack:
        engines: dict[str, AsyncEngine] = {}
        places: list[tuple[AsyncEngine, str | None]] = []
        for index, shard in enumerate(shards.places):
            url = url_of(shard, given)
            if url not in engines:
                engines[url] = _engine(url, f"shard {index}", pools=pools)
                stack.push_async_callback(engines[url].dispose)
            places.append((engines[url], shard.schema))
        storages = [SqlAlchemySagaStorage(engine, schema=schema, retry_for=retry_for) for engine, schema in places]
        yield Opened(ShardedSagaStorage(storages, records=records), places, shards)


def missing_of(storage: object) -> dict[int, SagaStoreError]:
    """Return which shards couldn't be reached when they were last asked, and why; without shards none."""
    return storage.unreachable if isinstance(storage, ShardedSagaStorage) else {}


def reason_of(exc: SagaStoreError) -> str:
    """Return why in one line, to which more may be added."""
    return first_line(exc).rstrip(".?! ")


def _engine(url: str, where: str, *, pools: bool) -> AsyncEngine:
    try:
        return engine_at(Address.read(url), pools=pools)
    except MigrationError as exc:
        raise MigrationError(f"{where}: {exc}") from None


def saying_once() -> AbstractContextManager[None]:
    """Leave out of the log what a verb says of shards by itself."""
    return leaving_out("saga_store", "shard")
