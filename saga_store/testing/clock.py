"""A clock for tests of what waits for silence: leases, recovery, retention; no test has to sleep."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from saga_store.validation import valid_duration


class SagaClock:
    """The twin's clock, which a test can move; and what makes the rows of a database older instead.

    It is the time of day until it is moved. PostgreSQL's own clock can't be: there the same comes about by moving all
    times that have been written back.
    """

    def __init__(self) -> None:
        self._ahead = timedelta()
        self._age: list[Callable[[timedelta], object]] = []

    def __call__(self) -> datetime:
        """Return what time it is."""
        return datetime.now(UTC) + self._ahead

    def follow(self, age: Callable[[timedelta], object]) -> None:
        """Have this called by ``advance()``, to make everything in a database so much older."""
        self._age.append(age)

    def advance(self, by: timedelta) -> None:
        """Let time pass, for all that was written so far: sagas fall silent, leases expire.

        In PostgreSQL what isn't committed yet is left out.

        Raises:
            InvalidSagaDataError: It is no timedelta, or a negative one.
            TimeoutError: A transaction that is open has locked a saga; commit first, or roll back.
        """
        by = valid_duration("by", by)
        for age in self._age:
            age(by)
        self._ahead += by
