"""The contract kit as a stranger meets it: in a project of their own, with whatever settings, and when it fails."""

import asyncio
import inspect
import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

import saga_store
from saga_store.testing import (
    CheckpointStorageContract,
    CommitIntoContract,
    Contract,
    HistoryStreamContract,
    JoinedWaitContract,
    LeaseContract,
    LeaseRaceContract,
    RecoveryStorageContract,
    RunContract,
    RunRaceContract,
    StartContract,
    TransactionContract,
    WaitContract,
)

STORAGE = """\
import contextlib

import pytest

from saga_store import ISagaStorage, MemorySagaStorage, SagaStatus
from saga_store.testing import CreationContract, SagaStorageContract


class SixMethods(ISagaStorage):
    def __init__(self):
        self._storage = MemorySagaStorage()

    async def create_saga(self, saga_id, name, context):
        await self._storage.create_saga(saga_id, name, context)

    async def update_context(self, saga_id, context):
        await self._storage.update_context(saga_id, context)

    async def update_status(self, saga_id, status):
        await self._storage.update_status(saga_id, status)

    async def log_step(self, saga_id, step_name, action, status, details=None):
        await self._storage.log_step(saga_id, step_name, action, status, details)

    async def load_saga_state(self, saga_id):
        return await self._storage.load_saga_state(saga_id)

    async def get_step_history(self, saga_id):
        return await self._storage.get_step_history(saga_id)
"""

PASSING = """\
class TestSixMethods(SagaStorageContract):
    @pytest.fixture
    def unit(self):
        storage = SixMethods()
        return lambda: contextlib.nullcontext(storage)
"""

BROKEN = """\
class RunsAtOnce(SixMethods):
    async def load_saga_state(self, saga_id):
        status, context = await super().load_saga_state(saga_id)
        return SagaStatus.RUNNING, context


class TestRunsAtOnce(CreationContract):
    @pytest.fixture
    def unit(self):
        storage = RunsAtOnce()
        return lambda: contextlib.nullcontext(storage)
"""

FORGETFUL = """\
class TestForgetful(CreationContract):
    pass
"""


class Hangs(Contract):
    patience = timedelta(milliseconds=1)

    async def test_that_hangs(self) -> None:
        await asyncio.Event().wait()

    async def test_with_its_own_timeout(self) -> None:
        raise TimeoutError


class WholeKit(
    TransactionContract,
    CheckpointStorageContract,
    RecoveryStorageContract,
    HistoryStreamContract,
    RunContract,
    StartContract,
    WaitContract,
    JoinedWaitContract,
    RunRaceContract,
    CommitIntoContract,
    LeaseContract,
    LeaseRaceContract,
):
    pass


def run(folder: Path, test: str, *, asyncio_mode: str = "strict") -> subprocess.CompletedProcess[str]:
    """Run pytest in a project that consists of this test."""
    settings = f"asyncio_mode = {asyncio_mode}\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    (folder / "pytest.ini").write_text(f"[pytest]\n{settings}")
    (folder / "test_storage.py").write_text(f"{STORAGE}\n\n{test}")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(saga_store.__file__).parents[1])},
        check=False,  # the test looks at the outcome
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("asyncio_mode", ["strict", "auto"])
def test_runs_in_any_asyncio_mode(tmp_path: Path, asyncio_mode: str) -> None:
    """A storage with just the six methods passes in a project with either mode of pytest-asyncio."""
    outcome = run(tmp_path, PASSING, asyncio_mode=asyncio_mode)
    assert outcome.returncode == 0, outcome.stdout
    assert " passed" in outcome.stdout
    assert "skipped" not in outcome.stdout


def test_failures_show_their_values(tmp_path: Path) -> None:
    """A failed assert of the kit shows what it compared, as one in the user's own file would."""
    outcome = run(tmp_path, BROKEN)
    assert outcome.returncode == 1
    assert "assert <SagaStatus.RUNNING: 'RUNNING'> is <SagaStatus.PENDING: 'PENDING'>" in outcome.stdout


def test_forgotten_fixture_says_what_to_do(tmp_path: Path) -> None:
    """A suite without its fixture says which one to override, and how."""
    outcome = run(tmp_path, FORGETFUL)
    assert outcome.returncode == 1
    assert "TestForgetful has to override the fixture `unit`" in outcome.stdout


async def test_hang_is_a_failure() -> None:
    """A test that hangs fails after a while, and says so."""
    with pytest.raises(AssertionError, match=r"hung for 0\.001 s"):
        await Hangs().test_that_hangs()


async def test_timeout_of_the_storage_is_no_hang() -> None:
    """A TimeoutError that the storage raises is told as it is."""
    with pytest.raises(TimeoutError):
        await Hangs().test_with_its_own_timeout()


def test_no_subject_hides_another() -> None:
    """No two subjects have a test of the same name, for in a suite only one of them would run."""
    names = Counter(name for subject in WholeKit.__mro__ for name in vars(subject) if name.startswith("test"))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_test_states_its_contract() -> None:
    """Each test's docstring is a sentence."""
    tests = inspect.getmembers(WholeKit, lambda member: getattr(member, "__name__", "").startswith("test"))
    assert len(tests) > 100
    assert [name for name, test in tests if not (test.__doc__ or "").strip().endswith(".")] == []
