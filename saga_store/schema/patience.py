"""How long a migration waits for others, and how it spends that time."""

import asyncio
import random
import time
from datetime import timedelta

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from saga_store.sqlalchemy.failures import sqlstate

# A lock wasn't to be had in time; a deadlock. The statement has been undone, and may well succeed next time.
_RETRIABLE_CODES = {"55P03", "40P01"}
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0


class Patience:
    """A wait of bounded length, in pauses that grow and have jitter; progress renews it."""

    def __init__(self, connection: Connection, wait: timedelta) -> None:
        self.wait = wait
        self._is_async = connection.dialect.is_async
        self.renew()

    def renew(self) -> None:
        self._deadline = time.monotonic() + self.wait.total_seconds()
        self._pause = _FIRST_PAUSE_SECONDS

    def pause(self) -> bool:
        """Sleep for a moment; False, and at once, if the time is up."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            return False
        seconds = min(left, self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        if self._is_async:
            await_only(asyncio.sleep(seconds))  # other tasks of the caller's loop go on
        else:
            time.sleep(seconds)
        return True

    def pause_after(self, exc: DBAPIError) -> bool:
        """Do so if what failed is worth trying again; otherwise False."""
        return is_refused_lock(exc) and self.pause()


def is_refused_lock(exc: DBAPIError) -> bool:
    """Whether a lock wasn't to be had, so that somebody else holds it."""
    return sqlstate(exc) in _RETRIABLE_CODES
