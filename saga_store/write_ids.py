"""Ids of writes, by which one whose answer got lost is recognised when it is sent again.

An id is a ``bigint``: the low bits of the version that the write leads to, then random bits. A write keeps its id for
as long as it is tried, whoever tries it. docs/ambiguous_commits.md has the argument.
"""

import os
import random

from saga_store.write import Write

# So many bits that two writes which lead to one version of a saga never draw the same; with those of the version 63.
RANDOM_BITS = 48
VERSION_MASK = 0x7FFF

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


def identified(write: Write) -> Write:
    """Return the write with an id, if it is of a kind that has one; it keeps the one that it has already."""
    if write.write_id is not None or write.expected_version is None:
        return write
    return write._replace(write_id=new_write_id(write))
