"""Ids of writes: what they say about what a row may have forgotten."""

import subprocess
import sys
from uuid import uuid4

import pytest

from saga_store import SagaStatus
from saga_store.sqlalchemy.lost_answers import cannot_have_been_dropped
from saga_store.sqlalchemy.write_sql import KEPT
from saga_store.write import Lease, Write
from saga_store.write_ids import RANDOM_BITS, VERSION_MASK, leads_to, new_write_id
from tests.scene import step


def change(expected: int | None) -> Write:
    return Write(uuid4(), status=SagaStatus.RUNNING, expected_version=expected)


def ids_of(*versions: int) -> list[int]:
    """Return ids as a row keeps them, of writes that led to these versions."""
    return [(version & VERSION_MASK) << RANDOM_BITS | 7 for version in versions]


class TestWhoGetsOne:
    @pytest.mark.parametrize(
        ("write", "version"),
        [
            (change(1), 2),
            (Write(uuid4(), steps=(step("a"),), expected_version=3), 3),
            (Write(uuid4(), expected_version=3, lease=Lease()), 4),
            (Write(uuid4(), name="order", expected_version=0), 1),
            (change(2**31 - 2), 2**31 - 1),
            (change(-5), -4),
        ],
    )
    def test_it_begins_with_the_version_that_the_write_leads_to(self, write: Write, version: int) -> None:
        write_id = new_write_id(write)
        assert leads_to(write) == version
        assert write_id is not None
        assert write_id >> RANDOM_BITS == version & VERSION_MASK
        assert 0 <= write_id < 2**63
        assert new_write_id(write) != write_id

    @pytest.mark.parametrize("write", [change(None), Write(uuid4(), name="order", context="{}")])
    def test_what_expects_no_version_gets_none(self, write: Write) -> None:
        assert new_write_id(write) is None

    def test_a_forked_process_draws_others(self) -> None:
        """Also if the application seeds the generator that all share."""
        program = (
            "import os, random; from uuid import UUID; from saga_store.write import Write\n"
            "from saga_store.write_ids import new_write_id\n"
            "child = os.fork(); random.seed(1)\n"
            "write_id = new_write_id(Write(UUID(int=1), context='{}', expected_version=1))\n"
            "os.write(1, f'{write_id}\\n'.encode())\n"
            "child and os.waitpid(child, 0)\n"
        )
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert len(set(said.stdout.split())) == 2


class TestWhatMayHaveBeenDropped:
    """Ours expected version 9, and would lead to 10."""

    @pytest.mark.parametrize(
        ("recent", "found", "would_be_there"),
        [
            ([], 30, True),
            (ids_of(*range(24, 31)), 30, True),  # one is missing, so none has been dropped
            (ids_of(*range(9, 9 + KEPT)), 9 + KEPT, True),  # the first is older than ours
            (ids_of(*range(10, 10 + KEPT)), 10 + KEPT, False),
            (ids_of(*range(23, 23 + KEPT)), 23 + KEPT, False),
            (ids_of(9, *[40] * KEPT), 40, True),
        ],
    )
    def test_it_goes_by_the_oldest_that_is_kept(self, recent: list[int], found: int, *, would_be_there: bool) -> None:
        assert cannot_have_been_dropped(change(9), found, recent) is would_be_there

    def test_versions_whose_low_bits_have_begun_anew(self) -> None:
        """Only those bits are kept: what looks older is, and what looks younger may not be."""
        turn = VERSION_MASK + 1
        write, recent = change(turn), ids_of(*range(turn, turn + KEPT))
        assert cannot_have_been_dropped(write, turn + KEPT, recent)
        assert not cannot_have_been_dropped(write, turn + KEPT, ids_of(*range(turn + 1, turn + 1 + KEPT)))
        # One that is a whole turn older looks as if it were of today, which is the careful way to be wrong.
        assert not cannot_have_been_dropped(write, turn + KEPT, ids_of(1, *range(turn + 2, turn + 1 + KEPT)))
