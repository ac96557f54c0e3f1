"""Telemetries for tests: one that keeps what it is told, and one of which nothing works."""

from collections.abc import Sequence
from contextvars import Context

from saga_store.telemetry import Call, End, Resolution


class Recording:
    """A telemetry that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Call, BaseException | None]] = []
        self.flushes: list[tuple[int, Sequence[float]]] = []
        self.retries: list[Exception] = []
        self.resolutions: list[Resolution] = []
        self.lock_waits: list[float] = []

    def begin(self, call: Call) -> End:
        return lambda error: self.calls.append((call, error))

    def detach(self, context: Context) -> None:
        pass

    def flushed(self, rows: int, waited: Sequence[float]) -> None:
        self.flushes.append((rows, waited))

    def retried(self, error: Exception) -> None:
        self.retries.append(error)

    def resolved(self, resolution: Resolution) -> None:
        self.resolutions.append(resolution)

    def waited_for_lock(self, seconds: float) -> None:
        self.lock_waits.append(seconds)

    @property
    def operations(self) -> list[str]:
        return [call.operation for call, _ in self.calls]


class Failing:
    """A telemetry of which nothing works; of calls it fails to note the beginning, or the end."""

    def __init__(self, *, begins: bool = True) -> None:
        self._begins = begins

    def begin(self, call: Call) -> End:
        if not self._begins:
            raise _gone(call)
        return self._end

    def _end(self, error: BaseException | None) -> None:
        raise _gone(error)

    def detach(self, context: Context) -> None:
        raise _gone(context)

    def flushed(self, rows: int, waited: Sequence[float]) -> None:
        raise _gone(rows, waited)

    def retried(self, error: Exception) -> None:
        raise _gone(error)

    def resolved(self, resolution: Resolution) -> None:
        raise _gone(resolution)

    def waited_for_lock(self, seconds: float) -> None:
        raise _gone(seconds)


def _gone(*facts: object) -> RuntimeError:
    return RuntimeError("the exporter is gone", *facts)
