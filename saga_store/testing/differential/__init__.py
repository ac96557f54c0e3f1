"""Differential tests: schedules of any calls, on a storage and on its twin in memory, compared step by step."""

from saga_store.testing.differential.contract import (
    DifferentialContract,
    TransactionDifferentialContract,
    find_difference,
)
from saga_store.testing.differential.machine import Tally

__all__ = ["DifferentialContract", "Tally", "TransactionDifferentialContract", "find_difference"]
