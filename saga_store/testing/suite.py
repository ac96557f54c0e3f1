"""The suites: which subjects a storage of each kind has to pass."""

from saga_store.testing.absence import AbsenceContract, CheckpointAbsenceContract
from saga_store.testing.checkpoint import CheckpointContract
from saga_store.testing.claim import ClaimContract
from saga_store.testing.concurrency import ConcurrencyContract, VersionRaceContract
from saga_store.testing.context import CopyContract, FidelityContract
from saga_store.testing.creation import CreationContract
from saga_store.testing.execution import ExecutionContract
from saga_store.testing.history import HistoryContract
from saga_store.testing.intervention import InDoubtContract, InterventionContract
from saga_store.testing.refusal import CheckpointRefusalContract, RefusalContract
from saga_store.testing.staleness import StalenessContract
from saga_store.testing.state import StateContract
from saga_store.testing.transaction import CheckpointIsolationContract, IsolationContract, LockContract
from saga_store.testing.version import VersionContract


class SagaStorageContract(
    CreationContract,
    StateContract,
    AbsenceContract,
    HistoryContract,
    FidelityContract,
    CopyContract,
    RefusalContract,
    ConcurrencyContract,
):
    """What every ``ISagaStorage`` promises. Override the fixture ``unit``."""


class CheckpointStorageContract(
    SagaStorageContract,
    ExecutionContract,
    VersionContract,
    CheckpointContract,
    CheckpointAbsenceContract,
    CheckpointRefusalContract,
    VersionRaceContract,
    StalenessContract,
):
    """What every ``ICheckpointStorage`` promises. Override the fixture ``unit``."""


class RecoveryStorageContract(ClaimContract, InDoubtContract, InterventionContract):
    """What every ``IRecoveryStorage`` promises on top. Override the fixtures ``unit`` and ``age``."""


class SagaTransactionContract(IsolationContract, LockContract):
    """What an ``ISagaStorage`` promises that joins a transaction of the caller's. Override ``transaction``."""


class TransactionContract(SagaTransactionContract, CheckpointIsolationContract):
    """What an ``ICheckpointStorage`` promises that joins a transaction of the caller's. Override ``transaction``."""
