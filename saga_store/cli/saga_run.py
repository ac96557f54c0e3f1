"""How a verb of ``saga`` gets its storage, and what it says when something goes wrong."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeAlias, TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.migrate import given_url
from saga_store.cli.output import Output
from saga_store.cli.privileges import lacking
from saga_store.cli.saga_filters import UnknownIdError
from saga_store.cli.verbs import Run
from saga_store.errors import InvalidSagaDataError, SchemaError, StorageUnavailableError
from saga_store.schema.connections import opened
from saga_store.sqlalchemy import SqlAlchemySagaStorage

_T = TypeVar("_T")

_PERMISSION_DENIED = "42501"
# Whoever looks would rather hear at once that the server is away; what is written, is written if that can be had.
_RETRY_VIEWS_FOR, _RETRY_WRITES_FOR = timedelta(0), timedelta(seconds=5)

Work: TypeAlias = Callable[[SqlAlchemySagaStorage, argparse.Namespace, Output], Awaitable[_T]]


class LackingPrivilegeError(StorageUnavailableError):
    """The role may not do this; the reason says which GRANT would let it."""

    def __str__(self) -> str:
        return self.reason


def on_storage(work: Work[Exit]) -> Run:
    """Return a verb that looks at sagas."""

    def run(given: argparse.Namespace, console: Console) -> int:
        output = Output(given, console)
        return tell(console, lambda: asyncio.run(with_storage(work, given, output)))

    return run


def tell(console: Console, run: Callable[[], Exit]) -> Exit:
    """Run something, and say in one line what was wrong with what was given."""
    try:
        return run()
    except UnknownIdError as exc:
        return console.fail(exc, Exit.FAILED)
    except InvalidSagaDataError as exc:
        return console.fail(exc, Exit.USAGE)


async def with_storage(work: Work[_T], given: argparse.Namespace, output: Output, *, writes: bool = False) -> _T:
    """Do something on a storage of its own.

    Raises:
        LackingPrivilegeError: The role lacks a privilege.
    """
    async with opened(given_url(given), pools=writes) as engine:
        retry_for = _RETRY_WRITES_FOR if writes else _RETRY_VIEWS_FOR
        storage = SqlAlchemySagaStorage(engine, schema=given.schema, retry_for=retry_for)
        try:
            return await work(storage, given, output)
        except (StorageUnavailableError, SchemaError) as exc:
            raise await explained(exc, engine, given, writes=writes) from exc


async def explained(
    exc: StorageUnavailableError | SchemaError, engine: AsyncEngine, given: argparse.Namespace, *, writes: bool
) -> Exception:
    """Return what to say: if a privilege is lacking, which GRANT would give it."""
    # Without USAGE on their schema the tables look as if they weren't there.
    if isinstance(exc, StorageUnavailableError) and exc.sqlstate != _PERMISSION_DENIED:
        return exc
    said = await lacking(engine, given.schema, writes=writes)
    return exc if said is None else LackingPrivilegeError(said, _PERMISSION_DENIED)
