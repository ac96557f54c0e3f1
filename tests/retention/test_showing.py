"""The view of a saga that is archived: its record, as a live saga's is shown, or a sentence that says why not."""

import gzip
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from saga_store import Checkpoint, InvalidSagaDataError, MemorySagaStorage, SagaStatus, SagaStorage
from saga_store.inspection import SagaQuery, SagaSummary
from saga_store.retention import Target, archive, restore
from saga_store.retention.removing import purge
from saga_store.retention.showing import ArchivedSaga, ArchiveReader
from saga_store.web import create_app, pages, render_saga
from saga_store.web.asked import Asked
from saga_store.web.contexts import Redaction
from tests.html_pages import Html
from tests.retention.faulty import Faults
from tests.retention.world import ALL, make_finished
from tests.test_web import page

WITH_CONTEXT = Asked((("context", "show"),))


async def view(storage: Any, saga_id: UUID) -> pages.SagaView:  # noqa: ANN401 - of the views, too
    return await pages.saga(storage, str(saga_id), WITH_CONTEXT, Redaction(None), options={})


async def summary(storage: Any, saga_id: UUID) -> tuple[SagaSummary, Any]:  # noqa: ANN401 - likewise
    found = await storage.find_sagas(SagaQuery(id_prefix=saga_id.hex))
    return found.sagas[0], found.at


async def read(reader: ArchiveReader, storage: SagaStorage, saga_id: UUID) -> ArchivedSaga:
    return await reader.read(*await summary(storage, saga_id))


class TestRecord:
    async def test_it_reads_as_it_did_when_it_was_here(self, storage: SagaStorage, target: Target) -> None:
        """Verdict, timeline, history and context are those of the page before; what may be done is not."""
        ids = await make_finished(storage, 8)
        before = [await view(storage, saga_id) for saga_id in ids]
        report = await archive(storage, target, ALL)
        [row] = report.archives
        for was, saga_id in zip(before, ids, strict=True):
            seen = await view(storage, saga_id)
            assert seen.archived is not None
            assert (seen.archived.archive, seen.archived.problem) == (row.uri, None)
            assert (seen.rows == was.rows, seen.timeline == was.timeline) == (not was.saga.in_doubt,) * 2
            assert (seen.entries, seen.left_out, seen.context) == (was.entries, was.left_out, was.context)
            assert (seen.verdict, was.saga) == (
                was.verdict,
                replace(seen.saga, archived_at=None, silent_for=was.saga.silent_for),
            )
            assert [one.command.split()[1] for one in seen.advice] == ["archived", "restore"]

    async def test_the_page_says_where_it_comes_from(self, storage: SagaStorage, target: Target) -> None:
        """When it was archived, into what, that it was read from there; and the commands that read and restore it."""
        ids = await make_finished(storage, 6)
        [row] = (await archive(storage, target, ALL)).archives
        html = await page(storage, f"/sagas/{ids[3]}", command_options={"--schema": "shop"})
        assert row.archived_at is not None
        assert f"Archived at {row.archived_at:%Y-%m-%d %H:%M:%S} into {row.uri}. What stands here" in html.words
        assert "was read from there, line 4; the database has only a stub of it." in html.words
        assert 'card "declined"' in html.words
        assert f"saga-store archived {ids[3]} --schema shop" in html.pieces
        assert f"saga-store restore {ids[3]} --schema shop" in html.pieces
        assert "leaves an entry in the history" not in html.words
        assert '"total"' not in html.words
        shown = await page(storage, f"/sagas/{ids[3]}?context=show", redact=["order"])
        assert '"total": 12.5' in shown.words
        assert '"order": "[hidden]"' in shown.words

    async def test_a_file_for_a_ticket_has_it(self, twin: MemorySagaStorage, target: Target) -> None:
        ids = await make_finished(twin, 4)
        await archive(twin, target, ALL)
        assert 'card "declined"' in Html(await render_saga(twin, ids[3], redact=["order"])).words
        assert "archives aren't read here" in Html(await render_saga(twin, ids[3], archives=False)).words

    async def test_one_that_went_twice_is_shown_as_it_was_last(self, twin: MemorySagaStorage, target: Target) -> None:
        """Restored, changed and archived again, it is read from the archive that its stub is of."""
        [saga_id] = await make_finished(twin, 1)
        await archive(twin, target, ALL)
        await restore(twin, saga_id, keep_for=timedelta(0))
        await twin.save(Checkpoint(saga_id, context={"order": "changed"}))
        await archive(twin, target, ALL)
        seen = await view(twin, saga_id)
        assert seen.context is not None
        assert "changed" in str(seen.context.text)

    async def test_a_big_context_is_left_out(self, twin: MemorySagaStorage, target: Target) -> None:
        """As of a live saga: beyond a megabyte it isn't shown, and everything else is."""
        [saga_id] = await make_finished(twin, 1)
        await twin.save(Checkpoint(saga_id, context={"text": "x" * 2_000_000}, status=SagaStatus.FAILED))
        await archive(twin, target, ALL)
        html = await page(twin, f"/sagas/{saga_id}?context=show")
        assert "It isn't shown: it is too big" in html.words
        assert "was read from there" in html.words
        assert len(html.source) < 100_000


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def rewritten(folder: Path, change: Callable[[bytes], bytes]) -> None:
    [path] = folder.rglob("*.jsonl.gz")
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def corrupt_line(folder: Path) -> None:
    rewritten(folder, lambda lines: lines.replace(b"for good", b"for evil"))


def corrupt_neighbour(folder: Path) -> None:
    rewritten(folder, lambda lines: lines.replace(b'\\"order\\": 0', b'\\"order\\": 9', 1))


def cut_off(folder: Path) -> None:
    rewritten(folder, lambda lines: b"".join(lines.splitlines(keepends=True)[:2]))


def no_object(folder: Path) -> None:
    [path] = folder.rglob("*.jsonl.gz")
    path.unlink()


def foreign_manifest(folder: Path) -> None:
    [path] = folder.rglob("*.manifest.json")
    path.write_text("{}")


class TestWithoutRecord:
    @pytest.mark.parametrize(
        ("harm", "said"),
        [
            (gone, ".manifest.json: isn't there"),
            (no_object, ".jsonl.gz: isn't there"),
            (corrupt_line, ".jsonl.gz, line 4: isn't what was written"),
            (corrupt_neighbour, ".jsonl.gz: isn't what was written"),
            (cut_off, "line 3: is missing"),
            (foreign_manifest, "doesn't say that it is a saga-store archive"),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    async def test_what_is_damaged_is_named(
        self, storage: SagaStorage, target: Target, tmp_path: Path, harm: Callable[[Path], None], said: str
    ) -> None:
        """The stub's page is there nevertheless, with what is known, why there is no more, and what reads it."""
        ids = await make_finished(storage, 6)
        [row] = (await archive(storage, target, ALL, compression="gzip")).archives
        harm(tmp_path)
        html = await page(storage, f"/sagas/{ids[3]}?context=show")
        assert f"into {row.uri}. Its record isn't shown: " in html.words
        assert said in html.words
        assert "Failed at" in html.words
        assert f"saga-store archived {ids[3]}" in html.pieces
        assert "Its history is empty" not in html.words
        assert "Context" not in html.words

    @pytest.mark.parametrize(
        ("module", "compression", "said"),
        [
            ("fsspec", "zstd", "needs fsspec: install the extra, as in pip install 'saga-store[archive]'"),
            ("zstandard", "zstd", "is compressed by zstd: install the extra, saga-store[archive]"),
        ],
    )
    async def test_an_extra_that_isnt_there_is_named(  # noqa: PLR0913, PLR0917 - and the fixtures
        self,
        twin: MemorySagaStorage,
        target: Target,
        monkeypatch: pytest.MonkeyPatch,
        module: str,
        compression: str,
        said: str,
    ) -> None:
        ids = await make_finished(twin, 1)
        await archive(twin, target, ALL, compression=compression)
        for name in [name for name in sys.modules if name.partition(".")[0] == module]:
            monkeypatch.setitem(sys.modules, name, None)
        assert said in (await page(twin, f"/sagas/{ids[0]}")).words

    async def test_where_archives_may_be_read(self, twin: MemorySagaStorage, target: Target, tmp_path: Path) -> None:
        """Anywhere, nowhere, or in what was named, by a target with options of its own or by a URI."""
        ids = await make_finished(twin, 4)
        await archive(twin, target, ALL)
        for places in (True, target, str(tmp_path), ["memory://elsewhere", target]):
            assert "was read from there" in (await page(twin, f"/sagas/{ids[3]}", archives=places)).words
        for places, said in (
            (False, "isn't shown: archives aren't read here."),
            ([], "isn't shown: archives aren't read here."),
            ("memory://elsewhere", ": isn't where archives are read here."),
        ):
            assert said in (await page(twin, f"/sagas/{ids[3]}", archives=places)).words
        MemoryFileSystem.store.clear()
        bad: Any
        for bad in (7, [7], None):
            with pytest.raises(InvalidSagaDataError, match="archives must be True, False, or targets"):
                create_app(twin, archives=bad)

    async def test_a_target_that_hangs_is_given_up(self, twin: MemorySagaStorage, faults: Faults) -> None:
        """After the time that was set; and it takes no more threads than a few, however often it is asked."""
        ids = await make_finished(twin, 1)
        await archive(twin, "faulty://sagas", ALL)
        faults.hangs = threading.Event()
        reader = ArchiveReader(twin, seconds=0.05)
        problems = [(await read(reader, twin, ids[0])).problem for _ in range(6)]
        assert ["within 0.05 s" in str(problem) for problem in problems] == [True] * 4 + [False] * 2
        assert str(problems[-1]).endswith("isn't read now, for 4 others are; look again")
        faults.hangs.set()
        faults.hangs = None
        while (await read(ArchiveReader(twin), twin, ids[0])).problem:  # until the file system is left alone
            pass
        while (await read(reader, twin, ids[0])).problem:
            pass

    async def test_what_is_too_big_is_left_where_it_is(self, twin: MemorySagaStorage, target: Target) -> None:
        """A line that is longer than a view reads isn't read; its neighbours are, however long it is."""
        ids = await make_finished(twin, 3)
        await twin.save(Checkpoint(ids[1], context={"text": "x" * 3_000_000}, status=SagaStatus.COMPLETED))
        await archive(twin, target, ALL)
        reader = ArchiveReader(twin, most_bytes=10_000)
        assert "its record has more than the 10,000 bytes" in str((await read(reader, twin, ids[1])).problem)
        assert (await read(reader, twin, ids[2])).found is not None
        reader = ArchiveReader(twin, most_bytes=100)
        assert "is bigger than the 100 bytes" in str((await read(reader, twin, ids[2])).problem)

    async def test_what_has_no_archive(self, storage: SagaStorage, target: Target) -> None:
        """Removed without one, or back in the table by now."""
        first, second = await make_finished(storage, 2)
        await archive(storage, target, ALL, max_sagas=1)
        await purge(storage, ALL, by="alice")
        seen = {saga_id: await read(ArchiveReader(storage), storage, saga_id) for saga_id in (first, second)}
        [purged] = [one for one in seen.values() if one.found is None]
        assert purged.problem == "it was removed without an archive, by alice"
        [back] = [one.saga for one in seen.values() if one.found is not None]
        await restore(storage, back.id)
        late = await ArchiveReader(storage).read(back, back.updated_at)
        assert late.problem == "it was restored or forgotten just now; look again"
