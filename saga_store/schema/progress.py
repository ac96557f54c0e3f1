"""How far a long migration has got."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

_LOG = logging.getLogger("saga_store.migrations")
_INTERVAL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """So many rows of a piece of work are done; ``total`` is the planner's estimate, None if it has none."""

    what: str
    done: int = 0
    total: int | None = None
    finished: bool = False

    def advanced(self, rows: int) -> "Progress":
        return replace(self, done=self.done + rows)

    def ended(self) -> "Progress":
        return replace(self, finished=True)

    def __str__(self) -> str:
        if self.finished:
            return f"{self.what}: done"
        total = f" of about {self.total:,}" if self.total and self.total >= self.done else ""
        return f"{self.what}: {self.done:,}{total} rows"


Report = Callable[[Progress], None]


class LogReport:
    """Logs a line when a piece of work begins to take long, then at intervals, and one at its end."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._said = False

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= _INTERVAL_SECONDS or (progress.finished and self._said):
            _LOG.info("%s", progress)
            self._last, self._said = now, not progress.finished
