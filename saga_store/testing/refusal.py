"""Subject: bad input is refused before anything is written, in the same way by every storage."""

from uuid import UUID, uuid4

import pytest

from saga_store.errors import InvalidSagaDataError, SagaNotFoundError
from saga_store.interface import ICheckpointStorage, ISagaStorage
from saga_store.model import SagaStatus, SagaStepStatus
from saga_store.testing.contract import Contract, new_saga, observe
from saga_store.testing.input import BAD_INPUTS, BadInput


def _by_method(*, checkpoints: bool) -> dict[str, list[BadInput]]:
    methods: dict[str, list[BadInput]] = {}
    for bad in BAD_INPUTS:
        if bad.checkpoints is checkpoints:
            methods.setdefault(bad.method, []).append(bad)
    return methods


_BAD = _by_method(checkpoints=False)
_BAD_CHECKPOINTS = _by_method(checkpoints=True)


class RefusalContract(Contract):
    """What the six methods do about bad input."""

    @pytest.mark.parametrize("method", _BAD)
    async def test_bad_input_is_refused(self, storage: ISagaStorage, method: str) -> None:
        """Bad input raises InvalidSagaDataError, which names the field, and nothing is written."""
        await _refuses(storage, _BAD[method])

    @pytest.mark.parametrize("method", _BAD)
    async def test_bad_input_comes_first(self, storage: ISagaStorage, method: str) -> None:
        """Bad input is InvalidSagaDataError even if the saga is missing, or the id of a new one taken."""
        await _refuses_first(storage, _BAD[method])


class CheckpointRefusalContract(Contract):
    """What a storage with checkpoints does about bad input."""

    @pytest.mark.parametrize("method", _BAD_CHECKPOINTS)
    async def test_bad_checkpoint_is_refused(self, storage: ICheckpointStorage, method: str) -> None:
        """Bad input raises InvalidSagaDataError, which names the field, and nothing of it is written."""
        await _refuses(storage, _BAD_CHECKPOINTS[method])

    @pytest.mark.parametrize("method", _BAD_CHECKPOINTS)
    async def test_bad_checkpoint_comes_first(self, storage: ICheckpointStorage, method: str) -> None:
        """Bad input is InvalidSagaDataError even if the saga is missing, or the id of a new one taken."""
        await _refuses_first(storage, _BAD_CHECKPOINTS[method])


async def _refuses(storage: ISagaStorage, bad_inputs: list[BadInput]) -> None:
    existing, absent = await new_saga(storage, {"total": 12}), uuid4()
    await storage.update_status(existing, SagaStatus.RUNNING)
    await storage.log_step(existing, "reserve", "act", SagaStepStatus.STARTED)
    before = await observe(storage, existing)
    for bad in bad_inputs:
        assert await _complaint(storage, bad, existing, absent) is None
        assert await observe(storage, existing) == before, f"{bad}: it changed the saga"
        with pytest.raises(SagaNotFoundError):
            await storage.load_saga_state(absent)


async def _refuses_first(storage: ISagaStorage, bad_inputs: list[BadInput]) -> None:
    existing, absent = await new_saga(storage), uuid4()
    for bad in bad_inputs:
        assert await _complaint(storage, bad, absent, existing) is None


async def _complaint(storage: ISagaStorage, bad: BadInput, saga_id: UUID, new_id: UUID) -> str | None:
    """Make the call, and tell what is wrong with how it was refused, if anything."""
    try:
        await bad.call(storage, saga_id, new_id)
    except InvalidSagaDataError as refusal:
        if refusal.field.startswith(bad.field) and refusal.reason:
            return None
        return f"{bad}: the error's field is {refusal.field!r}, not {bad.field!r}, or it has no reason"
    except Exception as other:  # noqa: BLE001 - whatever else is raised is what the test is after
        return f"{bad}: it raised {other!r}, not InvalidSagaDataError"
    return f"{bad}: it was accepted"
