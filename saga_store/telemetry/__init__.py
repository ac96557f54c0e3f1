"""What a storage tells of its work while it works; for OpenTelemetry by ``opentelemetry``, extra ``otel``.

Figures of all sagas, for Prometheus, are ``prometheus``, extra ``ops``.
"""

from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable
from uuid import UUID

__all__ = ["Call", "End", "Resolution", "Telemetry"]

Resolution: TypeAlias = Literal["written", "refused", "unknown"]
"""What came of a write whose answer got lost: it is there, once; it was refused, and isn't; or nobody can tell."""
End: TypeAlias = Callable[[BaseException | None], None]
"""Told when a call ends, and the error that it ends with."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a storage, as its caller sees it.

    Attributes:
        operation: What is called, such as ``log_step``; a write of several things at once is ``save``.
        table: The table that it is mainly about.
        saga_id: The saga that it is about; None if that is none in particular. Nothing to count by.
        namespace: The database, and the schema if one was named: ``shop|sagas``; None if it isn't known beforehand.
        host: The server, and so ``port``; None likewise.
        port: Its port.
    """

    operation: str
    table: str
    saga_id: UUID | None = None
    namespace: str | None = None
    host: str | None = None
    port: int | None = None


@runtime_checkable
class Telemetry(Protocol):
    """What ``SqlAlchemySagaStorage(..., telemetry=)`` tells; called in the event loop, so each has to be quick.

    Whatever one of them raises is logged, and changes nothing of the storage's work.
    """

    def begin(self, call: Call) -> End:
        """Begin a call, in its caller's task and context; what is returned is called in the same."""

    def detach(self, context: Context) -> None:
        """Take out of a context what belongs to one caller's trace: several callers' writes are sent in it."""

    def flushed(self, rows: int, waited: Sequence[float]) -> None:
        """Tell that group commit sends a statement of so many rows, and for how many seconds writes in it have waited.

        One that is sent at once, since nothing is under way, hasn't waited.
        """

    def retried(self, error: Exception) -> None:
        """Tell that a statement failed in a way that may pass, and is sent again."""

    def resolved(self, resolution: Resolution) -> None:
        """Tell what came of a write, or a claim, whose answer got lost."""

    def waited_for_lock(self, seconds: float) -> None:
        """Tell how long a write has waited for another transaction's lock, outside the server."""
