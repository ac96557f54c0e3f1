"""Archiving, verifying, restoring: what is done, what is told, and that a target that fails or lies removes nothing."""

import errno
import gzip
import hashlib
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from saga_store import (
    Checkpoint,
    InvalidSagaDataError,
    LogStep,
    MemoryDatabase,
    MemorySagaStorage,
    SagaAlreadyExistsError,
    SagaArchivedError,
    SagaStatus,
    SagaStepStatus,
    SagaStorage,
)
from saga_store.retention import (
    ArchiveDamagedError,
    ArchiveError,
    RetentionPolicy,
    Target,
    TargetError,
    archive,
    archiving,
    find_archived,
    restore,
    verify,
)
from saga_store.retention.manifest import MANIFEST, Manifest
from saga_store.retention.removing import purge
from saga_store.retention.target import MARKER
from saga_store.retention_model import ArchiveState
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.databases import Database, Databases
from tests.retention.faulty import Faults, FaultyFileSystem
from tests.retention.world import ALL, check_nothing_is_lost, make_finished, record, records

DAY = timedelta(days=1)


async def states(storage: SagaStorage) -> list[ArchiveState]:
    return [row.state for row in (await storage.find_archives()).archives]


class TestArchive:
    async def test_what_is_finished_goes_and_comes_back(self, storage: SagaStorage, target: Target) -> None:
        """Into as many archives as it takes; each saga is a stub then, and its archive has it to the letter."""
        originals = await records(storage, await make_finished(storage, 25))
        running = uuid4()
        await storage.create_saga(running, "order", {})
        report = await archive(storage, target, ALL, sagas_per_archive=10)

        assert (report.sagas, report.removed, report.entries, report.is_complete) == (25, 25, 50, True)
        assert [(row.sagas, row.state) for row in report.archives] == [
            (10, ArchiveState.REMOVED),
            (10, ArchiveState.REMOVED),
            (5, ArchiveState.REMOVED),
        ]
        assert await check_nothing_is_lost(storage, target, originals) == set(originals)
        assert await storage.load_saga_state(running) == (SagaStatus.PENDING, {})
        checked = await verify(target, storage)
        assert (checked.problems, checked.strays, sum(one.sagas for one in checked.archives)) == ([], [], 25)

        some = next(iter(originals))
        with pytest.raises(SagaArchivedError) as raised:
            await storage.get_saga(some)
        assert raised.value.archive in {row.uri for row in report.archives}
        with pytest.raises(SagaAlreadyExistsError):
            await storage.create_saga(some, "order", {})

        assert (await restore(storage, some)).restored == 1
        assert await record(storage, some) == originals[some]
        assert (await restore(storage, some)).same == 1
        back = await restore(storage, archive=target)
        assert (back.restored, back.same, back.other) == (24, 1, [])
        assert await records(storage, originals) == originals
        # Restored sagas are held for a while.
        assert (await archive(storage, target, ALL)).sagas == 0

    async def test_stubs_are_forgotten_after_their_time(self, storage: SagaStorage, target: Target) -> None:
        """By the run that archives, once it has archived what is due; and not before."""
        ids = await make_finished(storage, 5)
        kept = await archive(storage, target, replace(ALL, forget_after=DAY))
        assert (kept.removed, kept.forgotten, kept.is_complete) == (5, 0, True)
        assert await storage.find_stub(ids[0]) is not None

        more = await make_finished(storage, 3)
        gone = await archive(storage, target, replace(ALL, forget_after=timedelta(0)), max_sagas=3)
        assert (gone.removed, gone.forgotten, gone.is_complete) == (3, 0, False)
        gone = await archive(storage, target, replace(ALL, forget_after=timedelta(0)))
        assert (gone.removed, gone.forgotten, gone.is_complete) == (0, 8, True)
        assert [await storage.find_stub(saga_id) for saga_id in ids + more] == [None] * 8
        assert not (await verify(target, storage)).problems

    async def test_a_copy_of_the_database_takes_nothing_from_the_original(
        self, twin: MemorySagaStorage, target: Target
    ) -> None:
        """Restored from the time when an archive was being written, and run against the same target."""
        originals = await records(twin, await make_finished(twin, 3))
        [row] = (await archive(twin, target, ALL)).archives
        copy = MemorySagaStorage(MemoryDatabase())
        await make_finished(copy, 1)
        await copy.begin_archive(row.id, uri=row.uri, by="the same archiver")

        assert (await archive(copy, target, ALL)).is_complete
        assert (await copy.get_archive(row.id)).state is ArchiveState.FAILED
        assert "is whole, and stays" in ((await copy.get_archive(row.id)).error or "")
        assert not (await verify(target, twin)).problems
        assert await check_nothing_is_lost(twin, target, originals) == set(originals)

    async def test_a_limit_holds_for_what_is_resumed(
        self, storage: SagaStorage, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may be more than the limit; nothing else is begun then."""
        await make_finished(storage, 9)

        async def stopped(*_: object) -> bool:
            return False

        with monkeypatch.context() as patched:
            patched.setattr(archiving, "make_stubs", stopped)
            await archive(storage, target, ALL)
        await make_finished(storage, 1)
        resumed = await archive(storage, target, ALL, max_sagas=2)
        assert (resumed.sagas, resumed.removed, resumed.is_complete) == (9, 9, False)
        assert (await archive(storage, target, ALL)).is_complete

    @pytest.mark.parametrize("ends", ["purge", "archive"])
    @pytest.mark.parametrize("verified", [False, True])
    async def test_a_purge_that_was_killed_is_ended(
        self, storage: SagaStorage, target: Target, ends: str, *, verified: bool
    ) -> None:
        """By the next purge or archive: a line that nobody ends would be told of for ever."""
        await make_finished(storage, 2)
        row = await storage.begin_archive(uuid4(), uri=None, by="killed")
        if verified:
            await storage.verify_archive(row.id, sha256=None, sagas=2, entries=1, bytes=0, watermark=None)
        if ends == "purge":
            assert await purge(storage, ALL, by="alice") == 2
        else:
            report = await archive(storage, target, ALL)
            assert (report.left, report.removed) == ([], 2)
        ended = await storage.get_archive(row.id)
        assert ended.state is (ArchiveState.REMOVED if verified else ArchiveState.FAILED)
        assert (await storage.get_figures()).oldest_open_archive == timedelta(0)

    async def test_a_full_disk_of_ones_own_is_told(
        self, twin: MemorySagaStorage, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By one line with the remedy; nothing is begun, and nothing removed."""
        await make_finished(twin, 3)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", full)
        with pytest.raises(ArchiveError, match="No space left on device; free some space there, or name another"):
            await archive(twin, target, ALL)
        assert await states(twin) == []

    async def test_an_engine_is_as_good_as_a_storage(
        self, make_engine: Callable[..., AsyncEngine], target: Target
    ) -> None:
        engine = make_engine("asyncpg")
        [saga_id] = await make_finished(SqlAlchemySagaStorage(engine), 1)

        assert (await archive(engine, target, ALL)).removed == 1
        assert await find_archived(engine, saga_id) is not None
        assert not (await verify(target, engine)).problems
        assert (await restore(engine, saga_id)).restored == 1

    async def test_the_policy_decides_by_outcome_and_name(self, storage: SagaStorage, target: Target) -> None:
        ids = await make_finished(storage, 3, name="order") + await make_finished(storage, 3, name="keep")
        failed = [ids[0], ids[3]]
        kept = RetentionPolicy(completed=timedelta(0), names={"keep": None})
        by_name = RetentionPolicy(failed=DAY, names={"order": timedelta(0)})

        assert (await archive(storage, target, kept)).sagas == 2
        assert await storage.find_stub(failed[0]) is None
        assert (await archive(storage, target, by_name)).sagas == 1
        assert (await archive(storage, target, RetentionPolicy(failed=DAY))).sagas == 0
        assert (await archive(storage, target, RetentionPolicy())).sagas == 0
        assert (await archive(storage, target, ALL)).sagas == 3

    async def test_a_dry_run_says_what_would_go(self, storage: SagaStorage, target: Target) -> None:
        """By name and status; nothing is written, neither here nor there."""
        await make_finished(storage, 7)
        report = await archive(storage, target, ALL, dry_run=True)

        assert dict(report.expired) == {("order", "COMPLETED"): 4, ("order", "FAILED"): 3}
        assert (report.is_dry_run, report.sagas, report.removed, report.is_complete) == (True, 7, 0, True)
        assert await target.files() == []
        assert await states(storage) == []

    async def test_limits_end_a_run_and_the_next_one_goes_on(self, storage: SagaStorage, target: Target) -> None:
        """Whatever ended it; also what came before the place where the walk had stopped is found."""
        await make_finished(storage, 9)
        first = await archive(storage, target, ALL, max_sagas=4, sagas_per_archive=3)
        assert (first.sagas, first.removed, first.is_complete, len(first.archives)) == (4, 4, False, 2)
        stopped = await archive(storage, target, ALL, should_stop=lambda: True)
        assert (stopped.sagas, stopped.is_complete) == (0, False)
        timed = await archive(storage, target, ALL, max_seconds=1e-6)
        assert (timed.sagas, timed.is_complete) == (0, False)
        rest = await archive(storage, target, ALL)
        assert (rest.sagas, rest.is_complete) == (5, True)

    async def test_a_stop_in_the_middle_leaves_the_rest_to_the_next_run(
        self, twin: MemorySagaStorage, target: Target
    ) -> None:
        """Ended between two transactions that remove: the archive is resumed."""
        originals = await records(twin, await make_finished(twin, 60))
        seen: list[str] = []
        report = await archive(
            twin, target, ALL, should_stop=lambda: "removing" in seen, report=lambda told: seen.append(told.doing)
        )
        assert await check_nothing_is_lost(twin, target, originals)
        assert report.is_complete is False or report.removed == 60
        await archive(twin, target, ALL)
        assert await check_nothing_is_lost(twin, target, originals) == set(originals)
        assert await states(twin) == [ArchiveState.REMOVED]

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"max_sagas": 0}, "max_sagas must be a number greater than zero"),
            ({"max_seconds": -1}, "max_seconds must be"),
            ({"max_seconds": float("nan")}, "max_seconds must be"),
            ({"sagas_per_archive": True}, "sagas_per_archive must be"),
            ({"compression": "rar"}, "compression must be one of gzip, zstd"),
        ],
    )
    async def test_impossible_limits_are_refused(
        self, twin: MemorySagaStorage, target: Target, options: dict[str, float], reason: str
    ) -> None:
        with pytest.raises(InvalidSagaDataError, match=reason):
            await archive(twin, target, ALL, **options)  # type: ignore[arg-type] # that is what is tested
        assert await target.files() == []

    @pytest.mark.parametrize(
        "policy",
        [
            lambda: RetentionPolicy(completed=-DAY),
            lambda: RetentionPolicy(failed=30),  # type: ignore[arg-type] # that is what is tested
            lambda: RetentionPolicy(names={"order": -DAY}),
            lambda: RetentionPolicy(names={"": DAY}),
            lambda: RetentionPolicy(names=["order"]),  # type: ignore[arg-type] # likewise
            lambda: RetentionPolicy(forget_after=-DAY),
        ],
    )
    def test_an_impossible_policy_is_refused(self, policy: Callable[[], RetentionPolicy]) -> None:
        with pytest.raises(InvalidSagaDataError):
            policy()

    def test_a_policy_is_what_it_was_made_of(self) -> None:
        """What the caller does to the names afterwards changes nothing."""
        names = {"order": DAY}
        policy = RetentionPolicy(names=names)
        names.clear()

        assert policy.names == {"order": DAY}

    def test_what_is_no_storage_is_refused(self, target: Target) -> None:
        with pytest.raises(TypeError, match="takes an AsyncEngine"):
            archive(7, target, ALL).send(None)


class TestLetters:
    async def test_contexts_that_others_wrote_come_back_to_the_letter(
        self, make_engine: Callable[..., AsyncEngine], admin: psycopg.Connection, target: Target
    ) -> None:
        """Spaces, double keys, numbers beyond any machine's, what isn't ASCII; json keeps them, and so do archives."""
        text = '{ "a" : 1.50, "a": 1e400, "é": "\\u00e9\\ud83d\\ude00", "n": 123456789012345678901234567890 }'
        saga_id = uuid4()
        admin.execute(
            "INSERT INTO saga_executions (id, name, status, context) VALUES (%s, 'x', 'FAILED', %s)", [saga_id, text]
        )
        storage = SqlAlchemySagaStorage(make_engine("psycopg"))
        await archive(storage, target, ALL)
        assert admin.execute("SELECT context::text FROM saga_executions").fetchall() == [("{}",)]
        await restore(storage, saga_id)

        assert admin.execute("SELECT context::text FROM saga_executions").fetchall() == [(text,)]

    async def test_a_saga_that_cant_be_read_stays_and_is_named(
        self, make_engine: Callable[..., AsyncEngine], admin: psycopg.Connection, target: Target
    ) -> None:
        """The others go."""
        storage = SqlAlchemySagaStorage(make_engine("asyncpg"))
        ids = await make_finished(storage, 3)
        admin.execute("UPDATE saga_logs SET created_at = 'infinity' WHERE saga_id = %s", [ids[1]])
        report = await archive(storage, target, ALL)

        assert (report.removed, report.unreadable) == (2, [ids[1]])
        assert await storage.find_stub(ids[1]) is None

    @pytest.mark.parametrize("entries", [2, 1_201])
    @pytest.mark.parametrize(
        ("table", "oddity"),
        [
            ("saga_logs", "created_at = 'infinity'"),
            ("saga_logs", "step_name = ''"),
            ("saga_logs", "id = -id"),
            ("saga_executions", "name = ''"),
            ("saga_executions", "version = 0"),
            ("saga_executions", "recovery_attempts = -1"),
            ("saga_executions", "context = ' [1]'"),
            ("saga_executions", "context = to_json(repeat('x', 300000))"),
        ],
    )
    async def test_whatever_is_odd_stops_no_other(  # noqa: PLR0913, PLR0917 - three fixtures, and what is odd
        self,
        make_engine: Callable[..., AsyncEngine],
        admin: psycopg.Connection,
        target: Target,
        entries: int,
        table: str,
        oddity: str,
    ) -> None:
        """What an archive couldn't be read with, or couldn't be restored with, stays; again and again."""
        storage = SqlAlchemySagaStorage(make_engine("psycopg"))
        ids = await make_finished(storage, 3)
        steps = [LogStep("pay", "act", SagaStepStatus.STARTED)] * entries
        odd = uuid4()
        await storage.save(Checkpoint(odd, name="odd", status=SagaStatus.COMPLETED, context={}, steps=steps))
        row = "%s" if table == "saga_executions" else "(SELECT max(id) FROM saga_logs WHERE saga_id = %s)"
        admin.execute(f"UPDATE {table} SET {oddity} WHERE id = {row}", [odd])  # noqa: S608 - of the above
        for more in (0, 2):
            ids += await make_finished(storage, more)
            report = await archive(storage, target, ALL)
            assert (report.is_complete, report.unreadable) == (True, [odd])
        assert not (await verify(target, storage)).problems
        assert (await restore(storage, archive=target)).restored == len(ids)

    async def test_what_is_nested_deeper_than_python_reads_comes_back(
        self, make_engine: Callable[..., AsyncEngine], admin: psycopg.Connection, target: Target
    ) -> None:
        text = '{"a":' * 2_000 + "1" + "}" * 2_000
        saga_id = uuid4()
        admin.execute(
            "INSERT INTO saga_executions (id, name, status, context) VALUES (%s, 'x', 'FAILED', %s)", [saga_id, text]
        )
        storage = SqlAlchemySagaStorage(make_engine("asyncpg"))
        assert (await archive(storage, target, ALL)).removed == 1
        assert (await restore(storage, archive=target)).restored == 1
        assert admin.execute("SELECT context::text FROM saga_executions").fetchall() == [(text,)]

    @pytest.mark.parametrize("compression", ["gzip", "zstd"])
    async def test_a_big_saga_goes_between_small_ones(
        self, storage: SagaStorage, target: Target, compression: str
    ) -> None:
        """Piece by piece, and comes back whole."""
        ids = await make_finished(storage, 2)
        big = uuid4()
        await storage.save(Checkpoint(big, name="big", status=SagaStatus.COMPLETED, context={"x": "é" * 500_000}))
        ids += [big, *await make_finished(storage, 2)]
        originals = await records(storage, ids)
        await archive(storage, target, ALL, compression=compression)

        assert await check_nothing_is_lost(storage, target, originals) == set(ids)
        await restore(storage, archive=target)
        assert await records(storage, ids) == originals


class TestFailingTarget:
    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), "it is full"),
            (PermissionError("no"), "it refuses"),
            (ConnectionResetError("cut"), "ConnectionResetError: cut"),
        ],
    )
    async def test_it_removes_nothing_and_is_told(
        self, twin: MemorySagaStorage, faults: Faults, error: OSError, reason: str
    ) -> None:
        """The ledger says why, and what was there of the archive is gone."""
        originals = await records(twin, await make_finished(twin, 5))
        await Target("faulty://x").prepare()
        faults.done.clear()
        faults.fails_at, faults.error = 5, lambda: error

        with pytest.raises(TargetError, match=reason):
            await archive(twin, "faulty://x", ALL)
        [row] = (await twin.find_archives()).archives
        assert row.state is ArchiveState.FAILED
        assert reason in (row.error or "")
        assert not await check_nothing_is_lost(twin, Target("faulty://x"), originals)
        assert await Target("faulty://x").files() == ["saga-store-archive.json"]
        assert (await archive(twin, "faulty://x", ALL)).removed == 5

    @pytest.mark.parametrize("suffix", [".jsonl.zst", MANIFEST])
    @pytest.mark.parametrize(
        "spoils",
        [
            lambda _: None,
            lambda _: b"",
            lambda content: content[:-1],
            lambda content: content[: len(content) // 2],
            lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
            lambda content: content + b"\n",
            lambda content: content + content,
        ],
        ids=["loses", "empties", "cuts a byte", "cuts half", "changes a bit", "adds a line", "doubles"],
    )
    async def test_one_that_lies_is_noticed(
        self, twin: MemorySagaStorage, faults: Faults, spoils: Callable[[bytes], bytes | None], suffix: str
    ) -> None:
        """Nothing is removed, the file is named, and the next run with a target that works archives it all."""
        originals = await records(twin, await make_finished(twin, 9))
        faults.spoils = lambda path, content: spoils(content) if path.endswith(suffix) else content

        with pytest.raises(ArchiveDamagedError, match=r"^faulty://x/\d{4}/\d\d/\d\d/.*" + suffix.replace(".", r"\.")):
            await archive(twin, "faulty://x", ALL)
        assert await states(twin) == [ArchiveState.FAILED]
        assert not await check_nothing_is_lost(twin, Target("faulty://x"), originals)
        faults.spoils = None
        await archive(twin, "faulty://x", ALL)
        assert await check_nothing_is_lost(twin, Target("faulty://x"), originals) == set(originals)
        assert not (await verify("faulty://x", twin)).strays

    async def test_one_that_hangs_ends_the_run(self, twin: MemorySagaStorage, faults: Faults) -> None:
        """After its patience; nothing is removed."""
        await make_finished(twin, 3)
        target = Target("faulty://x", patience=timedelta(seconds=0.2))
        await target.prepare()
        faults.hangs = threading.Event()

        with pytest.raises(TargetError, match="did nothing for"):
            await archive(twin, target, ALL)
        faults.hangs.set()
        faults.hangs = None
        assert (await archive(twin, target, ALL)).removed == 3

    async def test_objects_that_are_lost_before_a_run_is_resumed_remove_nothing_more(
        self, twin: MemorySagaStorage, faults: Faults
    ) -> None:
        """A verified archive is read again by whoever goes on with it."""
        ids = await make_finished(twin, 3)
        report = await archive(twin, "faulty://x", ALL)
        [row] = report.archives
        await restore(twin, archive="faulty://x", keep_for=timedelta(0))
        target = Target("faulty://x")
        # As if its archiver had been killed before it removed the first saga.
        again = await twin.begin_archive(uuid4(), uri=target.uri("2026/11/26/lost.jsonl.zst"), by="x")
        await twin.verify_archive(again.id, sha256="0" * 64, sagas=3, entries=3, bytes=9, watermark=None)

        with pytest.raises(ArchiveDamagedError, match="isn't there"):
            await archive(twin, target, ALL)
        assert (await twin.get_archive(again.id)).state is ArchiveState.FAILED
        assert [await twin.find_stub(saga_id) for saga_id in ids] == [None] * 3
        assert not faults.spoils
        assert row.removed == 3

    async def test_a_verified_archive_elsewhere_is_left_and_told(self, twin: MemorySagaStorage, target: Target) -> None:
        row = await twin.begin_archive(uuid4(), uri="s3://elsewhere/a.jsonl.gz", by="x")
        await twin.verify_archive(row.id, sha256="0" * 64, sagas=1, entries=0, bytes=9, watermark=None)

        assert (await archive(twin, target, ALL)).left == ["s3://elsewhere/a.jsonl.gz"]
        assert (await twin.get_archive(row.id)).state is ArchiveState.VERIFIED

    async def test_foreign_files_keep_everything_where_it_is(self, twin: MemorySagaStorage, target: Target) -> None:
        await make_finished(twin, 1)
        await target.write("holiday.jpg", b"x")

        with pytest.raises(TargetError, match="holiday"):
            await archive(twin, target, ALL)
        assert await states(twin) == []


class TestVerify:
    async def test_what_was_changed_later_is_named(self, twin: MemorySagaStorage, faults: Faults) -> None:
        """One problem a line; the other archives are looked at nonetheless."""
        await make_finished(twin, 9)
        await archive(twin, "faulty://x", ALL, sagas_per_archive=3)
        assert not faults.spoils
        store = FaultyFileSystem.store
        first, second, third = sorted(path for path in store if path.endswith(".jsonl.zst"))
        content = bytearray(store[first].getvalue())
        content[60] ^= 1
        store[first] = type(store[first])(store[first].fs, first, bytes(content))
        del store[second]
        report = await verify("faulty://x", twin)

        assert len(report.archives) == 3
        assert [problem.split(":")[1].rpartition("/")[2].split(",")[0] for problem in report.problems] == [
            first.rpartition("/")[2],
            second.rpartition("/")[2],
        ]
        assert all("\n" not in problem for problem in report.problems)
        assert third.rpartition("/")[2] in report.archives[2].uri

    async def test_what_the_ledger_has_must_be_there(self, twin: MemorySagaStorage, target: Target) -> None:
        """Also if nothing is left to see of it; without the ledger nobody knows."""
        await make_finished(twin, 6)
        await archive(twin, target, ALL, sagas_per_archive=3)
        for path in await target.files():
            if path.startswith("2"):
                await target.remove(path)

        assert len((await verify(target, twin)).problems) == 2
        await target.remove(MARKER)  # a disk that isn't mounted
        assert len((await verify(target, twin)).problems) == 2
        with pytest.raises(TargetError, match="holds no archive"):
            await verify(target)

    async def test_another_archive_under_its_name_is_noticed(self, twin: MemorySagaStorage, target: Target) -> None:
        """A whole one, even: it isn't the one that the ledger knows."""
        await make_finished(twin, 6)
        await archive(twin, target, ALL, sagas_per_archive=3)
        files = [path for path in await target.files() if path.startswith("2")]
        [one, _, other, _] = files
        manifest = json.loads(await target.read(files[3]))
        manifest["object"] = one.rpartition("/")[2]
        await target.write(one, await target.read(other))
        await target.write(files[1], json.dumps(manifest).encode())

        assert not (await verify(target)).problems
        [problem] = (await verify(target, twin)).problems
        assert "isn't what the ledger has" in problem

    async def test_strays_are_listed_and_a_single_archive_can_be_verified(
        self, twin: MemorySagaStorage, target: Target
    ) -> None:
        """What a killed archiver left isn't taken for an archive."""
        await make_finished(twin, 3)
        report = await archive(twin, target, ALL)
        await target.write("2026/11/26/x.jsonl.gz", b"x")

        assert (await verify(target)).strays == [target.uri("2026/11/26/x.jsonl.gz")]
        uri = report.archives[0].uri or ""
        for one in (uri, uri.replace(".jsonl.zst", MANIFEST)):
            assert [checked.uri for checked in (await verify(one)).archives] == [uri]
            assert not (await verify(one, twin)).problems


class TestRestore:
    async def test_into_another_database(
        self, make_engine: Callable[..., AsyncEngine], databases: Databases, template: Database, target: Target
    ) -> None:
        """Rows, times, versions and histories are what they were; entries have new ids, in order."""
        storage = SqlAlchemySagaStorage(make_engine("asyncpg"))
        originals = await records(storage, await make_finished(storage, 12))
        await archive(storage, target, ALL, sagas_per_archive=5)
        with databases.clone(template) as database:
            engine = create_async_engine(database.url("psycopg"))
            other = SqlAlchemySagaStorage(engine)
            report = await restore(other, archive=target, keep_for=timedelta(0))
            assert (report.restored, report.same, report.other) == (12, 0, [])
            for saga_id, original in originals.items():
                found = await record(other, saga_id)
                assert [(e.step_name, e.status, e.details, e.created_at) for e in found.entries] == [
                    (e.step_name, e.status, e.details, e.created_at) for e in original.entries
                ]
                assert (found.context, found.version, found.updated_at) == (
                    original.context,
                    original.version,
                    original.updated_at,
                )
            assert (await restore(other, archive=target)).same == 12
            await engine.dispose()

    @pytest.mark.parametrize("goes_back", [False, True])
    async def test_of_several_records_the_one_counts_that_the_stub_is_of(
        self,
        storage: SagaStorage,
        target: Target,
        goes_back: bool,  # noqa: FBT001 - pytest's
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Sagas that were restored and archived again, unchanged or with more; also if a clock went back."""
        ids = await make_finished(storage, 4)
        await archive(storage, target, ALL)
        await restore(storage, archive=target, keep_for=timedelta(0))
        await storage.log_step(ids[0], "late", "act", SagaStepStatus.COMPLETED)
        originals = await records(storage, ids)
        if goes_back:

            def earlier(*given: Any) -> Manifest:  # noqa: ANN401 - what a manifest is made of
                return replace(Manifest(*given), written_at=datetime(2020, 1, 1, tzinfo=UTC))

            monkeypatch.setattr("saga_store.retention.archiving.Manifest", earlier)
        assert (await archive(storage, target, ALL)).removed == 4
        report = await restore(storage, archive=target)

        assert (report.restored, report.same, report.other, report.superseded) == (4, 0, [], 4)
        assert await records(storage, ids) == originals

    async def test_a_saga_with_other_content_is_left_and_named(self, storage: SagaStorage, target: Target) -> None:
        """With the file and line of its record; the others come back."""
        ids = await make_finished(storage, 3)
        await archive(storage, target, ALL)
        await restore(storage, ids[1], archive=target)
        await storage.update_context(ids[1], {"newer": True})
        report = await restore(storage, archive=target)

        assert (report.restored, report.same) == (2, 0)
        [(saga_id, file, line)] = report.other
        assert (saga_id, line) == (ids[1], 2)
        assert target.path(file)
        assert (await storage.get_saga(ids[1])).context == {"newer": True}

    async def test_a_damaged_archive_restores_nothing(self, twin: MemorySagaStorage, faults: Faults) -> None:
        """Not even of the archives before it."""
        ids = await make_finished(twin, 9)
        await archive(twin, "faulty://x", ALL, sagas_per_archive=3)
        assert not faults.spoils
        last = max(path for path in FaultyFileSystem.store if path.endswith(".jsonl.zst"))
        file = FaultyFileSystem.store[last]
        FaultyFileSystem.store[last] = type(file)(file.fs, last, file.getvalue()[:-9])

        with pytest.raises(ArchiveDamagedError, match="line"):
            await restore(twin, archive="faulty://x")
        assert all([await twin.find_stub(saga_id) for saga_id in ids])

    async def test_a_saga_is_found_in_a_target_without_a_ledger(self, twin: MemorySagaStorage, target: Target) -> None:
        """Of several records the one of the highest version."""
        [saga_id] = await make_finished(twin, 1)
        await archive(twin, target, ALL)
        await restore(twin, saga_id)
        await twin.release_saga(saga_id, by="x", reason="y")
        await twin.update_context(saga_id, {"newer": True})
        await archive(twin, target, ALL)
        another = MemorySagaStorage(MemoryDatabase())

        assert await find_archived(another, saga_id) is None
        found = await find_archived(another, saga_id, archive=target)
        assert found is not None
        assert found.record.context == '{"newer":true}'
        assert (await restore(another, saga_id, archive=target)).restored == 1
        assert await find_archived(another, uuid4(), archive=target) is None

    async def test_what_no_archive_has_is_told(self, twin: MemorySagaStorage, target: Target) -> None:
        """In one line, which says what to do."""
        await target.prepare()
        with pytest.raises(ArchiveError, match="wasn't archived from this database"):
            await restore(twin, UUID(int=1))
        with pytest.raises(ArchiveError, match="no archive there has"):
            await restore(twin, UUID(int=1), archive=target)
        with pytest.raises(TargetError, match="holds no archive"):
            await restore(twin, archive=target)
        with pytest.raises(InvalidSagaDataError, match="saga_id must be given, or else an archive"):
            await restore(twin)

    async def test_a_record_that_the_database_refuses_is_named(self, twin: MemorySagaStorage, target: Target) -> None:
        """By file and line: somebody made an archive of it, hashes and all."""
        [saga_id] = await make_finished(twin, 1)
        await archive(twin, target, ALL, compression="gzip")
        path, manifest_at, _ = await target.files()
        line = gzip.decompress(await target.read(path)).replace(b'"context":"{', b'"context":"[')
        content = gzip.compress(line)
        manifest = json.loads(await target.read(manifest_at))
        manifest["sha256"], manifest["bytes"] = hashlib.sha256(content).hexdigest(), len(content)
        manifest["lines"][0][4] = hashlib.sha256(line[:-1]).hexdigest()
        await target.write(path, content)
        await target.write(manifest_at, json.dumps(manifest).encode())

        with pytest.raises(InvalidSagaDataError, match=r"\.jsonl\.gz, line 1: .*context"):
            await restore(MemorySagaStorage(MemoryDatabase()), saga_id, archive=target)


class TestExtras:
    async def test_without_zstandard_it_is_gzip(
        self, twin: MemorySagaStorage, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And what zstd compressed is told to need it."""
        await make_finished(twin, 1)
        await archive(twin, target, ALL)
        monkeypatch.setitem(sys.modules, "zstandard", None)
        await make_finished(twin, 1)
        report = await archive(twin, target, ALL)

        assert (report.archives[0].uri or "").endswith(".jsonl.gz")
        with pytest.raises(ArchiveError, match=r"compressed by zstd: install the extra, saga-store\[archive\]"):
            await restore(twin, archive=target)

    async def test_what_is_missing_is_named_with_its_extra(
        self, twin: MemorySagaStorage, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await make_finished(twin, 1)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ArchiveError, match=r"saga-store\[archive,parquet\]"):
            await archive(twin, target, ALL, parquet=True)
        monkeypatch.setitem(sys.modules, "fsspec.core", None)
        with pytest.raises(TargetError, match=r"saga-store\[archive\]"):
            Target("/srv/sagas")
