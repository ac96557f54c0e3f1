"""The verbs that keep and let go: archive, archives, archived, verify, restore, forget, purge, stats."""

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

from saga_store import retention
from saga_store.cli import retention_shown as shown
from saga_store.cli.console import Console, warn
from saga_store.cli.exits import Exit
from saga_store.cli.migrate import given_url
from saga_store.cli.verbs import Run, Verbs, duration
from saga_store.errors import ArchiverBusyError, InvalidSagaDataError
from saga_store.retention import ArchiveError, RetentionPolicy
from saga_store.retention.archiving import default_by
from saga_store.retention.removing import forget_stubs, purge
from saga_store.retention.threads import in_thread
from saga_store.retention_model import KEPT_AFTER_RESTORE, ArchiveState
from saga_store.schema.connections import opened
from saga_store.schema.settings import Progress
from saga_store.sqlalchemy import SqlAlchemySagaStorage

_FOR_EVER = "ever"
_Work = Callable[[argparse.Namespace, Console, "_Stop"], Awaitable[Exit]]


def register(verbs: Verbs) -> None:
    archive = verbs.add(
        "archive",
        _on(_archive),
        summary="Archive finished sagas, verify the archives, and remove the sagas. For cron: what stops is finished "
        "by the next run.",
        database=True,
    )
    archive.add_argument(
        "--to", metavar="URI", required=True, help="where to: /folder, s3://bucket/folder, gs://..., as fsspec has it"
    )
    add_policy(archive)
    archive.add_argument(
        "--forget-after", type=duration, help="delete what is left of sagas that were archived this long ago: 730d"
    )
    archive.add_argument("--dry-run", action="store_true", help="say what would be archived, and do nothing")
    archive.add_argument("--max-seconds", type=float, metavar="N", help="begin nothing new after this time")
    archive.add_argument("--max-sagas", type=int, metavar="N", help="archive at most this many")
    archive.add_argument("--compression", choices=["zstd", "gzip"], help="default: zstd, if zstandard is installed")
    archive.add_argument("--parquet", action="store_true", help="write Parquet files beside the archives, for analysts")
    archive.add_argument("--by", help="who archives, for the ledger (default: the user and the machine)")

    archives = verbs.add("archives", _on(_archives), summary="List the archives of this database.", database=True)
    archives.add_argument("--state", action="append", choices=[*ArchiveState], default=[], help="only of this state")
    archives.add_argument("--limit", type=int, default=50, help="how many at most (default: 50)")
    archives.add_argument("--after", help="where the page before ended")

    archived = verbs.add(
        "archived", _on(_archived), summary="Show a saga from its archive, without putting it back.", database=True
    )
    archived.add_argument("id", type=_uuid, help="the saga")
    archived.add_argument("--archive", metavar="URI", help="where to look (default: where the ledger has the saga)")

    verify = verbs.add(
        "verify",
        _on(_verify),
        summary="Read archives to their end, and compare them with what was written; with a database, with its ledger.",
        database=True,
    )
    verify.add_argument("uri", metavar="URI", help="a target with all its archives, or a single archive")

    restore = verbs.add(
        "restore",
        _on(_restore),
        summary="Put a saga back from its archive, or all of an archive, into this database.",
        database=True,
    )
    restore.add_argument("id", nargs="?", type=_uuid, help="the saga; without it, all sagas of --archive")
    restore.add_argument(
        "--archive", metavar="URI", help="a target, or a single archive (default: where the ledger has the saga)"
    )
    restore.add_argument(
        "--keep-for",
        type=duration,
        default=KEPT_AFTER_RESTORE,
        help="how long the next archivers leave what is restored (default: 7d)",
    )

    forget = verbs.add(
        "forget",
        _on(_forget),
        summary="Delete what is left of archived sagas, so that nothing tells any more that they were there.",
        database=True,
    )
    forget.add_argument("--older-than", type=duration, required=True, help="archived this long ago: 730d")
    forget.add_argument("--max-seconds", type=float, metavar="N", help="begin nothing new after this time")

    purged = verbs.add("purge", _on(_purge), summary="Remove finished sagas for good, archived nowhere.", database=True)
    purged.add_argument("--without-archive", action="store_true", required=True, help="say that you know that")
    add_policy(purged)
    purged.add_argument("--yes", action="store_true", help="don't ask")
    purged.add_argument("--max-seconds", type=float, metavar="N", help="begin nothing new after this time")
    purged.add_argument("--by", help="who purges, for the ledger (default: the user and the machine)")

    stats = verbs.add(
        "stats",
        _on(_stats),
        summary="Say how big the tables are, what is archived, and how far archiving lags behind a policy.",
        database=True,
    )
    add_policy(stats)


def add_policy(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--completed", type=duration, help="COMPLETED ones, unchanged for this long: 30d")
    parser.add_argument("--failed", type=duration, help="FAILED ones, unchanged for this long: 365d")
    parser.add_argument(
        "--name",
        dest="names",
        metavar="NAME=90d",
        action="append",
        type=_named,
        default=[],
        help=f"those of a name, whether COMPLETED or FAILED; NAME={_FOR_EVER} keeps them",
    )


class _Stop:
    """Whether to end between two steps: by Ctrl-C or SIGTERM, or when the time is up."""

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = None if max_seconds is None else asyncio.get_running_loop().time() + max_seconds
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


def _on(work: _Work) -> Run:
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


async def _run(work: _Work, given: argparse.Namespace, console: Console) -> Exit:
    stop = _Stop(getattr(given, "max_seconds", None))
    with stop.on_signals():
        try:
            code = await work(given, console, stop)
        except asyncio.CancelledError:
            if not stop.signalled:
                raise
            warn("interrupted; the next run finishes what was begun")
            return Exit.INTERRUPTED
    return Exit.INTERRUPTED if stop.signalled and code is Exit.DONE else code


@contextlib.asynccontextmanager
async def _storage(given: argparse.Namespace) -> AsyncIterator[SqlAlchemySagaStorage]:
    async with opened(given_url(given)) as engine:
        yield SqlAlchemySagaStorage(engine, schema=given.schema)


async def _archive(given: argparse.Namespace, console: Console, stop: _Stop) -> Exit:
    policy = replace(policy_of(given), forget_after=given.forget_after)
    target = retention.Target(given.to)
    async with _storage(given) as storage:
        report = await retention.archive(
            storage,
            target,
            policy,
            max_sagas=given.max_sagas,
            max_seconds=given.max_seconds,
            dry_run=given.dry_run,
            by=given.by,
            compression=given.compression,
            parquet=given.parquet,
            should_stop=stop,
            report=lambda progress: console.report(Progress(str(progress.doing), progress.sagas)),
        )
    console.report(Progress("archive", report.sagas, finished=True))
    console.result(shown.archived_as_text(report), **shown.archived_as_facts(report))
    return Exit.DONE


async def _archives(given: argparse.Namespace, console: Console, _: _Stop) -> Exit:
    async with _storage(given) as storage:
        states = [ArchiveState(state) for state in given.state]
        page = await storage.find_archives(states=states, limit=given.limit, after=given.after)
    console.product(shown.archives_as_text(page), **shown.plain(page))
    return Exit.DONE


async def _archived(given: argparse.Namespace, console: Console, _: _Stop) -> Exit:
    async with _storage(given) as storage:
        found = await retention.find_archived(storage, given.id, archive=given.archive)
    if found is None:
        raise ArchiveError(f"no archive is known to have saga {given.id}; say by --archive where to look")
    console.product(shown.record_as_text(found), **shown.record_as_facts(found))
    return Exit.DONE


async def _verify(given: argparse.Namespace, console: Console, _: _Stop) -> Exit:
    if given_url(given):
        async with _storage(given) as storage:
            report = await retention.verify(given.uri, storage)
    else:
        report = await retention.verify(given.uri)
    console.result(shown.verified_as_text(report), **shown.plain(report), problems=report.problems)
    return Exit.FAILED if report.problems else Exit.DONE


async def _restore(given: argparse.Namespace, console: Console, _: _Stop) -> Exit:
    async with _storage(given) as storage:
        report = await retention.restore(
            storage,
            given.id,
            archive=given.archive,
            keep_for=given.keep_for,
            report=lambda done: console.report(Progress("restore", done.sagas)),
        )
    console.result(shown.restored_as_text(report), **shown.restored_as_facts(report))
    return Exit.REFUSED if report.other else Exit.DONE


async def _forget(given: argparse.Namespace, console: Console, stop: _Stop) -> Exit:
    forgotten = 0

    def told(count: int) -> None:
        nonlocal forgotten
        forgotten = count
        console.report(Progress("forget", forgotten))

    async with _storage(given) as storage:
        is_complete = await forget_stubs(storage, given.older_than, stop, told)
    console.report(Progress("forget", forgotten, finished=True))
    rest = "" if is_complete else "; there are more"
    console.result(f"forgot {forgotten:,} archived sagas{rest}", forgotten=forgotten, is_complete=is_complete)
    return Exit.DONE


async def _purge(given: argparse.Namespace, console: Console, stop: _Stop) -> Exit:
    policy = policy_of(given)
    async with _storage(given) as storage:
        if not given.yes and not await _agreed(storage, policy):
            return console.fail(ValueError("nothing was removed"), Exit.REFUSED)
        removed = await purge(
            storage,
            policy,
            by=given.by or default_by(),
            should_stop=stop,
            told=lambda made: console.report(Progress("purge", made)),
        )
    console.result(f"removed {removed:,} sagas, archived nowhere", removed=removed)
    return Exit.DONE


async def _stats(given: argparse.Namespace, console: Console, _: _Stop) -> Exit:
    async with _storage(given) as storage:
        figures = await storage.get_figures(retention=policy_of(given) if asks_for_policy(given) else None)
    console.product(shown.stats_as_text(figures), **shown.stats_as_facts(figures))
    return Exit.DONE


async def _agreed(storage: SqlAlchemySagaStorage, policy: RetentionPolicy) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise InvalidSagaDataError("--yes", "must be given where nobody can be asked: what is purged is gone for good")
    sagas = 0
    async with storage.snapshot() as snapshot:
        after = None
        while True:
            page = await snapshot.find_expired(policy, after=after)
            sagas += len(page.sagas)
            after = page.after
            if after is None:
                break
    warn(f"{sagas:,} sagas would be removed with their histories, and archived nowhere; write yes to do it:")
    answer: str = await in_thread("ask", sys.stdin.readline)  # which Ctrl-C doesn't wait for
    return answer == "yes\n"


def asks_for_policy(given: argparse.Namespace) -> bool:
    return given.completed is not None or given.failed is not None or bool(given.names)


def policy_of(given: argparse.Namespace) -> RetentionPolicy:
    if not asks_for_policy(given):
        raise InvalidSagaDataError("--completed, --failed or --name", "must say what may go: --completed 30d")
    return RetentionPolicy(completed=given.completed, failed=given.failed, names=dict(given.names))


def _named(value: str) -> tuple[str, timedelta | None]:
    name, equals, kept = value.rpartition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{value!r} is no name and duration; write it like order=90d")
    return name, None if kept == _FOR_EVER else duration(kept)


def _uuid(value: str) -> UUID:
    try:
        return UUID(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no saga's id; give all of its 32 digits") from None
