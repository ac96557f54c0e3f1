"""A batch of writes of every kind: each has the outcome, and leaves behind, what it would have alone."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.memory import MemorySagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from tests.scene import NEVER, PATIENT, step

FAILED = LogStep('"b", {c}', "compensate", SagaStepStatus.FAILED, "NULL")


def checkpoints() -> list[Checkpoint]:
    """Return one for each saga: good ones of every kind, and of each kind one that is refused. Sagas are at 1."""
    made = [
        {"name": "order", "context": {"n": 1}},
        {"name": "order", "status": SagaStatus.RUNNING, "steps": [step("1"), FAILED]},
        {"name": "refused: it is there"},
        {"context": {"é": ['"', None]}},
        {"status": SagaStatus.COMPLETED},
        {"status": SagaStatus.RUNNING, "context": {}, "recovery_attempts": 0},
        {"context": {"n": 2}, "steps": [step("1"), FAILED, step("3")]},
        {"context": {"n": 3}, "steps": [step("1")], "expected_version": 1},
        {"context": {"n": 4}, "steps": [step("refused: stale")], "expected_version": 7},
        {"status": SagaStatus.FAILED, "steps": [step("refused: it isn't there")]},
        {"steps": [step("1")]},
        {"steps": [FAILED]},
        {"steps": [step("1"), FAILED, step("3")]},
        {"steps": [step("1")], "expected_version": 1},
        {"steps": [step("1"), step("2")], "expected_version": 1},
        {"steps": [step("refused: stale")], "expected_version": 2},
        {"steps": [step("refused: it isn't there")]},
        {"steps": [step("refused"), step("it isn't there")]},
    ]
    return [Checkpoint(uuid4(), **parts) for parts in made]  # type: ignore[arg-type]


def is_there(checkpoint: Checkpoint) -> bool:
    """Whether the saga is there before."""
    about = str((checkpoint.name, checkpoint.steps))
    return "isn't there" not in about and (checkpoint.name is None or "it is there" in about)


async def outcomes(storage: SagaStorage, batch: list[Checkpoint]) -> list[object]:
    """Return what came of each, and what is there afterwards."""
    for checkpoint in batch:
        if is_there(checkpoint):
            await storage.create_saga(checkpoint.saga_id, "order", {"n": 0})
    others = [storage.create_saga(uuid4(), "order", {}) for _ in range(2)]
    came = await asyncio.gather(*others, *map(storage.save, batch), return_exceptions=True)
    found: list[object] = []
    for checkpoint, outcome in zip(batch, came[len(others) :], strict=True):
        reads = storage.get_saga(checkpoint.saga_id), storage.get_step_history(checkpoint.saga_id)
        found.append(tuple(map(told, (outcome, *await asyncio.gather(*reads, return_exceptions=True)))))
    return found


def told(what: object) -> object:
    """Return what doesn't depend on clocks and sequences."""
    if isinstance(what, BaseException):
        return type(what), str(what)
    if isinstance(what, list):
        return [(entry.step_name, entry.action, entry.status, entry.details) for entry in what]
    if isinstance(what, int):
        return what
    return [getattr(what, name) for name in ("name", "status", "context", "version", "recovery_attempts")]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("retry_for", [NEVER, PATIENT], ids=["resolves nothing", "resolves"])
async def test_every_kind_at_once(make_engine: Callable[..., AsyncEngine], driver: str, retry_for: timedelta) -> None:
    batch = checkpoints()
    assert sum(map(is_there, batch)) == 13

    got = await outcomes(SqlAlchemySagaStorage(make_engine(driver), retry_for=retry_for), batch)

    expected = await outcomes(MemorySagaStorage(), batch)
    for checkpoint, one, other in zip(batch, got, expected, strict=True):
        assert one == other, checkpoint
    assert sum(isinstance(outcome[0], tuple) for outcome in expected) == 6  # type: ignore[index]
