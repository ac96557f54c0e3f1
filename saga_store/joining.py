"""What becomes of a write that a run made in a transaction of the caller's: what was heard of it, if anything was."""

from dataclasses import dataclass
from enum import Enum, auto


class Fate(Enum):
    """What was heard of a transaction, or of a savepoint in it."""

    OPEN = auto()
    COMMITTING = auto()
    """COMMIT was sent, and nothing is known to have gone wrong; only the row can tell."""
    UNKNOWN = auto()
    """COMMIT was sent, and it or its answer failed; only the row can tell."""
    COMMITTED = auto()
    ROLLED_BACK = auto()
    """It never was committed, nor ever will be."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Part:
    """A part of a transaction: all that is written from here on until it, or a savepoint around it, comes to an end.

    Whoever follows the transaction changes its fate; a run only looks at it.

    Attributes:
        where: The connection or session whose transaction it is, to be compared by identity.
        fate: What was heard last.
    """

    where: object
    fate: Fate = Fate.OPEN

    @property
    def is_open(self) -> bool:
        return self.fate is Fate.OPEN

    @property
    def is_expected_to_stay(self) -> bool:
        """Whether what was written is there, as far as anybody has heard."""
        return self.fate in {Fate.OPEN, Fate.COMMITTING, Fate.COMMITTED}
