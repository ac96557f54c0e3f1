"""The contract kit: subclass a suite, override one fixture, and pytest tells whether a storage keeps the contract.

``SagaStorageContract`` is for any ``ISagaStorage``, ``CheckpointStorageContract`` for any ``ICheckpointStorage``,
``RecoveryStorageContract`` for what an ``IRecoveryStorage`` adds to it, ``HistoryStreamContract`` for what an
``IHistoryStorage`` does, ``StartContract``, ``RunContract`` and ``WaitContract`` for what an ``IRunStorage`` does,
``InspectionContract`` for what an ``IInspectionStorage`` does, ``HoldContract``,
``StubContract``, ``RetentionContract`` and ``RetentionRaceContract`` for what an ``IRetentionStorage`` does,
``TransactionContract`` for a storage that joins a transaction of the caller's. Needs the extra ``testing``.
"""

# ruff: noqa: E402 - the imports have to follow the registration

import pytest

# Before they are imported, or a failed assert of theirs wouldn't show the values that it compared.
pytest.register_assert_rewrite(
    *(
        f"{__name__}.{subject}"
        for subject in (
            "absence",
            "checkpoint",
            "claim",
            "commit_into",
            "concurrency",
            "context",
            "contract",
            "creation",
            "execution",
            "history",
            "history_stream",
            "inspection",
            "intervention",
            "lease",
            "refusal",
            "retention",
            "run",
            "staleness",
            "starting",
            "state",
            "transaction",
            "version",
            "waiting",
        )
    )
)

from saga_store.testing.absence import AbsenceContract, CheckpointAbsenceContract
from saga_store.testing.checkpoint import CheckpointContract
from saga_store.testing.claim import Age, AgingContract, ClaimContract
from saga_store.testing.commit_into import CommitIntoContract, Joinable, JoinableFor
from saga_store.testing.concurrency import ConcurrencyContract, VersionRaceContract
from saga_store.testing.context import CopyContract, FidelityContract
from saga_store.testing.contract import CheckpointUnit, Contract, Together, Unit
from saga_store.testing.creation import CreationContract
from saga_store.testing.execution import ExecutionContract
from saga_store.testing.history import HistoryContract
from saga_store.testing.history_stream import HistoryStreamContract, HistoryUnit
from saga_store.testing.input import BAD_INPUTS, BadInput
from saga_store.testing.inspection import InspectionContract, SettlementRaceContract
from saga_store.testing.intervention import InDoubtContract, InterventionContract
from saga_store.testing.lease import LeaseContract, LeaseRaceContract
from saga_store.testing.refusal import CheckpointRefusalContract, RefusalContract
from saga_store.testing.retention import HoldContract, RetentionContract, RetentionRaceContract, StubContract
from saga_store.testing.run import RunContract, RunRaceContract, RunUnit
from saga_store.testing.staleness import StalenessContract
from saga_store.testing.starting import StartContract
from saga_store.testing.state import StateContract
from saga_store.testing.suite import (
    CheckpointStorageContract,
    RecoveryStorageContract,
    SagaStorageContract,
    SagaTransactionContract,
    TransactionContract,
)
from saga_store.testing.transaction import (
    CheckpointIsolationContract,
    IsolationContract,
    LockContract,
    Transaction,
    TransactionalContract,
    Transactions,
)
from saga_store.testing.version import VersionContract
from saga_store.testing.waiting import JoinedWaitContract, WaitContract

__all__ = [
    "BAD_INPUTS",
    "AbsenceContract",
    "Age",
    "AgingContract",
    "BadInput",
    "CheckpointAbsenceContract",
    "CheckpointContract",
    "CheckpointIsolationContract",
    "CheckpointRefusalContract",
    "CheckpointStorageContract",
    "CheckpointUnit",
    "ClaimContract",
    "CommitIntoContract",
    "ConcurrencyContract",
    "Contract",
    "CopyContract",
    "CreationContract",
    "ExecutionContract",
    "FidelityContract",
    "HistoryContract",
    "HistoryStreamContract",
    "HistoryUnit",
    "HoldContract",
    "InDoubtContract",
    "InspectionContract",
    "InterventionContract",
    "IsolationContract",
    "Joinable",
    "JoinableFor",
    "JoinedWaitContract",
    "LeaseContract",
    "LeaseRaceContract",
    "LockContract",
    "RecoveryStorageContract",
    "RefusalContract",
    "RetentionContract",
    "RetentionRaceContract",
    "RunContract",
    "RunRaceContract",
    "RunUnit",
    "SagaStorageContract",
    "SagaTransactionContract",
    "SettlementRaceContract",
    "StalenessContract",
    "StartContract",
    "StateContract",
    "StubContract",
    "Together",
    "Transaction",
    "TransactionContract",
    "TransactionalContract",
    "Transactions",
    "Unit",
    "VersionContract",
    "VersionRaceContract",
    "WaitContract",
]
