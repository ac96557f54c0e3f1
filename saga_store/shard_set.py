"""The shards of a storage: whether each is what it should be, which ones can be reached, and how all are asked."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

from saga_store.errors import (
    InvalidSagaDataError,
    SagaStoreError,
    SchemaError,
    ShardingError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.remedies import show
from saga_store.shard_records import MOST_SHARDS, ShardRecord, ShardState, check_states
from saga_store.storage import SagaStorage

_T = TypeVar("_T")
_Question: TypeAlias = Callable[[SagaStorage], Awaitable[_T]]

# For how long lists and claims wait for a shard that couldn't be reached the last time, once for each look at it.
_PATIENCE_SECONDS = 0.5

# PostgreSQL's codes, or how they begin, where a connection was lost or refused, or leads to a standby: who is there the
# next time may be another. All others are answers of the server that was known.
_LOST = ("08", "25006", "25P03", "28", "3D", "53300", "57P")


class ShardSet:
    """Several storages, none of which is used before it is known to be the shard that it is taken for.

    At first use all are compared. One whose connection was lost or refused is looked at again before it is used again,
    for it may have come back as another; meanwhile the others are used. ``ready`` has those that may be used at once,
    at their places. Unless it ``records`` what they are, new ones are left as they are.
    """

    def __init__(self, storages: Iterable[SagaStorage], *, records: bool = True) -> None:
        self.storages: tuple[SagaStorage, ...] = _valid_storages(storages)
        self._records = records
        self.ready: list[SagaStorage | None] = [None] * len(self.storages)
        self._states: dict[int, ShardState] = {}
        # Whether all of them are recorded, including those that haven't been reached yet.
        self._is_known = False
        self._unreachable: dict[int, SagaStoreError] = {}
        self._losses = [0] * len(self.storages)
        self._check: asyncio.Task[None] | None = None
        self._looks: dict[int, asyncio.Task[None]] = {}
        self._patience_ends: dict[int, float] = {}

    def record_of(self, index: int) -> ShardRecord | None:
        """Return what the shard has recorded, as far as that is known."""
        return self._states[index].record if index in self._states else None

    @property
    def unreachable(self) -> dict[int, SagaStoreError]:
        """Why some gave no answer when they were last asked."""
        return {index: self._error(index) for index in sorted(self._unreachable)}

    async def get(self, index: int) -> SagaStorage:
        """Return a shard that may be used, or raise what is in the way."""
        if self.ready[index] is None:
            await asyncio.shield(self._looking(index) if self._is_known else self._checking())
        shard = self.ready[index]
        if shard is None:
            error = self._error(index)
            raise SchemaError(*error.__cause__.args) if isinstance(error.__cause__, SchemaError) else error
        return shard

    async def on(self, index: int, question: _Question[_T]) -> _T:
        """Ask one shard."""
        shard = self.ready[index] or await self.get(index)
        try:
            return await question(shard)
        except SagaStoreError as exc:
            self.note(index, exc)
            raise

    async def reach(self) -> dict[int, SagaStoreError]:
        """See which shards may be used, and return what is in the way of the others.

        Raises:
            StorageUnavailableError: It is all of them.
        """
        if None in self.ready:
            if self._is_known:
                await self._look_patiently()
            else:
                await asyncio.shield(self._checking())
        missing = {index: self._error(index) for index, shard in enumerate(self.ready) if shard is None}
        if len(missing) == len(self.storages):
            raise missing[0]
        return missing

    async def ask(
        self, questions: Mapping[int, _Question[_T]], *, patience: float | None = None
    ) -> tuple[dict[int, _T], dict[int, SagaStoreError]]:
        """Ask shards at the same time; return their answers, and the errors of those that gave none.

        Args:
            questions: For each of them; one that may not be used any more isn't asked.
            patience: For how many seconds to wait for the others once one has answered; those that are late are left.
        """
        asked = {index: question for index, question in questions.items() if self.ready[index] is not None}
        answers = await _gather((question(self.storages[index]) for index, question in asked.items()), patience)
        found: dict[int, _T] = {}
        failures = {index: self._error(index) for index in questions if index not in asked}
        for index, answer in zip(asked, answers, strict=True):
            if isinstance(answer, SagaStoreError):
                failures[index] = answer
                self.note(index, answer)
                if is_outage(answer):
                    self._unreachable[index] = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[index] = answer
                if self.ready[index] is not None:
                    self._unreachable.pop(index, None)
        return found, failures

    async def ask_all(self, question: _Question[_T]) -> tuple[dict[int, _T], dict[int, SagaStoreError]]:
        """Ask all that can be reached; return their answers, and why the others gave none.

        Raises:
            SagaStoreError: None could be reached, or one raised anything but StorageUnavailableError or SchemaError.
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
            if not found or not is_outage(failure):
                raise failure
        return dict(sorted({**missing, **failures}.items()))

    def note(self, index: int, error: SagaStoreError) -> None:
        """Have a shard looked at again before it is used again, if its connection was lost or its tables are gone."""
        if _is_loss(error):
            self.ready[index] = None
            self._unreachable[index] = error
            self._losses[index] += 1

    def _error(self, index: int) -> SagaStoreError:
        cause = self._unreachable.get(index)
        code = cause.sqlstate if isinstance(cause, StorageUnavailableError) else None
        what = "used" if isinstance(cause, SchemaError) else "reached"
        error = StorageUnavailableError(f"shard {index} can't be {what}: {_reason(cause)}", code)
        error.__cause__ = cause
        return error

    def _checking(self) -> "asyncio.Task[None]":
        """Return the check of all that is under way in this loop, or begin one."""
        if (check := _under_way(self._check)) is None:
            check = self._check = _begin(self._check_all())
        return check

    def _looking(self, index: int) -> "asyncio.Task[None]":
        """Return the look at one shard that is under way in this loop, or begin one."""
        if (look := _under_way(self._looks.get(index))) is None:
            look = self._looks[index] = _begin(self._look_again(index))
            self._patience_ends[index] = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
        return look

    async def _look_patiently(self) -> None:
        """Look at those that aren't ready, and wait for that as long as lists and claims do."""
        looks = {index: self._looking(index) for index, shard in enumerate(self.ready) if shard is None}
        left = max(self._patience_ends[index] for index in looks) - asyncio.get_running_loop().time()
        if left > 0:
            await asyncio.wait(looks.values(), timeout=left)
        for look in looks.values():
            if look.done():
                look.result()

    async def _look_again(self, index: int) -> None:
        """Have a shard that was lost be ready again, if it is what it was."""
        try:
            state = await self._state_of(index)
        except (StorageUnavailableError, SchemaError) as exc:
            self._unreachable[index] = exc
            return
        check_states(self._states | {index: state}, len(self.storages), is_known=True)
        known = self.record_of(index)
        if known is not None and state.record != known:
            raise ShardingError(
                f"storage {index} was {known} (cluster {known.cluster}), and is another database now; find that shard, "
                "or restore it"
            )
        self._take({index: state})

    async def _check_all(self) -> None:
        """Look at all shards that aren't ready, and record what they are if all of them are new."""
        found = await self._look()
        if _is_being_recorded(found):
            # By another process, which has begun to use them meanwhile: now all of it can be seen.
            found = await self._look()
        unreachable = {index: error for index, error in found.items() if isinstance(error, StorageUnavailableError)}
        looked_at = {index: state for index, state in found.items() if isinstance(state, ShardState)}
        states = self._states | looked_at
        count = len(self.storages)
        check_states(states, count, is_known=False)
        for problem in found.values():
            # What is wrong with one of too many, or of other shards, is told by that.
            if isinstance(problem, BaseException) and not isinstance(problem, StorageUnavailableError):
                raise problem
        is_new = any(state.record is None for state in states.values())
        if is_new:
            _refuse_full(states)
        # No saga is let in before all are recorded, so as long as there is none, those that are away may not be.
        if self._records and unreachable and states and all(state.is_empty for state in states.values()):
            index, cause = next(iter(unreachable.items()))
            raise StorageUnavailableError(
                f"shard {index} can't be reached, and what the shards are hasn't been recorded yet, as far as can be "
                f"told: the others have no sagas: {cause}"
            ) from cause
        if is_new and self._records:
            states = looked_at = await self._record(states)
            check_states(states, count, is_known=True)
        self._is_known = all(state.record for state in states.values()) and (
            len(states) == count or not all(state.is_empty for state in states.values())
        )
        self._unreachable |= unreachable
        self._take(looked_at)

    def _take(self, states: Mapping[int, ShardState]) -> None:
        """Have shards be ready that are what they should be."""
        for index, state in states.items():
            if state.record:
                self._states[index] = state
            self._unreachable.pop(index, None)
            self.ready[index] = self.storages[index]

    async def _state_of(self, index: int) -> ShardState:
        """Return what a shard is; if it was lost meanwhile, the answer may be of the one that was there before."""
        while True:
            losses = self._losses[index]
            state = await self.storages[index]._fetch_shard_state()
            if losses == self._losses[index]:
                return state

    async def _look(self) -> dict[int, ShardState | BaseException]:
        asked = [index for index, shard in enumerate(self.ready) if shard is None]
        answers = await asyncio.gather(*(self._state_of(index) for index in asked), return_exceptions=True)
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


def is_outage(error: SagaStoreError) -> bool:
    """Whether lists and claims go on without a shard that raises this."""
    return isinstance(error, StorageUnavailableError | SchemaError)


def _reason(cause: SagaStoreError | None) -> str:
    if isinstance(cause, StorageUnavailableError):
        return cause.reason
    if isinstance(cause, UnknownOutcomeError):
        return "the connection died"
    return "it hasn't answered yet" if cause is None else str(cause)


def _is_loss(error: SagaStoreError) -> bool:
    """Whether another database may be there the next time."""
    if isinstance(error, StorageUnavailableError):
        return error.sqlstate is None or error.sqlstate.startswith(_LOST)
    return isinstance(error, SchemaError | UnknownOutcomeError)


def _is_being_recorded(found: Mapping[int, object]) -> bool:
    states = [state for state in found.values() if isinstance(state, ShardState)]
    return any(state.record is None and state.is_empty for state in states) and any(
        state.record is not None and not state.is_empty for state in states
    )


def _begin(look: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    task = asyncio.get_running_loop().create_task(look)
    # It may be that nobody waits for it any more.
    task.add_done_callback(_retrieve)
    return task


def _retrieve(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()


def _under_way(task: "asyncio.Task[None] | None") -> "asyncio.Task[None] | None":
    is_here = task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop()
    return task if is_here else None


async def _gather(calls: Iterable[Awaitable[_T]], patience: float | None) -> list[_T | BaseException]:
    """Return the answers or errors of calls made at the same time; those that are late are cancelled."""
    if patience is None:
        return await asyncio.gather(*calls, return_exceptions=True)
    tasks = [asyncio.ensure_future(call) for call in calls]
    waiting = set(tasks)
    try:
        while waiting and not any(task.done() and task.exception() is None for task in tasks):
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if waiting:
            await asyncio.wait(waiting, timeout=patience)
    finally:
        late = [task for task in tasks if not task.done()]
        for task in late:
            task.add_done_callback(_retrieve)
            task.cancel()
    return [_late() if task in late else task.exception() or task.result() for task in tasks]


def _late() -> StorageUnavailableError:
    return StorageUnavailableError("it hasn't answered in time, when others had")


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
