"""Subject: many callers at once, on one saga and on many; nothing is lost and nothing is mixed up."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable
from uuid import UUID, uuid4

import pytest

from saga_store.errors import (
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaNotFoundError,
)
from saga_store.interface import ICheckpointStorage, ISagaStorage
from saga_store.model import Checkpoint, LogStep, SagaLogEntry, SagaStatus, SagaStepStatus
from saga_store.testing.contract import Contract, new_saga

_WRITERS = 12


class ConcurrencyContract(Contract):
    """What the six methods promise to callers who don't wait for each other."""

    async def test_one_creator_wins(self, storage: ISagaStorage) -> None:
        """Of several creators of one id exactly one succeeds, and the others get SagaAlreadyExistsError."""
        saga_id = uuid4()
        outcomes = await asyncio.gather(
            *(storage.create_saga(saga_id, "order", {"creator": n}) for n in range(_WRITERS)), return_exceptions=True
        )
        assert Counter(map(type, outcomes)) == {type(None): 1, SagaAlreadyExistsError: _WRITERS - 1}
        assert await storage.load_saga_state(saga_id) == (SagaStatus.PENDING, {"creator": outcomes.index(None)})

    async def test_no_entry_is_lost(self, storage: ISagaStorage) -> None:
        """All entries that several callers log at once are there, each once, under ids that increase."""
        saga_id = await new_saga(storage)
        names = [f"step-{n}" for n in range(_WRITERS)]
        await asyncio.gather(*(storage.log_step(saga_id, name, "act", SagaStepStatus.STARTED) for name in names))
        history = await storage.get_step_history(saga_id)
        assert sorted(entry.step_name for entry in history) == sorted(names)
        assert all(earlier.id < later.id for earlier, later in itertools.pairwise(history))

    async def test_each_callers_entries_keep_their_order(self, storage: ISagaStorage) -> None:
        """Entries that one caller logs in turn keep that order, whoever else logs meanwhile."""
        saga_id = await new_saga(storage)

        async def log(caller: int) -> None:
            for n in range(5):
                await storage.log_step(saga_id, f"{caller}", "act", SagaStepStatus.STARTED, f"{n}")

        await asyncio.gather(*(log(caller) for caller in range(5)))
        history = await storage.get_step_history(saga_id)
        for caller in range(5):
            assert [entry.details for entry in history if entry.step_name == f"{caller}"] == list("01234")

    async def test_writers_of_different_things(self, storage: ISagaStorage) -> None:
        """Status, context and history written at once are all there: no writer puts back what it had read."""
        for _ in range(5):
            saga_id = await new_saga(storage)
            await asyncio.gather(
                storage.update_status(saga_id, SagaStatus.RUNNING),
                storage.update_context(saga_id, {"total": 12}),
                storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED),
            )
            assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"total": 12})
            assert len(await storage.get_step_history(saga_id)) == 1

    async def test_last_context_is_one_that_was_written(self, storage: ISagaStorage) -> None:
        """Of contexts written at once one stays, whole."""
        saga_id = await new_saga(storage)
        contexts = [{"writer": n, f"key-{n}": n} for n in range(_WRITERS)]
        await asyncio.gather(*(storage.update_context(saga_id, context) for context in contexts))
        assert (await storage.load_saga_state(saga_id))[1] in contexts

    async def test_sagas_dont_mix(self, storage: ISagaStorage) -> None:
        """Sagas that are written at once each get what was meant for them, and nothing else."""

        async def live(n: int) -> UUID:
            saga_id = await new_saga(storage, {"n": -1})
            await storage.log_step(saga_id, f"step-{n}", "act", SagaStepStatus.STARTED)
            await storage.update_context(saga_id, {"n": n})
            return saga_id

        for n, saga_id in enumerate(await asyncio.gather(*(live(n) for n in range(_WRITERS)))):
            assert (await storage.load_saga_state(saga_id))[1] == {"n": n}
            assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == [f"step-{n}"]

    async def test_refusal_hurts_no_neighbour(self, storage: ISagaStorage) -> None:
        """Of writes made at once, those that are refused fail alone; the others go through."""
        taken, missing = await new_saga(storage), uuid4()
        good = [await new_saga(storage) for _ in range(4)]
        outcomes = await asyncio.gather(
            storage.update_status(good[0], SagaStatus.RUNNING),
            storage.create_saga(taken, "order", {}),
            storage.update_status(good[1], SagaStatus.RUNNING),
            storage.update_status(missing, SagaStatus.RUNNING),
            storage.update_status(good[2], SagaStatus.RUNNING),
            storage.update_context(taken, {"price": float("nan")}),
            storage.update_status(good[3], SagaStatus.RUNNING),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes[1::2]] == [
            SagaAlreadyExistsError,
            SagaNotFoundError,
            InvalidSagaDataError,
        ]
        assert outcomes[::2] == [None] * 4
        for saga_id in good:
            assert (await storage.load_saga_state(saga_id))[0] is SagaStatus.RUNNING

    async def test_cancelled_caller_hurts_no_neighbour(self, storage: ISagaStorage) -> None:
        """A caller that is cancelled in the middle of its write takes no other write with it."""
        saga_id = await new_saga(storage)

        def log(step_name: str) -> Awaitable[None]:
            return storage.log_step(saga_id, step_name, "act", SagaStepStatus.STARTED)

        # Few, and once before: so that a pool has its connections, and none is cancelled while it connects.
        await asyncio.gather(*(log("before") for _ in range(4)))
        callers = [asyncio.ensure_future(log(f"step-{n}")) for n in range(4)]
        for doomed in callers[::2]:
            await asyncio.sleep(0)
            doomed.cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        assert outcomes[1::2] == [None, None]
        logged = Counter(entry.step_name for entry in await storage.get_step_history(saga_id))
        assert all(logged[f"step-{n}"] == 1 for n, outcome in enumerate(outcomes) if outcome is None)
        assert all(logged[f"step-{n}"] <= 1 for n in range(4))


class VersionRaceContract(Contract):
    """What versions promise to callers who don't wait for each other."""

    async def test_every_update_counts(self, storage: ICheckpointStorage) -> None:
        """N updates at once raise the version by N: none is lost."""
        saga_id = await new_saga(storage)
        await asyncio.gather(*(storage.update_context(saga_id, {"writer": n}) for n in range(_WRITERS)))
        assert (await storage.get_saga(saga_id)).version == 1 + _WRITERS

    async def test_every_checkpoint_gets_its_own_version(self, storage: ICheckpointStorage) -> None:
        """Each of N checkpoints at once returns another version, and the last one's context stays."""
        saga_id = await new_saga(storage)
        versions = await asyncio.gather(
            *(storage.save(Checkpoint(saga_id, context={"writer": n})) for n in range(_WRITERS))
        )
        assert sorted(versions) == list(range(2, _WRITERS + 2))
        saga = await storage.get_saga(saga_id)
        assert saga.context == {"writer": versions.index(_WRITERS + 1)}

    @pytest.mark.parametrize("method", ["update_context", "update_status", "save"])
    async def test_one_of_the_same_version_wins(self, storage: ICheckpointStorage, method: str) -> None:
        """Of several writers that expect the same version exactly one writes; the others learn the new version."""
        saga_id = await new_saga(storage)

        async def write(n: int) -> None:
            if method == "update_context":
                await storage.update_context(saga_id, {"writer": n}, expected_version=1)
            elif method == "update_status":
                await storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=1)
            else:
                step = LogStep(f"step-{n}", "act", SagaStepStatus.STARTED)
                await storage.save(Checkpoint(saga_id, context={"writer": n}, steps=[step], expected_version=1))

        outcomes = await asyncio.gather(*(write(n) for n in range(_WRITERS)), return_exceptions=True)
        lost = [outcome for outcome in outcomes if isinstance(outcome, SagaConcurrencyError)]
        assert len(lost) == _WRITERS - 1
        assert {(error.saga_id, error.expected, error.actual) for error in lost} == {(saga_id, 1, 2)}
        assert (await storage.get_saga(saga_id)).version == 2

    async def test_losers_leave_no_steps(self, storage: ICheckpointStorage) -> None:
        """Of several checkpoints that expect the same version only the winner's context and steps are there."""
        saga_id = await new_saga(storage)
        outcomes = await asyncio.gather(
            *(
                storage.save(
                    Checkpoint(
                        saga_id,
                        context={"writer": n},
                        steps=[LogStep(f"step-{n}", "act", SagaStepStatus.STARTED)],
                        expected_version=1,
                    )
                )
                for n in range(_WRITERS)
            ),
            return_exceptions=True,
        )
        winner = outcomes.index(2)
        assert (await storage.get_saga(saga_id)).context == {"writer": winner}
        assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == [f"step-{winner}"]

    async def test_checkpoints_dont_interleave(self, storage: ICheckpointStorage) -> None:
        """Steps of one checkpoint stand together in the history, whoever else writes meanwhile."""
        saga_id = await new_saga(storage)
        await asyncio.gather(
            *(
                storage.save(
                    Checkpoint(
                        saga_id,
                        status=SagaStatus.RUNNING,
                        steps=[LogStep(f"{n}", "act", SagaStepStatus.STARTED, f"{part}") for part in range(5)],
                    )
                )
                for n in range(_WRITERS)
            )
        )
        history = await storage.get_step_history(saga_id)
        runs = [(name, [entry.details for entry in run]) for name, run in itertools.groupby(history, _name)]
        assert sorted(runs) == sorted((f"{n}", list("01234")) for n in range(_WRITERS))

    async def test_optimistic_loop_ends(self, storage: ICheckpointStorage) -> None:
        """Callers that load, add one and write with the loaded version, again and again, lose no addition."""
        saga_id = await new_saga(storage, {"count": 0})

        async def add() -> None:
            while True:
                saga = await storage.get_saga(saga_id)
                try:
                    await storage.update_context(
                        saga_id, {"count": saga.context["count"] + 1}, expected_version=saga.version
                    )
                except SagaConcurrencyError:
                    continue
                return

        await asyncio.gather(*(add() for _ in range(_WRITERS)))
        saga = await storage.get_saga(saga_id)
        assert (saga.context, saga.version) == ({"count": _WRITERS}, 1 + _WRITERS)


def _name(entry: SagaLogEntry) -> str:
    return entry.step_name
