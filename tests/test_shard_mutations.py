"""Storages made of shards, broken in many ways: the kit over shards, or a test of their own, notices each.

As in test_mutations.py, the subjects run in a pytest of their own, which collects the classes ``Sound...`` and
``Broken...`` of this module, and whose report is read here. They run on twins in memory, without a server.
"""
# ruff: noqa: SLF001 - mutants break shards from inside

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import ClassVar, TypeAlias, TypeVar
from uuid import UUID
from zlib import crc32

import pytest

from saga_store import (
    InvalidSagaDataError,
    SagaExecution,
    SagaNotFoundError,
    SagaStoreError,
    StorageUnavailableError,
    shard_records,
    shard_set,
    sharding,
)
from saga_store.inspection import InterventionPage, SagaCount, SagaPage, read_cursor
from saga_store.run import Joined
from saga_store.shard_merging import merge_interventions, merge_pages
from saga_store.shard_records import ShardRecord, ShardState, check_states, shard_index
from saga_store.shard_retention import ShardedRetention
from saga_store.shard_set import ShardSet
from saga_store.sharding import ShardedSagaStorage
from saga_store.storage import SagaStorage
from saga_store.testing import (
    CommitIntoContract,
    InspectionContract,
    StubContract,
)
from saga_store.write import Claim
from tests import test_shards as own
from tests.test_mutations import Report, run_apart
from tests.test_sharding import MemoryShards

_T = TypeVar("_T")
Change: TypeAlias = tuple[object, str, object]
"""What is replaced: a module's or a class's attribute, and by what."""


class Replacing:
    """Runs a subject with something of the shards replaced."""

    changes: ClassVar[Sequence[Change]] = ()

    @pytest.fixture(autouse=True)
    def replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for place, name, value in self.changes:
            monkeypatch.setattr(place, name, value)

    @pytest.fixture
    def databases(self) -> None:
        """What only the tests on PostgreSQL use; so is the next."""

    @pytest.fixture
    def template(self) -> None: ...


# Hashes


def big_number(data: bytes) -> int:
    """Take the id itself: ids that begin by a time, or end alike, would all be in one shard."""
    return int.from_bytes(data, "big")


def of_fields_swapped(data: bytes) -> int:
    """Take the bytes as Windows has them."""
    return crc32(UUID(bytes=data).bytes_le)


def hashing(crc: Callable[[bytes], int]) -> Change:
    return shard_records, "zlib", SimpleNamespace(crc32=crc, __name__=crc.__name__)


def next_shard(self: ShardedRetention, saga_id: UUID) -> int:
    """Look for a saga in another place than the rest does."""
    return (shard_index(saga_id, len(self._set.storages)) + 1) % len(self._set.storages)


# Who passes for a shard


def check_no_order(records: Mapping[int, ShardRecord], count: int) -> None:
    shard_records._check_kin(records)
    shard_records._check_count(records, count)


def check_nothing(*_: object) -> None: ...


def check_none(_: Mapping[int, ShardRecord]) -> None: ...


def check_old_ones(states: Mapping[int, ShardState], count: int, *, is_known: bool) -> None:
    """Take a database without a record for a new shard, whatever the others are."""
    check_states({index: state for index, state in states.items() if state.record}, count, is_known=is_known)


_look = ShardSet._look
_ask = ShardSet.ask


async def look_past_outages(self: ShardSet) -> dict[int, ShardState | StorageUnavailableError]:
    """Take one that can't be reached for a new one."""
    return {
        index: state if isinstance(state, ShardState) else ShardState(None, is_empty=True, database=object())
        for index, state in (await _look(self)).items()
    }


async def ask_and_trust(
    self: ShardSet, questions: Mapping[int, Callable[[SagaStorage], Awaitable[_T]]], *, patience: float | None = None
) -> tuple[dict[int, _T], dict[int, SagaStoreError]]:
    """Don't look again at who was away."""
    ready = list(self.ready)
    answers = await _ask(self, questions, patience=patience)
    self.ready[:] = ready
    return answers


async def look_once(self: ShardSet, index: int) -> ShardState:
    """Believe a look in the middle of which the shard was lost."""
    return await self.storages[index]._fetch_shard_state()


def look_at_all(self: ShardSet, _: int) -> Awaitable[None]:
    """Have the sagas of one that is back wait for one that isn't."""
    return self._checking()


# Outages


def overlook(*_: object) -> None: ...


def take_answers_for_outages(_: object) -> bool:
    return True


def miss_the_others(_: object) -> bool:
    return False


async def ask_or_fail(
    self: ShardSet, questions: Mapping[int, Callable[[SagaStorage], Awaitable[_T]]], *, patience: float | None = None
) -> tuple[dict[int, _T], dict[int, SagaStoreError]]:
    """Throw away what some answered because another one didn't."""
    found, failures = await _ask(self, questions, patience=patience)
    for failure in failures.values():
        raise failure
    return found, failures


def miss_nothing(*_: object) -> dict[int, SagaStoreError]:
    return {}


async def take_outages_for_absence(self: ShardedSagaStorage, saga_id: UUID) -> SagaExecution:
    try:
        return await self._on(saga_id, lambda shard: shard._fetch_saga(saga_id))
    except StorageUnavailableError as exc:
        raise SagaNotFoundError(saga_id) from exc


# Claims


async def claim_from_the_first(self: ShardedSagaStorage, claim: Claim) -> list[SagaExecution]:
    return await (await self._set.get(0))._claim(claim)


def wait_for_ever(_: object) -> None: ...


_shares = sharding._shares


def share_from_the_first(limit: int, turn: Sequence[int]) -> dict[int, int]:
    """Begin with the same shard each time."""
    return _shares(limit, sorted(turn))


def share_the_whole(limit: int, turn: Sequence[int]) -> dict[int, int]:
    """Ask each for all."""
    return dict.fromkeys(turn, limit)


async def claim_an_equal_share(self: ShardedSagaStorage, claim: Claim) -> list[SagaExecution]:
    """Let what a shard doesn't need go to nobody."""
    shares = _shares(claim.limit, range(self._shards))
    claims = {index: replace(claim, limit=share) for index, share in shares.items()}
    return [saga for index, one in claims.items() for saga in await (await self._set.get(index))._claim(one)]


# Lists


def end_with_the_shards(pages: Sequence[SagaPage], limit: int, missing: tuple[int, ...]) -> SagaPage:
    """Take a page for the last one if each shard's own was."""
    page = merge_pages(pages, limit, missing)
    return replace(page, after=page.after if any(one.after for one in pages) else None)


def go_on_after_the_furthest(pages: Sequence[SagaPage], limit: int, missing: tuple[int, ...]) -> SagaPage:
    """Go on where the shard that is furthest ended, and lose what the page's border cut off."""
    page = merge_pages(pages, limit, missing)
    ends = [cursor for one in pages if (cursor := read_cursor(one.after))]
    return replace(page, after=str(min(ends, key=lambda cursor: cursor.created_at)) if ends else page.after)


def list_by_place(pages: Sequence[SagaPage], limit: int, missing: tuple[int, ...]) -> SagaPage:
    page = merge_pages(pages, limit, missing)
    return replace(page, sagas=[saga for one in pages for saga in one.sagas][:limit])


def forget_what_was_left(
    pages: Mapping[int, InterventionPage], positions: Sequence[int | None], limit: int, missing: tuple[int, ...]
) -> InterventionPage:
    """Go on after each shard's own page, as if all of it had been shown."""
    page = merge_interventions(pages, positions, limit, missing)
    ends = [str(pages[index].interventions[-1].entry_id) if pages[index].interventions else "0" for index in pages]
    return replace(page, after=page.after and ".".join(ends))


def count_the_first(counts: Sequence[SagaCount], _: tuple[int, ...]) -> SagaCount:
    return counts[0]


# Transactions


def join_the_next(self: ShardedSagaStorage, saga_id: UUID, into: object) -> Joined:
    return self._set.storages[(shard_index(saga_id, self._shards) + 1) % self._shards]._joined(into)


def join_any(self: ShardedSagaStorage, _: UUID, into: object) -> Joined:
    """Write where the session is, whether the saga is there or not."""
    *others, last = self._set.storages
    for shard in others:
        with suppress(InvalidSagaDataError):
            return shard._joined(into)
    return last._joined(into)


@dataclass(frozen=True, slots=True)
class Mutant:
    """What is replaced, the subject that is to notice, and its test whose sentence this breaks.

    Of the kit only this test is run, and one that is to pass: test_sharding.py has all of it on shards as they are.
    """

    change: Change
    subject: type
    test: str
    passes: str | None = None

    @property
    def name(self) -> str:
        _, attribute, value = self.change
        return f"Broken_{getattr(value, '__name__', attribute)}_{self.subject.__name__}"

    def __str__(self) -> str:
        return self.name.removeprefix("Broken_")

    @property
    def control(self) -> str:
        return f"Sound_{self.subject.__name__}"

    def as_test_class(self, name: str, *changes: Change) -> type:
        body: dict[str, object] = {"__module__": __name__, "changes": changes}
        if self.passes is None:
            return type(name, (Replacing, self.subject), body)
        wanted = {name.partition("[")[0] for name in (self.test, self.passes)}
        hidden = {name: None for name in dir(self.subject) if name.startswith("test") and name not in wanted}
        return type(name, (Replacing, MemoryShards, self.subject), body | hidden | {"patience": timedelta(seconds=10)})


REFUSED = "test_shards_that_are_not_what_they_were_are_refused[memory]"
PAGES = "test_pages_are_those_of_one_database"
MUTANTS = (
    Mutant(hashing(big_number), own.TestRouting, "test_ids_of_all_kinds_are_spread_evenly[16]"),
    Mutant(hashing(of_fields_swapped), own.TestRouting, "test_the_test_vectors_of_the_page"),
    Mutant(
        (ShardedRetention, "_index", next_shard),
        StubContract,
        "test_it_is_found_with_its_archive",
        "test_a_stub_is_not_read[get_saga]",
    ),
    Mutant((shard_records, "_check_records", check_no_order), own.TestIdentity, REFUSED),
    Mutant((shard_records, "_check_count", check_nothing), own.TestIdentity, REFUSED),
    Mutant((shard_records, "_check_kin", check_none), own.TestIdentity, REFUSED),
    Mutant((shard_set, "check_states", check_old_ones), own.TestIdentity, REFUSED),
    Mutant((ShardSet, "_look", look_past_outages), own.TestRecording, "test_it_waits_for_all_shards"),
    Mutant((ShardSet, "ask", ask_and_trust), own.TestOutage, "test_one_that_comes_back_as_another_is_refused"),
    Mutant(
        (ShardSet, "note", overlook),
        own.TestOutage,
        "test_whoever_meets_the_outage_has_it_looked_at_again[write-refused]",
    ),
    Mutant(
        (ShardSet, "_state_of", look_once),
        own.TestOutage,
        "test_an_outage_in_the_middle_of_a_look_is_not_overlooked",
    ),
    Mutant((ShardSet, "_looking", look_at_all), own.TestOutage, "test_one_that_is_back_does_not_wait_for_another"),
    Mutant((shard_set, "_is_loss", take_answers_for_outages), own.TestOutage, "test_an_answer_is_no_outage"),
    Mutant(
        (shard_set, "_is_being_recorded", miss_the_others),
        own.TestRecording,
        "test_who_looks_while_another_process_records_is_not_told_wrong",
    ),
    Mutant((ShardSet, "ask", ask_or_fail), own.TestOutage, "test_claims_go_on"),
    Mutant(
        (ShardSet, "missing", staticmethod(miss_nothing)), own.TestOutage, "test_lists_and_figures_say_what_is_missing"
    ),
    Mutant(
        (ShardedSagaStorage, "_fetch_saga", take_outages_for_absence),
        own.TestOutage,
        "test_its_sagas_fail_and_others_dont",
    ),
    Mutant((ShardedSagaStorage, "_claim", claim_from_the_first), own.TestOutage, "test_claims_go_on"),
    Mutant((sharding, "_patience", wait_for_ever), own.TestOutage, "test_a_claim_does_not_wait_for_a_dying_shard"),
    Mutant((sharding, "_shares", share_from_the_first), own.TestFairness, "test_small_claims_take_turns"),
    Mutant((sharding, "_shares", share_the_whole), own.TestFairness, "test_small_claims_take_turns"),
    Mutant(
        (ShardedSagaStorage, "_claim", claim_an_equal_share),
        own.TestFairness,
        "test_what_one_shard_has_is_claimed_whole[7]",
    ),
    Mutant((sharding, "merge_pages", end_with_the_shards), own.TestPages, f"{PAGES}[7]"),
    Mutant((sharding, "merge_pages", go_on_after_the_furthest), own.TestPages, f"{PAGES}[2]"),
    Mutant((sharding, "merge_pages", list_by_place), own.TestPages, f"{PAGES}[50]"),
    Mutant(
        (sharding, "merge_interventions", forget_what_was_left), own.TestPages, "test_interventions_come_once_each[2]"
    ),
    Mutant(
        (sharding, "merge_counts", count_the_first),
        InspectionContract,
        "test_views_tell_what_is_so",
        "test_pages_follow_each_other",
    ),
    Mutant(
        (ShardedSagaStorage, "_joined_for", join_the_next),
        CommitIntoContract,
        "test_it_is_stored_with_the_transaction",
        "test_what_isnt_a_transaction",
    ),
    Mutant(
        (ShardedSagaStorage, "_joined_for", join_any),
        own.TestCommitInto,
        "test_a_session_of_the_sagas_twin_is_joined_and_no_other",
    ),
)

# Where pytest looks for test classes.
globals().update({mutant.name: mutant.as_test_class(mutant.name, mutant.change) for mutant in MUTANTS})
globals().update({mutant.control: mutant.as_test_class(mutant.control) for mutant in MUTANTS})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_apart(__file__, "Sound_ or Broken_", tmp_path_factory.mktemp("shard-mutations") / "report.xml")


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_noticed(report: Report, mutant: Mutant) -> None:
    """By the test whose sentence it breaks, and which passes on shards as they are."""
    assert mutant.test in report.passed[mutant.control]
    assert mutant.test in report.failed[mutant.name]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_breaks_little(report: Report, mutant: Mutant) -> None:
    """No mutant is so broken that every test would notice it."""
    assert report.passed[mutant.name]
