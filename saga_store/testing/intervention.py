"""Subject: what a person looks for and does when sagas are stuck."""

import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from saga_store.errors import InvalidSagaDataError, SagaConcurrencyError, SagaNotFoundError
from saga_store.interface import IRecoveryStorage
from saga_store.model import Checkpoint, LogStep, SagaStatus, SagaStepStatus, StepAction
from saga_store.testing.contract import Contract, new_saga, observe

_STARTED = SagaStepStatus.STARTED
_VERBS = ("give_up_saga", "reset_recovery_attempts", "break_lease")
_WHO: dict[str, Any] = {"by": "alice", "reason": 'the card was stolen; see ticket 7 \N{EM DASH} "urgent"'}


class InDoubtContract(Contract):
    """What ``get_in_doubt_steps`` promises."""

    @pytest.mark.parametrize("end", [status for status in SagaStepStatus if status is not _STARTED])
    async def test_a_step_is_in_doubt_until_it_ends(self, storage: IRecoveryStorage, end: SagaStepStatus) -> None:
        """A step that has STARTED is in doubt until any other status of it is logged."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "pay", "act", _STARTED, "with card")
        assert await storage.get_in_doubt_steps(saga_id) == await storage.get_step_history(saga_id)
        await storage.log_step(saga_id, "pay", "act", end)
        assert await storage.get_in_doubt_steps(saga_id) == []

    async def test_other_steps_and_actions_settle_nothing(self, storage: IRecoveryStorage) -> None:
        """Neither another step's end, nor the end of undoing this one, nor an earlier end settles a doubt."""
        saga_id = await new_saga(storage)
        entries: list[tuple[str, StepAction, SagaStepStatus]] = [
            ("pay", "act", _STARTED),
            ("pay", "act", SagaStepStatus.FAILED),
            ("pay", "act", _STARTED),
            ("ship", "act", _STARTED),
            ("ship", "act", SagaStepStatus.COMPLETED),
            ("ship", "compensate", _STARTED),
            ("pay", "compensate", SagaStepStatus.COMPENSATED),
            ("Pay", "act", SagaStepStatus.COMPLETED),
        ]
        for step, action, status in entries:
            await storage.log_step(saga_id, step, action, status)
        history = await storage.get_step_history(saga_id)
        assert await storage.get_in_doubt_steps(saga_id) == [history[2], history[5]]

    async def test_every_start_counts(self, storage: IRecoveryStorage) -> None:
        """A step that was started twice and never ended is in doubt twice; one end settles both."""
        saga_id, other = await new_saga(storage), await new_saga(storage)
        for _ in range(2):
            await storage.log_step(saga_id, "pay", "act", _STARTED)
        await storage.log_step(other, "pay", "act", SagaStepStatus.COMPLETED)
        assert len(await storage.get_in_doubt_steps(saga_id)) == 2
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.COMPLETED)
        assert await storage.get_in_doubt_steps(saga_id) == []

    async def test_doubts_of_nothing(self, storage: IRecoveryStorage) -> None:
        """A saga without history has no doubts; a missing one is an error, and so is an id that is none."""
        assert await storage.get_in_doubt_steps(await new_saga(storage)) == []
        with pytest.raises(SagaNotFoundError):
            await storage.get_in_doubt_steps(uuid4())
        with pytest.raises(InvalidSagaDataError):
            await storage.get_in_doubt_steps("no id")  # type: ignore[arg-type] # that is the point


class InterventionContract(Contract):
    """What ``give_up_saga``, ``reset_recovery_attempts`` and ``break_lease`` promise."""

    async def test_giving_up(self, storage: IRecoveryStorage) -> None:
        """A saga that is given up is FAILED, under no lease, and whoever works on it is refused."""
        saga_id, version = await _leased(storage)
        await storage.give_up_saga(saga_id, **_WHO)
        saga = await storage.get_saga(saga_id)
        assert (saga.status, saga.lease_owner, saga.version) == (SagaStatus.FAILED, None, version + 1)
        with pytest.raises(SagaConcurrencyError):
            await storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=version)

    async def test_resetting_attempts(self, storage: IRecoveryStorage) -> None:
        """An exhausted saga whose attempts are reset can be claimed again."""
        saga_id, name = uuid4(), f"order-{uuid4()}"
        await storage.save(Checkpoint(saga_id, name=name, status=SagaStatus.RUNNING, recovery_attempts=5))
        await storage.reset_recovery_attempts(saga_id, **_WHO)
        assert (await storage.get_saga(saga_id)).recovery_attempts == 0
        [claimed] = await storage.claim_sagas(
            owner="worker-1", lease=timedelta(hours=1), limit=1, stale_after=timedelta(0), name=name
        )
        assert (claimed.id, claimed.status) == (saga_id, SagaStatus.RUNNING)

    async def test_breaking_a_lease(self, storage: IRecoveryStorage) -> None:
        """A saga whose lease is broken is nobody's; its holder is refused; status and attempts stay."""
        saga_id, version = await _leased(storage)
        await storage.break_lease(saga_id, **_WHO)
        saga = await storage.get_saga(saga_id)
        assert (saga.lease_owner, saga.lease_expires_at, saga.version) == (None, None, version + 1)
        assert (saga.status, saga.recovery_attempts) == (SagaStatus.RUNNING, 1)
        with pytest.raises(SagaConcurrencyError):
            await storage.update_status(saga_id, SagaStatus.COMPLETED, expected_version=version)

    @pytest.mark.parametrize("verb", _VERBS)
    async def test_interventions_are_recorded(self, storage: IRecoveryStorage, verb: str) -> None:
        """The history gets one entry that says who did what and why, and what was there before."""
        saga_id, _ = await _leased(storage)
        await getattr(storage, verb)(saga_id, **_WHO)
        [entry] = await storage.get_step_history(saga_id)
        assert (entry.step_name, entry.status) == (f"saga_store.{verb}", SagaStepStatus.COMPLETED)
        before = {"status": "RUNNING", "recovery_attempts": 1, "lease_owner": "worker-1"}
        assert json.loads(entry.details or "") == _WHO | before
        assert await storage.get_in_doubt_steps(saga_id) == []

    @pytest.mark.parametrize("verb", _VERBS)
    async def test_what_makes_no_sense_is_refused(self, storage: IRecoveryStorage, verb: str) -> None:
        """A finished saga isn't given up, nor are its attempts reset; a lease that isn't there isn't broken."""
        for status in (SagaStatus.COMPLETED, SagaStatus.FAILED):
            saga_id = uuid4()
            await storage.save(
                Checkpoint(saga_id, name="order", status=status, steps=[LogStep("pay", "act", _STARTED)])
            )
            before = await observe(storage, saga_id)
            with pytest.raises(InvalidSagaDataError) as refusal:
                await getattr(storage, verb)(saga_id, **_WHO)
            assert refusal.value.field == "saga_id"
            assert await observe(storage, saga_id) == before

    @pytest.mark.parametrize("verb", _VERBS)
    async def test_a_changed_saga_is_left_alone(self, storage: IRecoveryStorage, verb: str) -> None:
        """At another version than the expected one nothing happens; at that version it does."""
        saga_id, version = await _leased(storage)
        before = await observe(storage, saga_id)
        for expected in (version - 1, version + 1):
            with pytest.raises(SagaConcurrencyError) as refusal:
                await getattr(storage, verb)(saga_id, **_WHO, expected_version=expected)
            assert (refusal.value.expected, refusal.value.actual) == (expected, version)
        for impossible in ("1", True):
            with pytest.raises(InvalidSagaDataError) as refused:
                await getattr(storage, verb)(saga_id, **_WHO, expected_version=impossible)
            assert refused.value.field == "expected_version"
        assert await observe(storage, saga_id) == before
        await getattr(storage, verb)(saga_id, **_WHO, expected_version=version)
        assert (await storage.get_saga(saga_id)).version == version + 1

    @pytest.mark.parametrize("verb", _VERBS)
    async def test_anonymous_interventions_are_refused(self, storage: IRecoveryStorage, verb: str) -> None:
        """Who and why have to be told, and nothing happens otherwise; nor does it to a missing saga."""
        saga_id, version = await _leased(storage)
        for field, value in (("by", ""), ("by", None), ("reason", ""), ("reason", "\0"), ("reason", 7)):
            with pytest.raises(InvalidSagaDataError) as refusal:
                await getattr(storage, verb)(saga_id, **(_WHO | {field: value}))
            assert refusal.value.field == field
        with pytest.raises(SagaNotFoundError):
            await getattr(storage, verb)(uuid4(), **_WHO)
        assert (await storage.get_saga(saga_id)).version == version
        assert await storage.get_step_history(saga_id) == []


async def _leased(storage: IRecoveryStorage) -> tuple[UUID, int]:
    """Make a RUNNING saga that worker-1 has claimed; return its id and version."""
    saga_id, name = uuid4(), f"order-{uuid4()}"
    await storage.save(Checkpoint(saga_id, name=name, status=SagaStatus.RUNNING))
    [saga] = await storage.claim_sagas(
        owner="worker-1", lease=timedelta(hours=1), limit=1, stale_after=timedelta(0), name=name
    )
    return saga_id, saga.version
