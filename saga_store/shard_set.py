"""The shards of a storage: whether each is what it should be, which ones can be reached, and how all are asked."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeAlias, TypeVar
from uuid import uuid4

from saga_store.errors import InvalidSagaDataError, SagaStoreError, ShardingError, StorageUnavailableError
from saga_store.remedies import show
from saga_store.shard_records import MOST_SHARDS, ShardRecord, ShardState, check_states
from saga_store.storage import SagaStorage

_T = TypeVar("_T")
_Question: TypeAlias = Callable[[SagaStorage], Awaitable[_T]]

# For how long lists and claims wait for a shard that couldn't be reached the last time, once for each look at it.
_PATIENCE_SECONDS = 0.5


class ShardSet:
    """Several storages, none of which is used before it is known to be the shard that it is taken for.

    One that couldn't be reached is looked at again before it is used again, for it may have come back as another.
    ``ready`` has those that may be used at once, at their places. Unless it ``records`` what they are, new ones are
    left as they are.
    """

    def __init__(self, storages: Iterable[SagaStorage], *, records: bool = True) -> None:
        self.storages: tuple[SagaStorage, ...] = _valid_storages(storages)
        self._records = records
        self.ready: list[SagaStorage | None] = [None] * len(self.storages)
        self._states: dict[int, ShardState] = {}
        self._unreachable: dict[int, SagaStoreError] = {}
        self._check: asyncio.Task[None] | None = None
        self._patience_ends = 0.0

    def record_of(self, index: int) -> ShardRecord | None:
        """Return what the shard has recorded, as far as that is known."""
        return self._states[index].record if index in self._states else None

    @property
    def unreachable(self) -> dict[int, SagaStoreError]:
        """Why some couldn't be reached when they were last asked."""
        return {index: self._error(index) for index in sorted(self._unreachable) if self.ready[index] is None}

    async def get(self, index: int) -> SagaStorage:
        """Return a shard that may be used, or raise what is in the way."""
        if self.ready[index] is None:
            await asyncio.shield(self._checking())
        shard = self.ready[index]
        if shard is None:
            raise self._error(index)
        return shard

    async def reach(self) -> dict[int, SagaStoreError]:
        """See which shards may be used, and return what is in the way of the others.

        Raises:
            StorageUnavailableError: It is all of them.
        """
        if None in self.ready:
            check = self._checking()
            left = self._patience_ends - check.get_loop().time()
            if self._states and left > 0:
                await asyncio.wait([check], timeout=left)
            if check.done() or not self._states:
                await asyncio.shield(check)
        missing = {index: self._error(index) for index, shard in enumerate(self.ready) if shard is None}
        if len(missing) == len(self.storages):
            raise missing[0]
        return missing

    async def ask(self, questions: Mapping[int, _Question[_T]]) -> tuple[dict[int, _T], dict[int, SagaStoreError]]:
        """Ask shards at the same time; return their answers, and the errors of those that gave none."""
        answers = await asyncio.gather(
            *(question(self.storages[index]) for index, question in questions.items()), return_exceptions=True
        )
        found: dict[int, _T] = {}
        failures: dict[int, SagaStoreError] = {}
        for index, answer in zip(questions, answers, strict=True):
            if isinstance(answer, SagaStoreError):
                failures[index] = answer
                if isinstance(answer, StorageUnavailableError):
                    self.ready[index] = None
                    self._unreachable[index] = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[index] = answer
        return found, failures

    async def ask_all(self, question: _Question[_T]) -> tuple[dict[int, _T], dict[int, SagaStoreError]]:
        """Ask all that can be reached; return their answers, and why the others gave none.

        Raises:
            SagaStoreError: None could be reached, or one raised anything but StorageUnavailableError.
        """
        missing = await self.reach()
        found, failures = await self.ask(
            {index: question for index in range(len(self.storages)) if index not in missing}
        )
        return found, self.missing(found, missing, failures)

    @staticmethod
    def missing(
        found: Mapping[int, object], missing: Mapping[int, SagaStoreError], failures: Mapping[int, SagaStoreError]
    ) -> dict[int, SagaStoreError]:
        """Return why some shards gave no answer, unless others would be no better off without them."""
        for failure in failures.values():
            if not found or not isinstance(failure, StorageUnavailableError):
                raise failure
        return dict(sorted({**missing, **failures}.items()))

    def _error(self, index: int) -> SagaStoreError:
        cause = self._unreachable.get(index)
        code = cause.sqlstate if isinstance(cause, StorageUnavailableError) else None
        reason = cause.reason if isinstance(cause, StorageUnavailableError) else "it hasn't answered yet"
        error = StorageUnavailableError(f"shard {index} can't be reached: {reason}", code)
        error.__cause__ = cause
        return error

    def _checking(self) -> "asyncio.Task[None]":
        """Return the check that is under way in this loop, or begin one."""
        loop = asyncio.get_running_loop()
        if self._check is None or self._check.done() or self._check.get_loop() is not loop:
            self._check = loop.create_task(self._check_all())
            self._patience_ends = loop.time() + _PATIENCE_SECONDS
            # It may be that nobody waits for it any more.
            self._check.add_done_callback(lambda check: check.cancelled() or check.exception())
        return self._check

    async def _check_all(self) -> None:
        """Look at all shards that aren't ready, and record what they are if all of them are new."""
        found = await self._look()
        unreachable = {index: error for index, error in found.items() if isinstance(error, StorageUnavailableError)}
        looked_at = {index: state for index, state in found.items() if isinstance(state, ShardState)}
        states = self._states | looked_at
        count = len(self.storages)
        check_states(states, count, is_known=bool(self._states))
        for problem in found.values():
            # What is wrong with one of too many, or of other shards, is told by that.
            if isinstance(problem, BaseException) and not isinstance(problem, StorageUnavailableError):
                raise problem
        if any(state.record is None for state in states.values()):
            _refuse_full(states)
            if unreachable and self._records:
                index, cause = next(iter(unreachable.items()))
                raise StorageUnavailableError(
                    f"shard {index} can't be reached, and what the shards are hasn't been recorded yet: {cause}"
                ) from cause
            if self._records:
                states = looked_at = await self._record(states)
                check_states(states, count, is_known=True)
        self._states |= {index: state for index, state in looked_at.items() if state.record}
        self._unreachable = {**self._unreachable, **unreachable}
        for index in looked_at:
            self.ready[index] = self.storages[index]

    async def _look(self) -> dict[int, ShardState | BaseException]:
        asked = [index for index, shard in enumerate(self.ready) if shard is None]
        answers = await asyncio.gather(
            *(self.storages[index]._fetch_shard_state() for index in asked), return_exceptions=True
        )
        return dict(zip(asked, answers, strict=True))

    async def _record(self, states: dict[int, ShardState]) -> dict[int, ShardState]:
        """Record what each shard is. Of two that do it at once the first shard's record decides which cluster it is."""
        records = [state.record for state in states.values() if state.record]
        cluster = records[0].cluster if records else uuid4()
        recorded: dict[int, ShardState] = {}
        for index, storage in enumerate(self.storages):
            await storage._record_shard(ShardRecord(cluster, index, len(self.storages)))
            recorded[index] = await storage._fetch_shard_state()
            record = recorded[index].record
            if record is not None and index == 0:
                cluster = record.cluster
        return recorded


def _refuse_full(states: Mapping[int, ShardState]) -> None:
    """Refuse to make a shard of what has sagas."""
    for index, state in states.items():
        if not state.is_empty:
            raise ShardingError(
                f"storage {index} has sagas, and was never a shard: most of them would be looked for elsewhere; begin "
                "with empty databases, or move its sagas as docs/scale.md tells"
            )


def _valid_storages(storages: object) -> tuple[SagaStorage, ...]:
    if isinstance(storages, SagaStorage) or not isinstance(storages, Iterable):
        raise InvalidSagaDataError("storages", f"must be a list of storages, not {show(storages)}; list all shards")
    shards = tuple(storages)
    if not 1 <= len(shards) <= MOST_SHARDS:
        raise InvalidSagaDataError("storages", f"must be 1 to {MOST_SHARDS:,} storages, not {len(shards)}")
    for index, shard in enumerate(shards):
        if not isinstance(shard, SagaStorage):
            raise InvalidSagaDataError(
                "storages", f"must be storages, and number {index} is {show(shard)}; make one of it"
            )
        if shard._joins:
            raise InvalidSagaDataError(
                "storages",
                f"must commit their own calls, and number {index} joins a transaction; bind it to an engine, and give "
                "the session to run.commit(into=...)",
            )
    return shards
