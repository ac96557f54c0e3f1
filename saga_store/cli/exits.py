"""What the exit codes mean."""

from collections.abc import Iterable
from enum import IntEnum
from typing import Self


class Exit(IntEnum):
    """The exit codes of ``saga-store``; pipelines rely on them."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> Self:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "done, or nothing to do"
    FAILED = 1, "failed; the message says why"
    USAGE = 2, "wrong usage"
    BEHIND = 3, "check: the database is behind this release"
    AHEAD = 4, "check: the database is at a revision that this release doesn't know"
    DRIFTED = 5, "check: the tables differ from what their revision makes; grants --check: the privileges differ"
    LOCKED = 6, "a lock wasn't to be had in time; nothing is half done, try again"
    ATTENTION = 7, "saga stuck: some are"
    REFUSED = 8, "refused, or changed since the plan; nothing was written"
    PARTLY = 9, "partly done, or without shards that are down; the results say what"
    INTERRUPTED = 130, "interrupted"


# The later, the worse.
_SEVERITY = (
    *(Exit.DONE, Exit.ATTENTION, Exit.AHEAD, Exit.BEHIND, Exit.DRIFTED, Exit.PARTLY, Exit.REFUSED),
    *(Exit.LOCKED, Exit.USAGE, Exit.FAILED, Exit.INTERRUPTED),
)


def worst_of(codes: Iterable[Exit]) -> Exit:
    return max(codes, key=_SEVERITY.index)
