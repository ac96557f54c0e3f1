"""Differential tests: schedules of any calls, on a storage and on its twin in memory, compared step by step."""

from saga_store.testing.differential.contract import (
    DifferentialContract,
    TransactionDifferentialContract,
    find_difference,
)
from saga_store.testing.differential.machine import Tally
from saga_store.testing.differential.world import Opener, TwinClock, Unit

__all__ = [
    "DifferentialContract",
    "Opener",
    "Tally",
    "TransactionDifferentialContract",
    "TwinClock",
    "Unit",
    "find_difference",
]
