"""What a storage made of shards does beyond the contract: who is refused as a shard, and what goes on without one."""
# ruff: noqa: SLF001 - shards are taken away from inside

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from saga_store import (
    InvalidSagaDataError,
    MemoryDatabase,
    MemorySagaStorage,
    MemorySession,
    SagaExecution,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    SagaStoreError,
    SchemaError,
    ShardingError,
    StorageUnavailableError,
    UnknownOutcomeError,
    schema,
)
from saga_store.inspection import SagaQuery
from saga_store.retention_model import Restored
from saga_store.retention_storage import Hold
from saga_store.shard_records import ShardRecord, ShardState, shard_index
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from saga_store.write import Claim, Outcome, Write
from tests.databases import Database, Databases
from tests.retention.world import record

PAGE = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
NOW = timedelta(0)
PATIENCE_SECONDS = 10
SINCE = datetime(2000, 1, 1, tzinfo=UTC)


def twins(*databases: MemoryDatabase) -> ShardedSagaStorage:
    return ShardedSagaStorage([MemorySagaStorage(database) for database in databases])


class Flaky(MemorySagaStorage):
    """A shard that can be taken away."""

    is_down = False
    error: SagaStoreError = StorageUnavailableError("the server is down", "57P03")
    hangs = False
    claims_hang = False
    dies_before_recording = False
    dies_after_recording = False
    asked = 0

    def _look(self) -> None:
        self.asked += 1
        if self.is_down:
            raise self.error

    def come_back_as(self, database: MemoryDatabase) -> None:
        self._bind, self.is_down = database, False

    async def _apply(self, write: Write) -> Outcome:
        # A storage may return what is in the way, and may raise it.
        return self.error if self.is_down else await super()._apply(write)

    async def _claim(self, claim: Claim) -> list[SagaExecution]:
        if self.claims_hang:
            await asyncio.Event().wait()
        self._look()
        return await super()._claim(claim)

    async def _fetch_shard_state(self) -> ShardState:
        if self.hangs:
            await asyncio.Event().wait()
        self._look()
        return await super()._fetch_shard_state()

    async def _hold(self, hold: Hold) -> None:
        self._look()
        await super()._hold(hold)

    async def _restore(self, *given: Any) -> list[Restored]:  # noqa: ANN401 - as in the interface
        self._look()
        return await super()._restore(*given)

    async def _record_shard(self, record: ShardRecord) -> None:
        self.is_down = self.dies_before_recording
        self._look()
        await super()._record_shard(record)
        self.is_down = self.dies_after_recording
        self._look()

    def _view(self) -> MemorySession:
        self._look()
        return super()._view()


def ids_of(storage: ShardedSagaStorage, shard: int, count: int) -> list[UUID]:
    ids = (UUID(int=number) for number in itertools.count(1))
    return list(itertools.islice((saga_id for saga_id in ids if storage.shard_of(saga_id) == shard), count))


async def fill(storage: ShardedSagaStorage, count: int = 3, name: str = "order") -> list[list[UUID]]:
    """Create so many sagas in each shard, and return their ids."""
    ids = [ids_of(storage, shard, count) for shard in range(len(storage.shards))]
    for saga_id in itertools.chain.from_iterable(ids):
        await storage.create_saga(saga_id, name, {})
    return ids


class TestRouting:
    def test_the_test_vectors_of_the_page(self) -> None:
        """What other languages are told is what is done here."""
        rows = re.findall(r"^\| `([0-9a-f-]{36})` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
        assert len(rows) == 6
        for saga_id, crc, *shards in rows:
            assert shard_index(UUID(saga_id), 2**32) == int(crc)
            assert [shard_index(UUID(saga_id), count) for count in (2, 3, 4, 32)] == [int(shard) for shard in shards]

    def test_postgresql_computes_the_same(self, admin: psycopg.Connection) -> None:
        """By what the page says, where PostgreSQL has a crc32."""
        [query] = re.findall(r"`(mod\(crc32\(uuid_send\(id\)\), shards\))`", PAGE)
        ids = [uuid4() for _ in range(50)]
        if admin.info.server_version >= 180000:
            asked = f"SELECT {query} FROM unnest(%s::uuid[]) AS id, (SELECT 7 AS shards)"  # noqa: S608 - of the page
            rows = admin.execute(asked.encode(), [ids])
            assert [shard for (shard,) in rows] == [shard_index(saga_id, 7) for saga_id in ids]

    @pytest.mark.parametrize("count", [2, 3, 7, 16, 32])
    def test_ids_of_all_kinds_are_spread_evenly(self, count: int) -> None:
        """Random ones, numbers, and such as begin by a time."""
        kinds = {
            "random": [uuid4() for _ in range(200 * count)],
            "numbers": [UUID(int=number) for number in range(200 * count)],
            "times": [UUID(int=(0x018F4E2A7C1B + number << 80) | 7 << 76 | 1 << 63) for number in range(200 * count)],
            "high": [UUID(int=number << 100) for number in range(200 * count)],
        }
        for kind, ids in kinds.items():
            found = [0] * count
            for saga_id in ids:
                found[shard_index(saga_id, count)] += 1
            assert 120 <= min(found) <= max(found) <= 280, (kind, found)

    async def test_a_saga_is_in_its_shard_and_nowhere_else(self) -> None:
        databases = [MemoryDatabase() for _ in range(3)]
        storage = twins(*databases)
        ids = await fill(storage)
        for shard, database in enumerate(databases):
            assert database.count_rows() == (3, 0)
            for saga_id in ids[shard]:
                await MemorySagaStorage(database).get_saga(saga_id)

    @pytest.mark.parametrize("wrong", [[], [1], "ab", 7, [None], [MemorySagaStorage()] * 1001])
    def test_what_can_be_no_list_of_shards_is_refused(self, wrong: Any) -> None:  # noqa: ANN401 - whatever it is
        with pytest.raises(InvalidSagaDataError, match=r"^storages "):
            ShardedSagaStorage(wrong)

    def test_a_storage_that_joins_a_transaction_is_no_shard(self) -> None:
        with pytest.raises(InvalidSagaDataError, match="number 1 joins a transaction"):
            ShardedSagaStorage([MemorySagaStorage(), MemorySagaStorage(MemorySession(MemoryDatabase()))])

    def test_what_is_no_id_has_no_shard(self) -> None:
        with pytest.raises(InvalidSagaDataError, match="saga_id"):
            twins(MemoryDatabase()).shard_of("1")  # type: ignore[arg-type] # on purpose


# How the list that is given differs from the shards 0, 1 and 2; X is of others, E an empty database.
WRONG = {
    "012 in another order": ("102", "storage 0 is shard 1 of 3: the list is in another order"),
    "one missing at the end": ("01", "missing is shard 2; give all 3"),
    "one missing at the beginning": ("12", "missing is shard 0; give all 3"),
    "one twice": ("0112", "storages 1 and 2 are the same database and schema"),
    "one twice in the place of another": ("011", "storages 1 and 2 are the same database and schema"),
    "one more": ("012E", "the number of shards was chosen once"),
    "one of others": ("01X", r"storage 2 is shard 2 of 3 of other shards \(cluster"),
    "an empty one in the place of one": ("01E", "storage 2 records nothing.*an empty database in the place of one"),
    "an empty one in the place of the first": ("E12", "storage 0 records nothing.*an empty database"),
    "one with sagas of its own": ("0S2", "storage 1 records nothing.*with sagas of its own"),
}


class Places:
    """Databases that stand in a list by a letter each: shards 0 to 2, X, which is shard 2 of others, E and S."""

    def __init__(self, storages: dict[str, SagaStorage]) -> None:
        self._storages = storages

    def __call__(self, letters: str) -> ShardedSagaStorage:
        return ShardedSagaStorage([self._storages[letter] for letter in letters])

    async def prepare(self) -> None:
        await fill(self("012"), 1)
        await fill(self("YZX"), 1)
        await self._storages["S"].create_saga(uuid4(), "order", {})


LETTERS = "012XYZES"


class TestIdentity:
    @pytest.fixture(params=["memory", "asyncpg", "psycopg"])
    async def places(
        self, request: pytest.FixtureRequest, databases: Databases, template: Database
    ) -> AsyncIterator[Places]:
        """On PostgreSQL: schemas of one database, for `X`, `Y` and `Z` of another one."""
        if request.param == "memory":
            places = Places({letter: MemorySagaStorage(MemoryDatabase()) for letter in LETTERS})
            await places.prepare()
            yield places
            return
        async with AsyncExitStack() as stack:
            storages: dict[str, SagaStorage] = {}
            for letter in LETTERS:
                database = stack.enter_context(databases.clone(template))
                engine = create_async_engine(database.url(request.param))
                stack.push_async_callback(engine.dispose)
                storages[letter] = SqlAlchemySagaStorage(engine)
            places = Places(storages)
            await places.prepare()
            yield places

    async def test_shards_that_are_not_what_they_were_are_refused(self, places: Places) -> None:
        """Each kind with a message of its own, whatever is called, again and again; and nothing is written."""
        before = await places("012").count_sagas()
        for kind, (letters, message) in WRONG.items():
            storage = places(letters)
            saga_id = uuid4()
            calls: list[Coroutine[Any, Any, object]] = [
                storage.create_saga(saga_id, "order", {}),
                storage.find_sagas(),
                storage.claim_sagas(owner="a", lease=NOW, limit=1, stale_after=NOW),
                storage.get_saga(saga_id),
            ]
            for call in calls:
                with pytest.raises(ShardingError, match=message) as refused:
                    await call
                assert "\n" not in str(refused.value), kind
        again = places("012")
        assert await again.count_sagas() == before == 3
        assert await again.claim_sagas(owner="a", lease=NOW, limit=1, stale_after=timedelta(hours=1)) == []

    async def test_sagas_that_were_never_sharded_are_not_lost(self, places: Places) -> None:
        """Where most of them would be looked for elsewhere, shards don't begin."""
        with pytest.raises(ShardingError, match="storage 0 has sagas, and was never a shard"):
            await places("SE").find_sagas()

    async def test_the_same_list_is_accepted_for_ever(self, places: Places) -> None:
        assert await places("012").count_sagas() == 3


class TestRecording:
    async def test_many_processes_at_once_record_one_cluster(self, databases: Databases, template: Database) -> None:
        """They begin at the same time, on new databases."""
        async with AsyncExitStack() as stack:
            urls = [stack.enter_context(databases.clone(template)).url("asyncpg") for _ in range(3)]
            storages = []
            for _ in range(4):
                engines = [create_async_engine(url) for url in urls]
                for engine in engines:
                    stack.push_async_callback(engine.dispose)
                storages.append(ShardedSagaStorage([SqlAlchemySagaStorage(engine) for engine in engines]))
            await asyncio.gather(
                *(storage.create_saga(uuid4(), "order", {}) for storage in storages for _ in range(20))
            )
            assert await storages[0].count_sagas() == 80

    async def test_a_recording_that_was_cut_short_is_completed(self) -> None:
        """As long as no shard has a saga there is nothing to lose."""
        databases = [MemoryDatabase() for _ in range(3)]
        await fill(twins(*databases), 0)
        await twins(*databases).find_sagas()
        databases[2]._shard_records.clear()  # as if its database had not been reached
        await fill(twins(*databases), 1)
        assert await twins(*databases).count_sagas() == 3

    async def test_it_waits_for_all_shards(self) -> None:
        """As long as one can't be reached that nobody has recorded, nothing is."""
        flaky = Flaky()
        flaky.is_down = True
        database = MemoryDatabase()
        storage = ShardedSagaStorage([MemorySagaStorage(database), flaky])
        with pytest.raises(StorageUnavailableError, match="shard 1 can't be reached, and what the shards are hasn't"):
            await storage.create_saga(ids_of(storage, 0, 1)[0], "order", {})
        flaky.is_down = False
        # Nothing was: what is recorded now isn't what that one would have.
        await fill(ShardedSagaStorage([flaky, MemorySagaStorage(database)]))

    @pytest.mark.parametrize("when", ["dies_before_recording", "dies_after_recording"])
    @pytest.mark.parametrize("dying", range(3))
    async def test_a_shard_that_dies_while_they_are_recorded_keeps_sagas_out(self, dying: int, when: str) -> None:
        """As long as it is away nobody can tell whether all are recorded; when it is back, they get recorded."""
        shards = [Flaky() for _ in range(3)]
        first = ShardedSagaStorage(shards)
        setattr(shards[dying], when, True)
        with pytest.raises(StorageUnavailableError, match="the server is down"):
            await first.find_sagas()
        for storage in (first, ShardedSagaStorage(shards)):
            for shard in range(3):
                with pytest.raises(StorageUnavailableError, match=f"^nothing was written: shard {dying} can't be"):
                    await storage.create_saga(ids_of(storage, shard, 1)[0], "order", {})
        setattr(shards[dying], when, False)
        shards[dying].is_down = False
        await fill(first, 1)
        assert await ShardedSagaStorage(shards).count_sagas() == await first.count_sagas() == 3

    async def test_shards_without_sagas_wait_for_each_other(self) -> None:
        """Even if they are recorded: that is told apart by those only that can't be asked."""
        shards = [Flaky() for _ in range(3)]
        await ShardedSagaStorage(shards).find_sagas()
        shards[1].is_down = True
        storage = ShardedSagaStorage(shards)
        with pytest.raises(StorageUnavailableError, match="shard 1 can't be reached, and what the shards are hasn't"):
            await storage.find_sagas()
        shards[1].is_down = False
        await fill(storage, 1)

    async def test_who_looks_while_another_process_records_is_not_told_wrong(self) -> None:
        """What it has seen of one shard is of before, and what it sees of the next has a saga already."""
        databases = [MemoryDatabase() for _ in range(2)]
        other = twins(*databases)

        have_begun = asyncio.Event()

        class Early(MemorySagaStorage):
            async def _fetch_shard_state(self) -> ShardState:
                state = await super()._fetch_shard_state()
                if not have_begun.is_set():
                    await fill(other, 1)
                    have_begun.set()
                return state

        class Late(MemorySagaStorage):
            async def _fetch_shard_state(self) -> ShardState:
                await have_begun.wait()
                return await super()._fetch_shard_state()

        storage = ShardedSagaStorage([Early(databases[0]), Late(databases[1])])
        assert await storage.count_sagas() == 2


class TestLooking:
    """A storage for views (``records=False``), which leaves new shards as they are."""

    @staticmethod
    def looking(*shards: MemorySagaStorage) -> ShardedSagaStorage:
        return ShardedSagaStorage(shards, records=False)

    async def test_new_shards_are_looked_at_and_not_recorded(self) -> None:
        """Also while one is down; whoever writes first decides how many they are, and the view goes on."""
        shards = [Flaky(MemoryDatabase()) for _ in range(3)]
        view = self.looking(*shards)
        shards[2].is_down = True
        assert (await view.find_sagas()).missing == (2,)
        assert list(view.unreachable) == [2]
        shards[2].is_down = False
        assert await self.looking(*shards[:2]).count_sagas() == 0
        await fill(ShardedSagaStorage(shards), 1)
        assert len((await view.find_sagas()).sagas) == 3
        assert view.unreachable == {}
        shards[2].is_down = True
        assert (await view.find_sagas()).missing == (2,)
        shards[2].is_down = False
        assert await view.reach() == {}

    async def test_what_never_was_a_shard_is_refused(self) -> None:
        """And so are other shards than they were."""
        databases = [MemoryDatabase() for _ in range(3)]
        await MemorySagaStorage(databases[1]).create_saga(uuid4(), "order", {})
        with pytest.raises(ShardingError, match="storage 1 has sagas, and was never a shard"):
            await self.looking(*map(MemorySagaStorage, databases)).find_sagas()
        databases = [MemoryDatabase() for _ in range(3)]
        await fill(twins(*databases), 1)
        with pytest.raises(ShardingError, match="another order"):
            await self.looking(*map(MemorySagaStorage, reversed(databases))).reach()

    async def test_half_recorded_shards_are_looked_at(self) -> None:
        """One that comes back new, as it always was, isn't in the place of another."""
        shards = [Flaky() for _ in range(2)]
        shards[1].dies_before_recording = True
        with pytest.raises(StorageUnavailableError):
            await ShardedSagaStorage(shards).find_sagas()
        view = self.looking(*shards)
        assert (await view.find_sagas()).missing == (1,)
        shards[1].is_down = shards[1].dies_before_recording = False
        assert (await view.find_sagas()).missing == ()
        await fill(ShardedSagaStorage(shards), 1)
        assert await view.count_sagas() == 2

    async def test_a_whole_id_asks_its_own_shard(self) -> None:
        """It is found, or the shard's error is raised, whatever the others do; first digits ask all."""
        shards = [Flaky(MemoryDatabase()) for _ in range(3)]
        storage = ShardedSagaStorage(shards)
        ids = await fill(storage, 1)
        shards[1].is_down = True
        [here], [there] = ids[0], ids[1]
        page = await storage.find_sagas(SagaQuery(id_prefix=str(here)))
        assert ([saga.id for saga in page.sagas], page.missing) == ([here], ())
        with pytest.raises(StorageUnavailableError):
            await storage.find_sagas(SagaQuery(id_prefix=there.hex))
        page = await storage.find_sagas(SagaQuery(id_prefix=there.hex[:8]))
        assert page.missing == (1,)


class TestOutage:
    """One of three shards is down."""

    @pytest.fixture
    def shards(self) -> list[Flaky]:
        return [Flaky() for _ in range(3)]

    @pytest.fixture
    def storage(self, shards: list[Flaky]) -> ShardedSagaStorage:
        return ShardedSagaStorage(shards)

    async def test_its_sagas_fail_and_others_dont(self, storage: ShardedSagaStorage, shards: list[Flaky]) -> None:
        ids = await fill(storage)
        shards[1].is_down = True
        for saga_id in ids[1]:
            with pytest.raises(StorageUnavailableError):
                await storage.update_context(saga_id, {"n": 1})
            with pytest.raises(StorageUnavailableError):
                await storage.get_saga(saga_id)
        for saga_id in ids[0] + ids[2]:
            await storage.update_context(saga_id, {"n": 1})
        shards[1].is_down = False
        for saga_id in ids[1]:
            assert (await storage.get_saga(saga_id)).context == {}

    async def test_one_that_is_down_at_first_is_missed(self, shards: list[Flaky]) -> None:
        """What the others are is known, so they are used."""
        await fill(ShardedSagaStorage(shards))
        shards[1].is_down = True
        storage = ShardedSagaStorage(shards)
        assert (await storage.find_sagas()).missing == (1,)
        await storage.update_context(ids_of(storage, 0, 1)[0], {})
        with pytest.raises(StorageUnavailableError, match="shard 1 can't be reached: the server is down"):
            await storage.get_saga(ids_of(storage, 1, 1)[0])
        shards[1].is_down = False
        assert (await storage.find_sagas()).missing == ()

    async def test_lists_and_figures_say_what_is_missing(
        self, storage: ShardedSagaStorage, shards: list[Flaky], caplog: pytest.LogCaptureFixture
    ) -> None:
        ids = await fill(storage)
        shards[1].is_down = True
        for _ in range(2):
            page = await storage.find_sagas()
            assert {saga.id for saga in page.sagas} == {*ids[0], *ids[2]}
            assert page.missing == (1,)
            count = await storage.count_sagas(SagaQuery(statuses=[SagaStatus.PENDING]))
            assert (count, count.missing, count.is_partial) == (6, (1,), True)
            figures = await storage.get_figures()
            assert (sum(figures.unfinished.values()), figures.missing) == (6, (1,))
            assert (await storage.find_interventions(since=SINCE)).missing == (1,)
            assert all(group.is_partial for group in await storage.group_sagas())
            assert len(await storage.find_stale_sagas(stale_after=NOW)) == 6
            assert await storage.find_exhausted_sagas() == []
        lines = {record.getMessage() for record in caplog.records}
        assert {line.partition(":")[0] for line in lines} == {
            "sagas of shard 1 were in no group",
            "sagas of shard 1 were not listed as stale",
            "sagas of shard 1 were not listed as exhausted",
        }

    async def test_claims_go_on(
        self, storage: ShardedSagaStorage, shards: list[Flaky], caplog: pytest.LogCaptureFixture
    ) -> None:
        """They keep what they got, and a WARNING says what is missing."""
        ids = await fill(storage)
        shards[1].is_down = True
        claimed = await storage.claim_sagas(owner="a", lease=timedelta(hours=1), limit=10, stale_after=NOW)
        assert {saga.id for saga in claimed} == {*ids[0], *ids[2]}
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith("sagas of shard 1 were not claimed: nothing was written (SQLSTATE 57P03)")
        assert await storage.claim_sagas(owner="a", lease=NOW, limit=10, stale_after=NOW) == []
        shards[1].is_down = False
        claimed = await storage.claim_sagas(owner="a", lease=NOW, limit=10, stale_after=NOW)
        assert {saga.id for saga in claimed} == set(ids[1])

    async def test_nobody_waits_again_for_one_that_does_not_answer(
        self, storage: ShardedSagaStorage, shards: list[Flaky]
    ) -> None:
        """One look at it has half a second, and those who come later don't wait for the same look."""
        ids = await fill(storage)
        shards[1].is_down = True
        assert (await storage.find_sagas()).missing == (1,)
        shards[1].hangs = True
        async with asyncio.timeout(PATIENCE_SECONDS):
            for _ in range(100):
                assert (await storage.find_sagas()).missing == (1,)
                await storage.claim_sagas(owner="a", lease=NOW, limit=1, stale_after=NOW)
            await storage.update_context(ids[0][0], {})

    async def test_without_any_shard_all_raises(self, storage: ShardedSagaStorage, shards: list[Flaky]) -> None:
        await fill(storage)
        for shard in shards:
            shard.is_down = True
        for _ in range(2):
            for call in (
                storage.find_sagas(),
                storage.get_figures(),
                storage.find_interventions(since=SINCE),
                storage.claim_sagas(owner="a", lease=NOW, limit=1, stale_after=NOW),
            ):
                with pytest.raises(StorageUnavailableError):
                    await call

    async def test_one_that_comes_back_as_another_is_refused(
        self, storage: ShardedSagaStorage, shards: list[Flaky]
    ) -> None:
        """An empty database in its place would lose its sagas without a word."""
        ids = await fill(storage)
        shards[1].is_down = True
        assert (await storage.find_sagas()).missing == (1,)
        shards[1].come_back_as(MemoryDatabase())
        for _ in range(2):
            with pytest.raises(ShardingError, match="storage 1 records nothing"):
                await storage.get_saga(ids[1][0])
            with pytest.raises(ShardingError, match="storage 1 records nothing"):
                await storage.find_sagas()

    @pytest.mark.parametrize(
        "error",
        [
            StorageUnavailableError("connection refused"),
            StorageUnavailableError("the server is down", "57P03"),
            StorageUnavailableError("the server is a standby", "25006"),
            UnknownOutcomeError(None),
            SchemaError(None, "9"),
        ],
        ids=["refused", "down", "standby", "died", "no tables"],
    )
    @pytest.mark.parametrize("call", ["write", "read", "whole id", "hold", "stub", "restore", "claim"])
    async def test_whoever_meets_the_outage_has_it_looked_at_again(
        self, storage: ShardedSagaStorage, shards: list[Flaky], call: str, error: SagaStoreError
    ) -> None:
        """Also if only calls for one saga do; nothing is written to the database that is there now."""
        ids = await fill(storage)
        saga_id = ids[1][0]
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "write": lambda: storage.update_context(saga_id, {"n": 1}),
            "read": lambda: storage.get_saga(saga_id),
            "whole id": lambda: storage.find_sagas(SagaQuery(id_prefix=saga_id.hex)),
            "hold": lambda: storage.hold_saga(saga_id, by="ann", reason="told so"),
            "stub": lambda: storage.find_stub(saga_id),
            "claim": lambda: storage.claim_sagas(owner="a", lease=timedelta(hours=1), limit=9, stale_after=NOW),
            "restore": lambda: storage.restore_saga(kept),
        }
        await storage.update_status(saga_id, SagaStatus.COMPLETED)
        kept = await record(storage, saga_id)
        shards[1].is_down, shards[1].error = True, error
        if call == "claim":
            assert len(await calls[call]()) == 6
        else:
            with pytest.raises(type(error)):
                await calls[call]()
        new = MemoryDatabase()
        shards[1].come_back_as(new)
        with pytest.raises(ShardingError, match="storage 1 records nothing"):
            await storage.create_saga(ids_of(storage, 1, 4)[3], "order", {})
        assert (new.count_rows(), new._shard_records) == ((0, 0), [])
        for saga_id in ids[0] + ids[2]:
            await storage.update_context(saga_id, {"n": 1})

    async def test_an_outage_in_the_middle_of_a_look_is_not_overlooked(
        self, storage: ShardedSagaStorage, shards: list[Flaky]
    ) -> None:
        """What the look saw may be what was there before; a call that was under way tells that it is gone."""
        ids = await fill(storage)
        begun, goes_on = asyncio.Event(), asyncio.Event()
        look, write = shards[1]._fetch_shard_state, shards[1]._apply

        async def late_look() -> ShardState:
            state = await look()
            shards[1]._fetch_shard_state = look  # type: ignore[method-assign] # once
            begun.set()
            await goes_on.wait()
            return state

        async def late_write(_: Write) -> Outcome:
            await begun.wait()
            return UnknownOutcomeError(None)

        shards[1]._apply = late_write  # type: ignore[method-assign, assignment] # the server is gone
        async with asyncio.timeout(PATIENCE_SECONDS):
            under_way = asyncio.create_task(storage.update_context(ids[1][0], {"n": 1}))
            await asyncio.sleep(0)
            shards[1]._apply = write  # type: ignore[method-assign] # as it was
            shards[1].is_down = True
            assert (await storage.find_sagas()).missing == (1,)
            shards[1].is_down = False
            shards[1]._fetch_shard_state = late_look  # type: ignore[method-assign] # see above
            reading = asyncio.create_task(storage.get_saga(ids[1][1]))
            with pytest.raises(UnknownOutcomeError):
                await under_way
            shards[1].come_back_as(MemoryDatabase())
            goes_on.set()
            with pytest.raises(ShardingError, match="storage 1 records nothing"):
                await reading

    @pytest.mark.parametrize("count", [1, 3])
    async def test_when_all_come_back_as_others_they_are_refused(self, count: int) -> None:
        """New databases aren't recorded in the place of those that there were."""
        shards = [Flaky() for _ in range(count)]
        storage = ShardedSagaStorage(shards)
        ids = await fill(storage, 1)
        for shard in shards:
            shard.is_down = True
        with pytest.raises(StorageUnavailableError):
            await storage.find_sagas()
        new = [MemoryDatabase() for _ in range(count)]
        for shard, database in zip(shards, new, strict=True):
            shard.come_back_as(database)
        for _ in range(2):
            with pytest.raises(ShardingError, match="storage 0 "):
                await storage.get_saga(ids[0][0])
            with pytest.raises(ShardingError, match="storage 0 "):
                await storage.find_sagas()
        assert [database._shard_records for database in new] == [[]] * count
        await twins(*new).find_sagas()
        with pytest.raises(ShardingError, match="storage 0 "):
            await storage.find_sagas()

    async def test_an_answer_is_no_outage(self, storage: ShardedSagaStorage, shards: list[Flaky]) -> None:
        """A statement that was canceled has a list go on without the shard, and nothing else is different."""
        ids = await fill(storage)
        shards[1].is_down, shards[1].error = True, StorageUnavailableError("canceling statement", "57014")
        assert (await storage.find_sagas()).missing == (1,)
        assert str(storage.unreachable[1]).endswith("shard 1 can't be reached: canceling statement")
        with pytest.raises(StorageUnavailableError, match="canceling statement"):
            await storage.get_saga(ids[1][0])
        shards[1].is_down, shards[1].hangs = False, True
        async with asyncio.timeout(PATIENCE_SECONDS):
            await storage.update_context(ids[1][0], {"n": 1})
            assert (await storage.find_sagas()).missing == ()
        assert storage.unreachable == {}

    async def test_one_that_is_back_does_not_wait_for_another(
        self, storage: ShardedSagaStorage, shards: list[Flaky]
    ) -> None:
        """Each is looked at by itself, by those who need it."""
        ids = await fill(storage)
        shards[1].is_down = shards[2].is_down = True
        assert (await storage.find_sagas()).missing == (1, 2)
        shards[1].is_down, shards[2].hangs = False, True
        async with asyncio.timeout(PATIENCE_SECONDS):
            await storage.update_context(ids[1][0], {"n": 1})
            assert (await storage.find_sagas()).missing == (2,)
            shards[1].is_down = True
            with pytest.raises(StorageUnavailableError):
                await storage.get_saga(ids[1][0])
            shards[1].is_down = False
            await storage.update_context(ids[1][0], {"n": 2})
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await storage.get_saga(ids[2][0])

    async def test_one_without_tables_is_missed_and_its_sagas_raise(
        self, storage: ShardedSagaStorage, shards: list[Flaky]
    ) -> None:
        """Its server is back, and what it is restored from hasn't got to them yet."""
        ids = await fill(storage)
        shards[1].is_down = True
        shards[1].error = SchemaError(None, "9", schema="saga_01")
        for _ in range(2):
            page = await storage.find_sagas()
            assert ({saga.id for saga in page.sagas}, page.missing) == ({*ids[0], *ids[2]}, (1,))
            assert "shard 1 can't be used: the saga tables in schema 'saga_01' are missing" in str(
                storage.unreachable[1]
            )
            assert (await storage.get_figures()).missing == (1,)
            await storage.update_context(ids[0][0], {"n": 1})
            with pytest.raises(SchemaError, match="--schema saga_01"):
                await storage.get_saga(ids[1][0])
        assert len(await storage.claim_sagas(owner="a", lease=timedelta(hours=1), limit=9, stale_after=NOW)) == 6
        shards[1].is_down = False
        assert (await storage.find_sagas()).missing == ()
        shards[1].is_down = True
        with pytest.raises(SchemaError):
            await ShardedSagaStorage(shards).find_sagas()

    @pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
    async def test_a_name_that_leads_to_another_database_after_an_outage(
        self, databases: Databases, template: Database, driver: str
    ) -> None:
        """Met by a write alone, which the storage sends again and in a crowd."""
        async with AsyncExitStack() as stack:
            first, second, new = [stack.enter_context(databases.clone(template)) for _ in range(3)]
            leads_to: Database | None = second

            engines = [create_async_engine(database.url(driver)) for database in (first, second)]
            for engine in engines:
                stack.push_async_callback(engine.dispose)

            @event.listens_for(engines[1].sync_engine, "do_connect")
            def lead(_: object, __: object, ___: object, given: dict[str, object]) -> None:
                if leads_to is None:
                    raise ConnectionRefusedError("connection refused")
                given["database" if driver == "asyncpg" else "dbname"] = leads_to.name

            storage = ShardedSagaStorage([SqlAlchemySagaStorage(engine, retry_for=NOW) for engine in engines])
            ids = await fill(storage)
            leads_to = None
            await engines[1].dispose()
            with pytest.raises(StorageUnavailableError, match="connection refused"):
                await storage.update_context(ids[1][0], {"n": 1})
            leads_to = new
            with pytest.raises(ShardingError, match="storage 1 records nothing"):
                await storage.create_saga(ids_of(storage, 1, 4)[3], "order", {})
            leads_to = second
            await engines[1].dispose()
            await storage.update_context(ids[1][0], {"n": 1})

    async def test_a_claim_does_not_wait_for_a_dying_shard(
        self, storage: ShardedSagaStorage, shards: list[Flaky], caplog: pytest.LogCaptureFixture
    ) -> None:
        """The leases of what it has got from the others would run out meanwhile."""
        ids = await fill(storage)
        shards[1].claims_hang = True
        async with asyncio.timeout(PATIENCE_SECONDS):
            claimed = await storage.claim_sagas(owner="a", lease=timedelta(seconds=3), limit=10, stale_after=NOW)
        assert {saga.id for saga in claimed} == {*ids[0], *ids[2]}
        assert "sagas of shard 1 were not claimed: nothing was written: it hasn't answered in time" in caplog.text
        shards[1].claims_hang = False
        claimed = await storage.claim_sagas(owner="a", lease=NOW, limit=10, stale_after=NOW)
        assert {saga.id for saga in claimed} == set(ids[1])

    async def test_a_claim_that_is_cancelled_leaves_nothing_behind(
        self, storage: ShardedSagaStorage, shards: list[Flaky]
    ) -> None:
        await fill(storage)
        shards[1].claims_hang = True
        before = asyncio.all_tasks()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await storage.claim_sagas(owner="a", lease=timedelta(hours=1), limit=10, stale_after=NOW)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before


class TestFairness:
    async def test_a_claim_takes_from_all_shards_alike(self) -> None:
        storage = twins(*(MemoryDatabase() for _ in range(4)))
        await fill(storage, 10)
        claimed = await storage.claim_sagas(owner="a", lease=timedelta(hours=1), limit=20, stale_after=NOW)
        assert [sum(storage.shard_of(saga.id) == shard for saga in claimed) for shard in range(4)] == [5] * 4

    async def test_small_claims_take_turns(self) -> None:
        """No shard waits for the others to be empty."""
        storage = twins(*(MemoryDatabase() for _ in range(4)))
        await fill(storage, 4)
        turns = []
        for _ in range(8):
            [saga] = await storage.claim_sagas(owner="a", lease=timedelta(hours=1), limit=1, stale_after=NOW)
            turns.append(storage.shard_of(saga.id))
        assert sorted(turns) == [0, 0, 1, 1, 2, 2, 3, 3]

    @pytest.mark.parametrize("limit", [1, 3, 7, 30])
    async def test_what_one_shard_has_is_claimed_whole(self, limit: int) -> None:
        """What the others don't need goes to the one that has more."""
        storage = twins(*(MemoryDatabase() for _ in range(4)))
        await storage.find_sagas()
        ids = ids_of(storage, 2, 20)
        for saga_id in ids:
            await storage.create_saga(saga_id, "order", {})
        claimed = await storage.claim_sagas(owner="a", lease=timedelta(hours=1), limit=limit, stale_after=NOW)
        assert len(claimed) == min(limit, 20)


class TestPages:
    @pytest.mark.parametrize("limit", [1, 2, 5, 7, 50])
    async def test_pages_are_those_of_one_database(self, limit: int) -> None:
        """The newest first, each saga once, whatever else is created meanwhile."""
        storage = twins(*(MemoryDatabase() for _ in range(3)))
        order = [uuid4() for _ in range(20)]
        for saga_id in order:
            await storage.create_saga(saga_id, "order", {})
        found: list[UUID] = []
        after: str | None = None
        while True:
            page = await storage.find_sagas(limit=limit, after=after)
            assert len(page.sagas) <= limit
            found += [saga.id for saga in page.sagas]
            if (after := page.after) is None:
                break
            await storage.create_saga(uuid4(), "other", {})
        assert found == order[::-1]

    @pytest.mark.parametrize("limit", [1, 2, 5, 50])
    async def test_interventions_come_once_each(self, limit: int) -> None:
        """By a cursor that tells where each shard's own list goes on."""
        storage = twins(*(MemoryDatabase() for _ in range(3)))
        ids = await fill(storage, 4)
        order = [saga_id for some in zip(*ids, strict=True) for saga_id in some]
        for saga_id in order:
            await storage.give_up_saga(saga_id, by="ann", reason="told so")
        found: list[UUID] = []
        after: str | None = None
        while True:
            page = await storage.find_interventions(since=SINCE, limit=limit, after=after)
            assert len(page.interventions) <= limit
            found += [one.saga_id for one in page.interventions]
            if (after := page.after) is None:
                break
        assert found == order[::-1]

    @pytest.mark.parametrize("after", ["", "1", "1.2", "1.2.3.4", "1.x.2", "..-1", 7])
    async def test_another_storages_cursor_is_refused(self, after: Any) -> None:  # noqa: ANN401 - whatever it is
        storage = twins(*(MemoryDatabase() for _ in range(3)))
        with pytest.raises(InvalidSagaDataError, match="after must be what a page gave"):
            await storage.find_interventions(since=SINCE, after=after)

    async def test_rows_that_python_cannot_hold_stop_no_page(self, databases: Databases, template: Database) -> None:
        """One created at infinity in one shard, and one at -infinity in the other."""
        async with AsyncExitStack() as stack:
            shards = [stack.enter_context(databases.clone(template)) for _ in range(2)]
            engines = [create_async_engine(shard.url("psycopg")) for shard in shards]
            for engine in engines:
                stack.push_async_callback(engine.dispose)
            storage = ShardedSagaStorage([SqlAlchemySagaStorage(engine) for engine in engines])
            ids = await fill(storage, 4)
            for shard, moment, broken in ((0, "infinity", ids[0][0]), (1, "-infinity", ids[1][0])):
                with psycopg.connect(shards[shard].url(), autocommit=True) as connection:
                    connection.execute(
                        "UPDATE saga_executions SET created_at = %s::timestamptz WHERE id = %s", (moment, broken)
                    )
            found: list[UUID] = []
            unreadable: set[UUID] = set()
            after: str | None = None
            for _ in range(20):
                page = await storage.find_sagas(limit=2, after=after)
                found += [saga.id for saga in page.sagas]
                unreadable |= set(page.unreadable)
                if (after := page.after) is None:
                    break
            assert after is None
            assert sorted(found) == sorted(ids[0][1:] + ids[1][1:])
            assert unreadable == {ids[0][0], ids[1][0]}

    @pytest.mark.parametrize("moment", ["10:00:00", "10:00:00.1", "10:00:00.12", "10:00:10", "10:00:00.000001"])
    @pytest.mark.parametrize("limit", [1, 2, 3])
    async def test_one_moment_has_one_place_in_the_order(
        self, databases: Databases, template: Database, moment: str, limit: int
    ) -> None:
        """However its fraction is spelled: where pages end with rows that can't be read, each other one comes once."""
        async with AsyncExitStack() as stack:
            shards = [stack.enter_context(databases.clone(template)) for _ in range(2)]
            engines = [create_async_engine(shard.url("psycopg")) for shard in shards]
            for engine in engines:
                stack.push_async_callback(engine.dispose)
            storage = ShardedSagaStorage([SqlAlchemySagaStorage(engine) for engine in engines])
            ids = await fill(storage, 6)
            broken = {ids[0][5], ids[0][2], ids[1][0]}
            for shard in shards:
                with psycopg.connect(shard.url(), autocommit=True) as connection:
                    connection.execute(
                        "UPDATE saga_executions SET created_at = %s, "
                        "updated_at = CASE WHEN id = ANY (%s) THEN 'infinity' ELSE updated_at END",
                        (f"2026-11-26 {moment}+00", list(broken)),
                    )
            found: list[UUID] = []
            unreadable: set[UUID] = set()
            after: str | None = None
            for _ in range(40):
                page = await storage.find_sagas(limit=limit, after=after)
                found += [saga.id for saga in page.sagas]
                unreadable |= set(page.unreadable)
                if (after := page.after) is None:
                    break
            assert after is None
            assert found == sorted({*ids[0], *ids[1]} - broken, reverse=True)
            assert unreadable == broken


class TestCommitInto:
    async def test_a_session_of_the_sagas_twin_is_joined_and_no_other(self) -> None:
        databases = [MemoryDatabase() for _ in range(2)]
        storage = twins(*databases)
        [[saga_id], _] = await fill(storage, 1)
        async with storage.run(saga_id) as run:
            await run.update_status(saga_id, SagaStatus.RUNNING)
            with pytest.raises(InvalidSagaDataError, match="into must be on the run's database"):
                await run.commit(into=MemorySession(databases[1]))
            session = MemorySession(databases[0])
            await run.commit(into=session)
            await session.commit()
        assert (await storage.get_saga(saga_id)).status is SagaStatus.RUNNING

    async def test_a_session_on_no_shard_is_refused(self) -> None:
        """The run keeps what it has buffered."""
        storage = twins(*(MemoryDatabase() for _ in range(2)))
        [[saga_id], _] = await fill(storage, 1)
        async with storage.run(saga_id) as run:
            await run.update_status(saga_id, SagaStatus.RUNNING)
            with pytest.raises(InvalidSagaDataError, match="into must be on the run's database"):
                await run.commit(into=MemorySession(MemoryDatabase()))
            await run.commit()
        assert (await storage.get_saga(saga_id)).status is SagaStatus.RUNNING

    @pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
    async def test_a_session_on_another_shard_is_refused(self, empty_database: Database, driver: str) -> None:
        """Also if only the search path tells them apart; the session goes on, and the right one is joined."""
        async with AsyncExitStack() as stack:
            engines: list[AsyncEngine] = []
            for name in ("saga_00", "saga_01"):
                schema.upgrade(empty_database.url("psycopg"), schema=name, create_schema=True)
                settings = {"server_settings": {"search_path": name}}
                given = settings if driver == "asyncpg" else {"options": f"-csearch_path={name}"}
                engines.append(create_async_engine(empty_database.url(driver), connect_args=given))
                stack.push_async_callback(engines[-1].dispose)
            storage = ShardedSagaStorage([SqlAlchemySagaStorage(engine) for engine in engines])
            for shard, [saga_id] in enumerate(await fill(storage, 1)):
                async with storage.run(saga_id, owner="a", lease=timedelta(minutes=1)) as run:
                    await run.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
                    async with AsyncSession(engines[1 - shard]) as wrong:
                        with pytest.raises(InvalidSagaDataError, match=f"shard, shard {shard} of 2, and is on shard "):
                            await run.commit(into=wrong)
                        assert await wrong.scalar(text("SELECT 1")) == 1
                    async with AsyncSession(engines[storage.shard_of(saga_id)]) as right:
                        await run.commit(into=right)
                        await right.commit()
                assert len(await storage.get_step_history(saga_id)) == 1


async def test_what_is_missing_is_missing_in_its_shard(caplog: pytest.LogCaptureFixture) -> None:
    storage = twins(MemoryDatabase(), MemoryDatabase())
    with pytest.raises(SagaNotFoundError):
        await storage.get_saga(uuid4())
    assert not caplog.records
