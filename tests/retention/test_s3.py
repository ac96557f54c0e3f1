"""Archives on an S3, over HTTP: requests that fail, are refused, dawdle or lose their connection."""

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest

from saga_store import MemoryDatabase, MemorySagaStorage
from saga_store.retention import ArchiveDamagedError, Target, TargetError, archive, restore, verify
from saga_store.retention_model import ArchiveState
from tests.retention.s3 import S3, s3
from tests.retention.world import ALL, check_nothing_is_lost, make_finished, records

URI = "s3://backup/sagas"
SECRET = "s3cr3t-of-the-bucket"  # noqa: S105 - what must not be seen


@pytest.fixture(scope="module")
def running() -> Iterator[S3]:
    with s3() as running:
        yield running


@pytest.fixture
def server(running: S3) -> Iterator[S3]:
    yield running
    running.refuses.clear()
    running.hangs_up.clear()
    running.hangs_up_after.clear()
    running.is_busy, running.waits = 0, None
    files = running.files()
    for path in files.find("backup"):
        files.rm_file(path)


@pytest.fixture
def twin() -> MemorySagaStorage:
    return MemorySagaStorage(MemoryDatabase())


def target(server: S3, **more: timedelta) -> Target:
    return Target(URI, **server.options, **more)


class TestS3:
    async def test_archives_are_written_verified_and_restored(self, server: S3, twin: MemorySagaStorage) -> None:
        """With few requests: they are what is paid for."""
        originals = await records(twin, await make_finished(twin, 20))
        place = target(server)
        await place.prepare()
        server.requests.clear()
        report = await archive(twin, place, ALL, sagas_per_archive=10)

        assert len(server.requests) < 2 * 40
        assert report.removed == 20
        assert report.archives[0].uri is not None
        assert report.archives[0].uri.startswith("s3://backup/sagas/20")
        assert await check_nothing_is_lost(twin, place, originals) == set(originals)
        assert not (await verify(place, twin)).problems
        await restore(twin, archive=place, keep_for=timedelta(0))
        assert await records(twin, originals) == originals

    async def test_a_bucket_that_isnt_there_is_told(self, server: S3, twin: MemorySagaStorage) -> None:
        with pytest.raises(TargetError, match=r"it isn't there .*bucket"):
            await archive(twin, Target("s3://nowhere/x", **server.options), ALL)

    async def test_requests_that_fail_for_a_while_are_made_again(self, server: S3, twin: MemorySagaStorage) -> None:
        """By the library; nobody notices."""
        await make_finished(twin, 3)
        place = target(server)
        await place.prepare()
        server.is_busy = 1

        assert (await archive(twin, place, ALL)).removed == 3

    @pytest.mark.parametrize("method", ["PUT", "GET"])
    @pytest.mark.parametrize("fault", ["refuses", "hangs_up", "hangs_up_after"])
    async def test_requests_that_are_refused_or_cut_remove_nothing(
        self, server: S3, twin: MemorySagaStorage, method: str, fault: str
    ) -> None:
        """Also those that were carried out, and whose answer got lost; the next run archives it all, once."""
        originals = await records(twin, await make_finished(twin, 3))
        place = target(server)
        await place.prepare()
        getattr(server, fault).add(method)

        with pytest.raises((TargetError, ArchiveDamagedError)) as raised:
            await archive(twin, place, ALL)
        assert SECRET not in str(raised.value)
        getattr(server, fault).clear()
        assert not await check_nothing_is_lost(twin, place, originals)
        assert ArchiveState.VERIFIED not in [row.state for row in (await twin.find_archives()).archives]
        await archive(twin, place, ALL)
        assert await check_nothing_is_lost(twin, place, originals) == set(originals)
        assert not (await verify(place, twin)).problems

    async def test_an_answer_that_doesnt_come_ends_the_run(self, server: S3, twin: MemorySagaStorage) -> None:
        """After the target's patience, and Ctrl-C at once; nothing is removed."""
        originals = await records(twin, await make_finished(twin, 3))
        place = target(server, patience=timedelta(seconds=1))
        await place.prepare()
        server.waits = threading.Event()

        with pytest.raises(TargetError, match="did nothing for 1 s"):
            await archive(twin, place, ALL)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await archive(twin, place, ALL)
        server.waits.set()
        server.waits = None
        assert not await check_nothing_is_lost(twin, place, originals)
        assert (await archive(twin, target(server), ALL)).removed == 3

    async def test_a_changed_and_a_lost_object_are_found(self, server: S3, twin: MemorySagaStorage) -> None:
        """By verify, and by restore before it writes anything."""
        ids = await make_finished(twin, 6)
        place = target(server)
        report = await archive(twin, place, ALL, sagas_per_archive=3)
        files = server.files()
        changed, lost = (uri.uri or "" for uri in report.archives)
        content = bytearray(files.cat_file(changed))
        content[-20] ^= 4
        files.pipe_file(changed, bytes(content))
        files.rm_file(lost)

        assert len((await verify(place, twin)).problems) == 2
        with pytest.raises(ArchiveDamagedError):
            await restore(twin, archive=place)
        assert all([await twin.find_stub(saga_id) for saga_id in ids])
