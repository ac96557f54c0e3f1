"""What a migration may be told, by ``-x name=value``, attributes of the configuration or a call; and what it tells."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Self, cast

from alembic.util import CommandError

from saga_store.errors import SagaStoreError
from saga_store.grants import check_schema

_LOG = logging.getLogger("saga_store.migrations")
_INTERVAL_SECONDS = 10.0

LOCK_WAIT = timedelta(seconds=60)
LOCK_TIMEOUT = "2s"
"""How long one statement may wait for a table, since everybody else waits behind it."""
STATEMENT_TIMEOUT = "60s"
"""How long one statement may take that others may wait for."""


class MigrationError(SagaStoreError, CommandError):
    """A migration couldn't be run, or not to its end; the message says why, and what to do.

    It is one of Alembic's errors too, so that its command prints the message in place of a traceback.
    """


class MigrationLockError(MigrationError):
    """A lock wasn't to be had in time: somebody else migrates, or holds a table. Try again later."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to migrate.

    Attributes:
        schema: Where the tables are; None for the first schema of the session's search_path that exists.
        create_schema: Whether to create it if it isn't there.
        lock_wait: How long to wait, in all, for another migration to end, and then in each revision for the tables.
    """

    schema: str | None = None
    create_schema: bool = False
    lock_wait: timedelta = LOCK_WAIT

    @classmethod
    def read(cls, arguments: Mapping[str, str], attributes: Mapping[str, object]) -> Self:
        """Take the settings from the attribute ``settings``, unless ``-x`` arguments say something else.

        Raises:
            MigrationError: An argument is unknown, or its value can't be read.
        """
        readers: dict[str, Callable[[str], object]] = {
            "schema": _name,
            "create_schema": _truth,
            "lock_wait": seconds,
        }
        if unknown := arguments.keys() - readers.keys():
            raise MigrationError(f"there is no setting -x {_shown(min(unknown))}: choose among {', '.join(readers)}")
        settings = cast("Self", attributes.get("settings") or cls())
        for name, value in arguments.items():
            try:
                settings = replace(settings, **{name: readers[name](value)})  # type: ignore[arg-type] # of its type
            except ValueError as exc:
                raise MigrationError(f"-x {name}={_shown(value)} can't be used: {exc}") from exc
        return settings


def _shown(text: str) -> str:
    """A URL that was put in a wrong place may have a password in it."""
    return "(a URL)" if "://" in text else text


def _name(value: str) -> str:
    if not value or "://" in value:
        raise ValueError("give the name of a schema, such as sagas")
    check_schema(value)
    return value


def _truth(value: str) -> bool:
    if value not in {"true", "false"}:
        raise ValueError("give true or false")
    return value == "true"


def seconds(value: str) -> timedelta:
    """Read a number of seconds; ValueError if it is none."""
    try:
        number = float(value)
        if number >= 0:
            return timedelta(seconds=number)
    except (ValueError, OverflowError):
        pass
    raise ValueError("give a number of seconds, such as 60")


@dataclass(frozen=True, slots=True)
class Progress:
    """So many rows of a piece of work are done; ``total`` is the planner's estimate, None if it has none."""

    what: str
    done: int = 0
    total: int | None = None
    finished: bool = False

    def advanced(self, rows: int) -> "Progress":
        return replace(self, done=self.done + rows)

    def ended(self) -> "Progress":
        return replace(self, finished=True)

    def __str__(self) -> str:
        if self.finished:
            return f"{self.what}: done"
        total = f" of about {self.total:,}" if self.total and self.total >= self.done else ""
        return f"{self.what}: {self.done:,}{total} rows"


Report = Callable[[Progress], None]


class LogReport:
    """Logs a line when a piece of work begins to take long, then at intervals, and one at its end."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._said = False

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= _INTERVAL_SECONDS or (progress.finished and self._said):
            _LOG.info("%s", progress)
            self._last, self._said = now, not progress.finished
