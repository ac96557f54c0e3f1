"""Ids of writes, kept in the row, which tell whether a write whose answer got lost is there.

An id is a ``bigint``: the low bits of the version that the write leads to, then random bits. Each row keeps those of
its last writes in the order in which they were written, so their versions never fall, and what has been dropped had
no higher version than the first that is kept. docs/ambiguous_commits.md has the argument.
"""

import os
import random
from collections.abc import Sequence

from saga_store.write import Write

# So many bits that two writes which lead to one version of a saga never draw the same; with those of the version 63.
RANDOM_BITS = 48
VERSION_MASK = 0x7FFF

# How many ids a row keeps; a write that raises the version drops older ones.
KEPT = 8
# Writes that don't raise it may not drop each other's ids: nothing else keeps them from being written twice.
KEPT_OF_ONE_VERSION = 32

# One of our own, seeded by the operating system: an application may seed `random` alike in all its processes. Asking
# the operating system each time would cost ten times as much.
_chance = random.Random()  # noqa: S311 - not a secret
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_chance.seed)  # or a child would draw what its parent draws


def leads_to(write: Write) -> int:
    """Return the version at which the saga is once the write is there; one that creates it expects version 0."""
    return (write.expected_version or 0) + (1 if write.creates or write.changes_row else 0)


def new_write_id(write: Write) -> int | None:
    """Return an id for a write that expects a version; None for one that may be repeated anyway, or may not."""
    if write.expected_version is None or not (write.creates or write.changes_row or write.steps):
        return None
    return (leads_to(write) & VERSION_MASK) << RANDOM_BITS | _chance.getrandbits(RANDOM_BITS)


def cannot_have_been_dropped(write: Write, found: int, recent: Sequence[int]) -> bool:
    """Whether the write's id would still be among the recent ones of its saga, now at version ``found``."""
    if len(recent) < KEPT:
        return True
    # At least so old, for of its version only the low bits are known.
    age = (found - (recent[0] >> RANDOM_BITS)) & VERSION_MASK
    return found - age < leads_to(write)
