"""Keeping and letting go over shards: one target for all, each with its own ledger and turn; one is down or busy."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from saga_store import (
    ArchiverBusyError,
    Checkpoint,
    InvalidSagaDataError,
    MemoryDatabase,
    MemorySagaStorage,
    SagaStatus,
    SagaStoreError,
    SchemaError,
    ShardingError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.inspection import Cursor
from saga_store.retention import (
    ShardsFailedError,
    TargetError,
    archive,
    find_archived,
    restore,
    verify,
)
from saga_store.retention.over_shards import each_shard
from saga_store.retention_model import Restored
from saga_store.retention_storage import Hold
from saga_store.shard_records import ShardState
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.databases import Database
from tests.retention.world import ALL as EVERYTHING
from tests.retention.world import make_finished, record
from tests.shard_schemas import ALL, SECRET, Shards, ids_of
from tests.terminal import Terminal
from tests.verbs import Command, facts

DOWN = 1
IDS = {shard: ids_of(shard, 2) for shard in range(3)}
EACH = ("--completed", "0")


class Away(MemorySagaStorage):
    """A shard that can be taken away."""

    is_away = False
    error: SagaStoreError = StorageUnavailableError("the server is down\nsays libpq", "57P03")

    def come_back_as(self, database: MemoryDatabase) -> None:
        self._bind, self.is_away = database, False

    async def _hold(self, hold: Hold) -> None:
        self._look()
        await super()._hold(hold)

    @property
    def stubs(self) -> int:
        return sum(row.archived_at is not None for row in self._view()._database._rows.values())  # noqa: SLF001

    async def _forget(self, *given: Any) -> tuple[int, Cursor | None]:  # noqa: ANN401 - as in the interface
        self._look()
        return await super()._forget(*given)

    async def _fetch_shard_state(self) -> ShardState:
        self._look()
        return await super()._fetch_shard_state()

    async def _restore(self, *given: Any) -> list[Restored]:  # noqa: ANN401 - as in the interface
        self._look()
        return await super()._restore(*given)

    def _look(self) -> None:
        if self.is_away:
            raise self.error


def made_of(*shards: MemorySagaStorage) -> ShardedSagaStorage:
    return ShardedSagaStorage(shards)


async def finish(storage: ShardedSagaStorage) -> None:
    for ids in IDS.values():
        for saga_id in ids:
            await storage.save(Checkpoint(saga_id, name="order", context={}, status=SagaStatus.COMPLETED))


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def lose(uri: str) -> None:
    Path(uri.removeprefix("file://")).unlink()


class TestLibrary:
    @pytest.fixture
    async def parts(self) -> list[Away]:
        parts = [Away(MemoryDatabase()) for _ in range(3)]
        await finish(made_of(*parts))
        return parts

    async def test_all_shards_share_a_target(self, parts: list[Away], tmp_path: Path) -> None:
        """One report of all; each ledger knows its own archives, and none takes the others' for foreign."""
        storage = made_of(*parts)
        originals = {saga_id: await record(storage, saga_id) for ids in IDS.values() for saga_id in ids}
        planned = await archive(storage, str(tmp_path), EVERYTHING, dry_run=True)
        assert (planned.sagas, planned.is_dry_run, files(tmp_path)) == (6, True, [])
        report = await archive(storage, str(tmp_path), EVERYTHING)
        assert (report.sagas, report.removed, len(report.archives), report.is_complete) == (6, 6, 3, True)
        for part in parts:
            assert len((await part.find_archives()).archives) == 1
            seen = await verify(str(tmp_path), part)
            assert (len(seen.archives), seen.problems, seen.strays) == (3, [], [])
        seen = await verify(str(tmp_path), storage)
        assert (len(seen.archives), seen.problems, seen.strays) == (3, [], [])
        for saga_id, original in originals.items():
            found = await find_archived(storage, saga_id)
            assert found is not None
            assert found.record == original

    async def test_an_archive_that_a_ledger_misses_is_found(self, parts: list[Away], tmp_path: Path) -> None:
        """Whichever shard's it is."""
        storage = made_of(*parts)
        await archive(storage, str(tmp_path), EVERYTHING)
        [row] = (await parts[2].find_archives()).archives
        lose(str(row.uri))
        [problem] = (await verify(str(tmp_path), storage)).problems
        assert str(row.id) in problem

    async def test_sagas_come_back_to_their_shards(self, parts: list[Away], tmp_path: Path) -> None:
        """One saga, the archive of one shard, a whole target; also into other shards than they came from."""
        storage = made_of(*parts)
        await archive(storage, str(tmp_path), EVERYTHING)
        assert (await restore(storage, IDS[2][0])).restored == 1
        [row] = (await parts[0].find_archives()).archives
        assert (await restore(storage, archive=str(row.uri))).restored == 2
        rest = await restore(storage, archive=str(tmp_path))
        assert (rest.restored, rest.same) == (3, 3)
        for shard, part in enumerate(parts):
            for saga_id in IDS[shard]:
                await part.get_saga(saga_id)
        others = made_of(*(MemorySagaStorage() for _ in range(2)))
        assert (await restore(others, archive=str(tmp_path))).restored == 6

    async def test_a_shard_that_is_down_leaves_the_others_done(self, parts: list[Away], tmp_path: Path) -> None:
        """What was done is in the error; once more, when it is back, does the rest."""
        parts[DOWN].is_away = True
        with pytest.raises(ShardsFailedError) as failed:
            await archive(made_of(*parts), str(tmp_path), EVERYTHING)
        assert list(failed.value.errors) == [DOWN]
        assert (failed.value.report.sagas, failed.value.report.is_complete) == (4, False)
        assert str(failed.value).startswith("shard 1: nothing was written (SQLSTATE 57P03): shard 1 can't be reached")
        [problem] = (await verify(str(tmp_path), made_of(*parts))).problems
        assert problem == "the ledger of shard 1 can't be read: shard 1 can't be reached: the server is down"
        parts[DOWN].is_away = False
        report = await archive(made_of(*parts), str(tmp_path), EVERYTHING)
        assert (report.sagas, report.is_complete) == (2, True)

        storage = made_of(*parts)
        assert await storage.reach() == {}
        parts[DOWN].is_away = True
        with pytest.raises(ShardsFailedError) as failed:
            await restore(storage, archive=str(tmp_path))
        assert (list(failed.value.errors), failed.value.report.restored) == ([DOWN], 4)
        parts[DOWN].is_away = False
        again = await restore(storage, archive=str(tmp_path))
        assert (again.restored, again.same) == (2, 4)

    @pytest.mark.parametrize("error", [SchemaError(None, "9"), UnknownOutcomeError(None)], ids=["no tables", "died"])
    async def test_sagas_come_back_to_the_others_whatever_fails(
        self, parts: list[Away], tmp_path: Path, error: SagaStoreError
    ) -> None:
        storage = made_of(*parts)
        await archive(storage, str(tmp_path), EVERYTHING)
        parts[DOWN].is_away, parts[DOWN].error = True, error
        with pytest.raises(ShardsFailedError) as failed:
            await restore(storage, archive=str(tmp_path))
        assert (failed.value.errors, failed.value.report.restored) == ({DOWN: error}, 4)
        with pytest.raises(ShardingError):
            await restore(made_of(*parts[::-1]), archive=str(tmp_path))

    async def test_a_shard_that_is_down_keeps_no_stubs_of_others(self, parts: list[Away], tmp_path: Path) -> None:
        """Those of the others are forgotten, and then it is said what is missing; the first one is no exception."""
        storage = made_of(*parts)
        await archive(storage, str(tmp_path), EVERYTHING)
        parts[0].is_away = True
        assert await storage.forget_stubs(older_than=timedelta(0), limit=1) == 1
        assert [part.stubs for part in parts] == [2, 1, 2]
        gone: list[int] = []

        async def forget() -> None:
            async for count in storage.forget_all_stubs(older_than=timedelta(0)):
                gone.append(count)  # noqa: PERF401 - it is to be kept if it ends by an error

        with pytest.raises(StorageUnavailableError, match="the server is down"):
            await forget()
        assert (sum(gone), [part.stubs for part in parts]) == (3, [2, 0, 0])
        with pytest.raises(StorageUnavailableError, match="the server is down"):
            await storage.forget_stubs(older_than=timedelta(0))
        parts[0].is_away = False
        assert await storage.forget_stubs(older_than=timedelta(0)) == 2

    async def test_a_shard_that_is_busy_leaves_the_others_done(self, parts: list[Away], tmp_path: Path) -> None:
        """Each has a turn of its own."""
        async with parts[0].archiving(by="another"):
            with pytest.raises(ShardsFailedError) as failed:
                await archive(made_of(*parts), str(tmp_path), EVERYTHING)
        assert isinstance(failed.value.errors[0], ArchiverBusyError)
        assert failed.value.report.sagas == 4

    async def test_what_fails_everywhere_is_told_once(self, parts: list[Away], tmp_path: Path) -> None:
        """As it would be of a storage without shards."""
        storage = made_of(*parts)
        with pytest.raises(TargetError, match="there is no such folder"):
            await archive(storage, str(tmp_path / "none"), EVERYTHING)
        with pytest.raises(InvalidSagaDataError, match=r"^max_sagas must be"):
            await archive(storage, str(tmp_path), EVERYTHING, max_sagas=0)
        for part in parts:
            part.is_away = True
        with pytest.raises(StorageUnavailableError, match="the server is down"):
            await archive(made_of(*parts), str(tmp_path), EVERYTHING)

    async def test_limits_are_of_each_shard(self, parts: list[Away], tmp_path: Path) -> None:
        """One that has more than that doesn't keep the others from their turns."""
        for saga_id in ids_of(0, 3, first=1000):
            await parts[0].save(Checkpoint(saga_id, name="order", context={}, status=SagaStatus.COMPLETED))
        report = await archive(made_of(*parts), str(tmp_path), EVERYTHING, max_sagas=2)
        assert (report.sagas, report.is_complete) == (6, False)

    async def test_time_is_shared_out(self, parts: list[Away]) -> None:
        """Each gets an equal share of what is left, so what one doesn't take is for those after it."""

        async def shown(_: object, seconds: float | None) -> float | None:
            return seconds

        shares, _ = await each_shard(made_of(*parts), shown, 9e6)
        assert shares == pytest.approx([3e6, 4.5e6, 9e6], rel=1e-4)
        parts[DOWN].is_away = True
        shares, failed = await each_shard(made_of(*parts), shown, 9e6)
        assert shares == pytest.approx([4.5e6, 9e6], rel=1e-4)
        assert list(failed) == [DOWN]
        assert (await each_shard(made_of(*parts), shown, None))[0] == [None, None]

    async def test_a_shard_that_comes_back_as_another_is_left_alone(self, parts: list[Away], tmp_path: Path) -> None:
        """Also if archiving the one before took so long that it wasn't there when its turn came, or met that itself."""
        storage = made_of(*parts)

        async def lose(shard: object, _: float | None) -> None:
            if shard is parts[0]:
                parts[DOWN].is_away = True
                with pytest.raises(StorageUnavailableError):
                    await storage.hold_saga(IDS[DOWN][0], by="ann", reason="told so")
                parts[DOWN].come_back_as(MemoryDatabase())
            elif shard is parts[2]:
                raise StorageUnavailableError("the server is down")
            else:
                raise AssertionError

        _, failed = await each_shard(storage, lose, None)
        assert [type(error) for error in failed.values()] == [ShardingError, StorageUnavailableError]
        parts[2].come_back_as(MemoryDatabase())
        with pytest.raises(ShardingError, match="storage 2 records nothing"):
            await storage.get_saga(IDS[2][0])
        with pytest.raises(ShardingError, match="storage 1 records nothing"):
            await archive(storage, str(tmp_path), EVERYTHING)

    async def test_what_else_there_is_names_the_remedy(self, parts: list[Away]) -> None:
        """A ledger is a shard's own."""
        with pytest.raises(InvalidSagaDataError, match=r"archive\(\) and verify\(\) .* each of its `shards`"):
            await made_of(*parts).find_archives()

    async def test_other_shards_than_they_were_are_refused(self, parts: list[Away], tmp_path: Path) -> None:
        """Before anything is let go."""
        with pytest.raises(Exception, match="nothing was read or written"):
            await archive(made_of(*parts[:2]), str(tmp_path), EVERYTHING)
        assert files(tmp_path) == []


@pytest.fixture
def command(shards: Shards, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a verb on three shards, each with two sagas that may go."""
    monkeypatch.setenv("DATABASE_URL", shards.database.url())
    shards.do(finish)

    def run(*line: str) -> tuple[int, str, str]:
        code = main(list(line))
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        return code, printed.out, printed.err

    return run


class TestCommand:
    def test_a_round(self, command: Command, shards: Shards, tmp_path: Path) -> None:
        """Archived with one shard down, completed by a second run, listed, verified, shown, restored and forgotten."""
        target = tmp_path / "archives"
        target.mkdir()
        line = ("archive", "--to", str(target), *EACH)
        down = shards.without(DOWN)
        code, out, err = command(*line, *down)
        assert code == Exit.FAILED
        assert out.count("2 sagas with 0 entries") == 2
        assert "saga-store: can't connect to sagas at 127.0.0.1:1 as me" in err
        assert err.splitlines()[-1] == (
            "saga-store: 2 of 3 shards done; shard 1: failed; run it again when that is mended"
        )
        again = facts(command, *line, *ALL)
        assert [one["sagas"] for one in again["shards"]] == [0, 2, 0]

        listed = facts(command, "archives", *ALL)
        assert [len(one["archives"]) for one in listed["shards"]] == [1, 1, 1]
        assert command("archives", *ALL, "--after", "x")[0] == Exit.USAGE
        assert facts(command, "verify", str(target), *ALL)["problems"] == []
        code, out, _ = command("verify", str(target), *down)
        assert code == Exit.FAILED
        assert "3 archives are what was written" in out
        assert "not compared: the ledger of shard 1 can't be read: shard 1 can't be reached" in out

        assert facts(command, "archived", str(IDS[0][0]), *down)["saga"]["id"] == str(IDS[0][0])
        assert command("archived", str(IDS[DOWN][0]), *down)[0] == Exit.FAILED
        assert facts(command, "restore", str(IDS[2][0]), *down)["restored"] == 1
        code, out, err = command("restore", "--archive", str(target), "--keep-for", "0", *down)
        assert (code, out) == (Exit.FAILED, "restored 3 sagas; 1 were there already, the same\n")
        assert "the sagas of shard 1 aren't back: run it again when that is mended" in err
        back = facts(command, "restore", "--archive", str(target), "--keep-for", "0", *ALL)
        assert (back["restored"], back["same"], back["missing"]) == (2, 4, [])

        command(*line, *ALL)
        gone = facts(command, "forget", "--older-than", "0", *down, code=Exit.FAILED)
        # One is held, for it was restored.
        assert [one.get("forgotten") for one in gone["shards"]] == [2, None, 1]
        assert [one["forgotten"] for one in facts(command, "forget", "--older-than", "0", *ALL)["shards"]] == [0, 2, 0]

    def test_stats_are_each_shards(self, command: Command, shards: Shards) -> None:
        code, out, err = command("stats", *shards.without(DOWN))
        assert code == Exit.FAILED
        assert [line for line in out.splitlines() if line.startswith("shard")] == [
            "shard 0, schema saga_00:",
            "shard 2, schema saga_02:",
        ]
        assert "2 of 3 shards done; shard 1: failed" in err
        told = facts(command, "stats", *EACH, *ALL)["shards"]
        assert all(one["retention_lag"] > 0 for one in told)

    def test_what_is_wrong_everywhere_is_said_once(self, command: Command, tmp_path: Path) -> None:
        """Wrong usage isn't tried on each shard; other shards than there are aren't begun."""
        code, _, err = command("archive", "--to", str(tmp_path), *ALL)
        assert (code, err.count("--completed, --failed or --name must say")) == (Exit.USAGE, 1)
        assert "0 of 3 shards done; shard 0: wrong usage; not begun: 2 of 3" in err
        for verb in (("archive", "--to", str(tmp_path)), ("purge", "--without-archive", "--yes")):
            code, out, err = command(*verb, *EACH, "--shards", "2")
            assert (code, out) == (Exit.FAILED, "")
            assert "missing is shard 2" in err
        assert list(tmp_path.iterdir()) == []

    def test_another_archiver_has_the_turn_of_one(self, command: Command, shards: Shards, tmp_path: Path) -> None:
        """That one is told as locked; the others are done."""

        async def while_busy(storage: ShardedSagaStorage) -> tuple[int, str, str]:
            async with storage.shards[DOWN].archiving(by="another"):
                return await asyncio.to_thread(command, "archive", "--to", str(tmp_path), *EACH, *ALL)

        code, out, err = shards.do(while_busy)
        assert (code, out.count("2 removed;")) == (Exit.LOCKED, 2)
        assert "another archiver is at work" in err

    def test_purging_asks_once(self, command: Command, shards: Shards) -> None:
        """For all shards, and says how many sagas they have together."""
        line = ("purge", "--without-archive", *EACH, *ALL)
        assert command(*line)[0] == Exit.USAGE
        with Terminal.running(*line, columns=100, DATABASE_URL=shards.database.url()) as terminal:
            terminal.wait_for("write yes to do it")
            terminal.type("yes\n")
            assert terminal.end() == Exit.DONE
        assert terminal.text.count("write yes") == 1
        assert "6 sagas would be removed" in terminal.text
        assert terminal.text.count("removed 2 sagas, archived nowhere") == 3

    def test_what_was_never_sharded_is_restored_to_shards(
        self, command: Command, shards: Shards, database: Database, tmp_path: Path
    ) -> None:
        """What was archived from a database without shards goes to those where it belongs."""

        async def make() -> list[UUID]:
            engine = create_async_engine(database.url("psycopg"), poolclass=NullPool)
            found = await make_finished(SqlAlchemySagaStorage(engine), 6)
            await engine.dispose()
            return found

        ids = asyncio.run(make())
        line = ("archive", "--to", str(tmp_path), *EACH, "--failed", "0", "--url", database.url())
        assert facts(command, *line)["sagas"] == 6
        assert facts(command, "restore", "--archive", str(tmp_path), *ALL)["restored"] == 6

        async def look(storage: ShardedSagaStorage) -> None:
            for saga_id in ids:
                assert (await storage.get_saga(saga_id)).name == "order"

        shards.do(look)
