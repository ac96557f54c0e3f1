"""The verbs that keep and let go: archive, archives, archived, verify, restore, forget, purge, stats."""

import argparse
import sys
from dataclasses import replace
from uuid import UUID

from saga_store import retention
from saga_store.cli import retention_shown as shown
from saga_store.cli.console import Console, warn
from saga_store.cli.exits import Exit, worst_of
from saga_store.cli.migrate import given_url
from saga_store.cli.retention_policy import add_policy, asks_for_policy, policy_of
from saga_store.cli.retention_run import Stop, check_shards, on, opened
from saga_store.cli.shards import ALL_AT_ONCE, IN_TURN, add_shards, in_turn
from saga_store.cli.storages import reason_of
from saga_store.cli.verbs import Verbs, term
from saga_store.errors import (
    InvalidSagaDataError,
    SagaStoreError,
)
from saga_store.interface import IRetentionStorage
from saga_store.retention import ArchiveError, RetentionPolicy, ShardsFailedError
from saga_store.retention.archiving import default_by
from saga_store.retention.over_shards import each_shard
from saga_store.retention.removing import forget_stubs, purge
from saga_store.retention.threads import in_thread
from saga_store.retention_model import KEPT_AFTER_RESTORE, ArchiveState
from saga_store.schema.settings import Progress
from saga_store.sharding import ShardedSagaStorage
from saga_store.storage import SagaStorage


def register(verbs: Verbs) -> None:
    archive = verbs.add(
        "archive",
        in_turn(on(_archive), before=on(check_shards)),
        summary="Archive finished sagas, verify the archives, and remove the sagas. For cron: what stops is finished "
        "by the next run.",
        database=True,
    )
    archive.add_argument(
        "--to", metavar="URI", required=True, help="where to: /folder, s3://bucket/folder, gs://..., as fsspec has it"
    )
    add_policy(archive)
    archive.add_argument(
        "--forget-after", type=term, help="delete what is left of sagas that were archived this long ago: 730d"
    )
    archive.add_argument("--dry-run", action="store_true", help="say what would be archived, and do nothing")
    archive.add_argument("--max-seconds", type=float, metavar="N", help="begin nothing new after this time")
    archive.add_argument("--max-sagas", type=int, metavar="N", help="archive at most this many, of each shard")
    archive.add_argument("--compression", choices=["zstd", "gzip"], help="default: zstd, if zstandard is installed")
    archive.add_argument("--parquet", action="store_true", help="write Parquet files beside the archives, for analysts")
    archive.add_argument("--by", help="who archives, for the ledger (default: the user and the machine)")

    archives = verbs.add(
        "archives",
        in_turn(on(_archives), before=on(_check_page)),
        summary="List the archives of this database.",
        database=True,
    )
    archives.add_argument("--state", action="append", choices=[*ArchiveState], default=[], help="only of this state")
    archives.add_argument("--limit", type=int, default=50, help="how many at most (default: 50)")
    archives.add_argument("--after", help="where the page before ended")

    archived = verbs.add(
        "archived", on(_archived), summary="Show a saga from its archive, without putting it back.", database=True
    )
    archived.add_argument("id", type=_uuid, help="the saga")
    archived.add_argument("--archive", metavar="URI", help="where to look (default: where the ledger has the saga)")

    verify = verbs.add(
        "verify",
        on(_verify),
        summary="Read archives to their end, and compare them with what was written; with a database, with its ledger.",
        database=True,
    )
    verify.add_argument("uri", metavar="URI", help="a target with all its archives, or a single archive")

    restore = verbs.add(
        "restore",
        on(_restore),
        summary="Put a saga back from its archive, or all of an archive, into this database.",
        database=True,
    )
    restore.add_argument("id", nargs="?", type=_uuid, help="the saga; without it, all sagas of --archive")
    restore.add_argument(
        "--archive", metavar="URI", help="a target, or a single archive (default: where the ledger has the saga)"
    )
    restore.add_argument(
        "--keep-for",
        type=term,
        default=KEPT_AFTER_RESTORE,
        help="how long the next archivers leave what is restored (default: 7d)",
    )

    forget = verbs.add(
        "forget",
        in_turn(on(_forget), before=on(check_shards)),
        summary="Delete what is left of archived sagas, so that nothing tells any more that they were there.",
        database=True,
    )
    forget.add_argument("--older-than", type=term, required=True, help="archived this long ago: 730d")
    forget.add_argument("--max-seconds", type=float, metavar="N", help="begin nothing new after this time")

    purged = verbs.add(
        "purge",
        in_turn(on(_purge), before=on(_agree_on_all)),
        summary="Remove finished sagas for good, archived nowhere.",
        database=True,
    )
    purged.add_argument("--without-archive", action="store_true", required=True, help="say that you know that")
    add_policy(purged)
    purged.add_argument("--yes", action="store_true", help="don't ask")
    purged.add_argument("--max-seconds", type=float, metavar="N", help="begin nothing new after this time")
    purged.add_argument("--by", help="who purges, for the ledger (default: the user and the machine)")

    stats = verbs.add(
        "stats",
        in_turn(on(_stats)),
        summary="Say how big the tables are, what is archived, and how far archiving lags behind a policy.",
        database=True,
    )
    add_policy(stats)

    for parser in (archive, archives, forget, purged, stats):
        add_shards(parser, IN_TURN)
    for parser in (archived, verify, restore):
        add_shards(parser, ALL_AT_ONCE)


async def _check_page(given: argparse.Namespace, _console: Console, _: Stop) -> Exit:
    if given.after is not None:
        raise InvalidSagaDataError(
            "--after", "is of one shard's list: give its --schema, or --url, in place of --shards"
        )
    return Exit.DONE


async def _archive(given: argparse.Namespace, console: Console, stop: Stop) -> Exit:
    policy = replace(policy_of(given), forget_after=given.forget_after)
    target = retention.Target(given.to)
    async with opened(given) as storage:
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


async def _archives(given: argparse.Namespace, console: Console, _: Stop) -> Exit:
    async with opened(given) as storage:
        states = [ArchiveState(state) for state in given.state]
        page = await storage.find_archives(states=states, limit=given.limit, after=given.after)
    console.product(shown.archives_as_text(page), **shown.plain(page))
    return Exit.DONE


async def _archived(given: argparse.Namespace, console: Console, _: Stop) -> Exit:
    async with opened(given) as storage:
        found = await retention.find_archived(storage, given.id, archive=given.archive)
    if found is None:
        raise ArchiveError(f"no archive is known to have saga {given.id}; say by --archive where to look")
    console.product(shown.record_as_text(found), **shown.record_as_facts(found))
    return Exit.DONE


async def _verify(given: argparse.Namespace, console: Console, _: Stop) -> Exit:
    if given.shards is not None or given_url(given):
        async with opened(given) as storage:
            report = await retention.verify(given.uri, storage)
    else:
        report = await retention.verify(given.uri)
    console.result(shown.verified_as_text(report), **shown.plain(report), problems=report.problems)
    return Exit.FAILED if report.problems else Exit.DONE


async def _restore(given: argparse.Namespace, console: Console, _: Stop) -> Exit:
    failed: dict[int, SagaStoreError] = {}
    async with opened(given, records=True) as storage:
        if isinstance(storage, ShardedSagaStorage):
            await storage.reach()
        try:
            report = await retention.restore(
                storage,
                given.id,
                archive=given.archive,
                keep_for=given.keep_for,
                report=lambda done: console.report(Progress("restore", done.sagas)),
            )
        except ShardsFailedError as exc:
            failed, report = dict(exc.errors), exc.report
    for place, error in failed.items():
        warn(f"{reason_of(error)}; the sagas of shard {place} aren't back: run it again when that is mended")
    missing = {} if given.shards is None else {"missing": sorted(failed)}
    console.result(shown.restored_as_text(report), **shown.restored_as_facts(report), **missing)
    return worst_of([Exit.REFUSED if report.other else Exit.DONE, Exit.FAILED if failed else Exit.DONE])


async def _forget(given: argparse.Namespace, console: Console, stop: Stop) -> Exit:
    forgotten = 0

    def told(count: int) -> None:
        nonlocal forgotten
        forgotten = count
        console.report(Progress("forget", forgotten))

    async with opened(given) as storage:
        is_complete = await forget_stubs(storage, given.older_than, stop, told)
    console.report(Progress("forget", forgotten, finished=True))
    rest = "" if is_complete else "; there are more"
    console.result(f"forgot {forgotten:,} archived sagas{rest}", forgotten=forgotten, is_complete=is_complete)
    return Exit.DONE


async def _purge(given: argparse.Namespace, console: Console, stop: Stop) -> Exit:
    policy = policy_of(given)
    async with opened(given) as storage:
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


async def _agree_on_all(given: argparse.Namespace, console: Console, stop: Stop) -> Exit:
    """Ask once, and not for each shard."""
    await check_shards(given, console, stop)
    if not given.yes:
        async with opened(given) as storage:
            if not await _agreed(storage, policy_of(given)):
                return console.fail(ValueError("nothing was removed"), Exit.REFUSED)
        given.yes = True
    return Exit.DONE


async def _agreed(storage: SagaStorage, policy: RetentionPolicy) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise InvalidSagaDataError("--yes", "must be given where nobody can be asked: what is purged is gone for good")
    if isinstance(storage, ShardedSagaStorage):
        counts, failed = await each_shard(storage, lambda shard, _: _count_expired(shard, policy), None)
        for error in failed.values():
            warn(f"{reason_of(error)}; its sagas aren't counted")
        sagas = sum(counts)
    else:
        sagas = await _count_expired(storage, policy)
    warn(f"{sagas:,} sagas would be removed with their histories, and archived nowhere; write yes to do it:")
    answer: str = await in_thread("ask", sys.stdin.readline)  # which Ctrl-C doesn't wait for
    return answer == "yes\n"


async def _count_expired(storage: IRetentionStorage, policy: RetentionPolicy) -> int:
    sagas = 0
    async with storage.snapshot() as snapshot:
        after = None
        while True:
            page = await snapshot.find_expired(policy, after=after)
            sagas += len(page.sagas)
            after = page.after
            if after is None:
                return sagas


async def _stats(given: argparse.Namespace, console: Console, _: Stop) -> Exit:
    async with opened(given) as storage:
        figures = await storage.get_figures(retention=policy_of(given) if asks_for_policy(given) else None)
    console.product(shown.stats_as_text(figures), **shown.stats_as_facts(figures))
    return Exit.DONE


def _uuid(value: str) -> UUID:
    try:
        return UUID(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no saga's id; give all of its 32 digits") from None
