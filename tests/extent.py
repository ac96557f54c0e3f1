"""How much is tested: `make test` samples what takes long, and CI does all, with SAGA_STORE_TEST_EXTENT=whole."""

import os
import random

WHOLE = os.environ.get("SAGA_STORE_TEST_EXTENT") == "whole"


def stride(longest: int) -> int:
    """Return how far it is to the next point that is tested: the very next, or up to ``longest``, drawn at random."""
    return 1 if WHOLE else random.randint(1, longest)  # noqa: S311 - of pytest-randomly's seed, so it can be repeated
