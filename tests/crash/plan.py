"""What a run of the crash test consists of."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 120


class CrashTestError(RuntimeError):
    """The test itself can't go on, or nobody gets a write through any more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run consists of.

    Attributes:
        seed: Chooses the faults and what the clients write.
        faults: How many.
        clients: Processes.
        tasks: Of each client, which write at once.
        writes: At least and at most so many writes get through between two faults.
        folder: Where the servers' data and the journals are put, for the time of the run; None: among temporary files.
        shards: How many servers the sagas are spread over; with one, its storage isn't sharded.
    """

    seed: str
    faults: int
    clients: int = 4
    tasks: int = 8
    writes: tuple[int, int] = (5, 150)
    folder: Path | None = None
    shards: int = 1
