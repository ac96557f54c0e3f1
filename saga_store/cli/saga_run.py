"""How a verb of ``saga`` gets its storage, and what it says when something goes wrong."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeAlias, TypeVar

from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.output import Output
from saga_store.cli.saga_filters import UnknownIdError
from saga_store.cli.storages import opened_storage, saying_once
from saga_store.cli.verbs import Run
from saga_store.errors import InvalidSagaDataError, SchemaError, StorageUnavailableError
from saga_store.storage import SagaStorage

_T = TypeVar("_T")

# Whoever looks would rather hear at once that the server is away; what is written, is written if that can be had.
_RETRY_VIEWS_FOR, _RETRY_WRITES_FOR = timedelta(0), timedelta(seconds=5)

Work: TypeAlias = Callable[[SagaStorage, argparse.Namespace, Output], Awaitable[_T]]


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
        ToldError: The role lacks a privilege, or no shard can be reached.
    """
    retry_for = _RETRY_WRITES_FOR if writes else _RETRY_VIEWS_FOR
    async with opened_storage(given, pools=writes, retry_for=retry_for, records=False) as opened:
        try:
            with saying_once():
                return await work(opened.storage, given, output)
        except (StorageUnavailableError, SchemaError) as exc:
            raise await opened.explained(exc, writes=writes) from exc
