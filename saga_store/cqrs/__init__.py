"""Any storage of this package as the saga storage of python-cqrs 5: its types and exceptions in and out."""

try:
    import cqrs.saga as _needed  # noqa: F401 - whether it is there
except ImportError as _exc:
    raise ImportError("saga_store.cqrs needs python-cqrs 5: pip install saga-store[cqrs]") from _exc

from saga_store.cqrs.recovery import recovery_handler
from saga_store.cqrs.storage import CqrsSagaStorage

__all__ = ["CqrsSagaStorage", "recovery_handler"]
