"""How a verb of retention gets its storage, is ended between two steps, and says what goes wrong."""

import argparse
import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from saga_store.cli.console import Console, warn
from saga_store.cli.exits import Exit
from saga_store.cli.storages import opened_storage
from saga_store.cli.verbs import Run
from saga_store.errors import ArchiverBusyError, InvalidSagaDataError, SchemaError, StorageUnavailableError
from saga_store.retention import ArchiveError
from saga_store.retention.archiving import positive
from saga_store.sharding import ShardedSagaStorage
from saga_store.storage import SagaStorage

Work = Callable[[argparse.Namespace, Console, "Stop"], Awaitable[Exit]]


class Stop:
    """Whether to end between two steps: by Ctrl-C or SIGTERM, or when the time is up."""

    def __init__(self, max_seconds: float | None) -> None:
        seconds = positive("max_seconds", max_seconds)
        self._deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        self.signalled = False

    def __call__(self) -> bool:
        return self.signalled or (self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of asyncio.run's

        def stop() -> None:
            if self.signalled:
                task.cancel()
            else:
                warn("ending after this step; again, to end at once")
            self.signalled = True

        signals = (signal.SIGINT, signal.SIGTERM)
        # Neither Windows nor another thread than the main one has it.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            for one in signals:
                loop.add_signal_handler(one, stop)
        try:
            yield
        finally:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                for one in signals:
                    loop.remove_signal_handler(one)


def on(work: Work) -> Run:
    def run(given: argparse.Namespace, console: Console) -> int:
        try:
            return asyncio.run(_run(work, given, console))
        except ArchiverBusyError as exc:
            return console.fail(exc, Exit.LOCKED)
        except ArchiveError as exc:
            return console.fail(exc, Exit.FAILED)
        except InvalidSagaDataError as exc:
            return console.fail(exc, Exit.USAGE)

    return run


async def _run(work: Work, given: argparse.Namespace, console: Console) -> Exit:
    stop = Stop(getattr(given, "max_seconds", None))
    with stop.on_signals():
        try:
            code = await work(given, console, stop)
        except asyncio.CancelledError:
            if not stop.signalled:
                raise
            warn("interrupted; the next run finishes what was begun")
            return Exit.INTERRUPTED
        finally:
            given.signalled = stop.signalled
    return Exit.INTERRUPTED if stop.signalled and code is Exit.DONE else code


@contextlib.asynccontextmanager
async def opened(given: argparse.Namespace, *, records: bool = False) -> AsyncIterator[SagaStorage]:
    async with opened_storage(given, records=records) as found:
        try:
            yield found.storage
        except (StorageUnavailableError, SchemaError) as exc:
            raise exc if given.shards is None else await found.explained(exc, writes=False) from exc


async def check_shards(given: argparse.Namespace, _console: Console, _: Stop) -> Exit:
    """See that they are the shards that they should be, and all of them, before anything is let go."""
    async with opened(given) as storage:
        if isinstance(storage, ShardedSagaStorage):
            await storage.reach()
    return Exit.DONE
