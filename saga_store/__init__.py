"""Durable saga state and history in PostgreSQL.

This module is the facade: the contract, its values and errors, and the in-memory storage. It loads neither
SQLAlchemy nor a driver; the PostgreSQL storage is ``saga_store.sqlalchemy.SqlAlchemySagaStorage``.
"""

from pathlib import Path as _Path

from saga_store.errors import (
    ArchiverBusyError,
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaArchivedError,
    SagaConcurrencyError,
    SagaLeasedError,
    SagaNotFoundError,
    SagaStoreError,
    SagaTimeoutError,
    SagaUnreadableError,
    SchemaError,
    ShardingError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.interface import (
    ICheckpointStorage,
    IHistoryStorage,
    IInspectionStorage,
    IRecoveryStorage,
    IRetentionStorage,
    ISagaStorage,
)
from saga_store.memory import MemoryDatabase, MemorySagaStorage, MemorySession
from saga_store.model import (
    Checkpoint,
    Context,
    LogStep,
    SagaExecution,
    SagaLogEntry,
    SagaStart,
    SagaStatus,
    SagaStepStatus,
    StepAction,
)
from saga_store.run import SagaRun
from saga_store.run_interface import IRunStorage, ISagaRun
from saga_store.storage import SagaStorage

__all__ = [
    "ArchiverBusyError",
    "Checkpoint",
    "Context",
    "ICheckpointStorage",
    "IHistoryStorage",
    "IInspectionStorage",
    "IRecoveryStorage",
    "IRetentionStorage",
    "IRunStorage",
    "ISagaRun",
    "ISagaStorage",
    "InvalidSagaDataError",
    "LogStep",
    "MemoryDatabase",
    "MemorySagaStorage",
    "MemorySession",
    "SagaAlreadyExistsError",
    "SagaArchivedError",
    "SagaConcurrencyError",
    "SagaExecution",
    "SagaLeasedError",
    "SagaLogEntry",
    "SagaNotFoundError",
    "SagaRun",
    "SagaStart",
    "SagaStatus",
    "SagaStepStatus",
    "SagaStorage",
    "SagaStoreError",
    "SagaTimeoutError",
    "SagaUnreadableError",
    "SchemaError",
    "ShardingError",
    "StepAction",
    "StorageUnavailableError",
    "UnknownOutcomeError",
]

# In a checkout the migrations stand beside this package, which is found there first: by alembic, and by python -m. The
# file's name is proof enough that they are these.
_checkout = _Path(__path__[0]).parent
if (_checkout / "migrations" / "versions" / "saga_store_0001.py").is_file():
    __path__.append(str(_checkout))
