"""When to try again: after growing, random pauses, until the time is up."""

import asyncio
import random
import time

_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.5


class Retries:
    """The pauses of one call; its time begins when something fails for the first time."""

    __slots__ = ("_deadline", "_pause", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self._pause = _FIRST_PAUSE_SECONDS

    async def pause(self) -> bool:
        """Wait a little before the next attempt; False, at once, if there is no time for one."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._seconds
        left = self._deadline - now
        if left <= 0:
            return False
        # Random, lest those who failed together come back together.
        await asyncio.sleep(min(random.uniform(0, self._pause), left))  # noqa: S311 - jitter, not a secret
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        return True
