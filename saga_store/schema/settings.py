"""What a migration may be told, by Alembic's ``-x name=value``, by attributes of its configuration, or by a call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Self, cast

from saga_store.grants import check_schema
from saga_store.schema.errors import MigrationError

LOCK_WAIT = timedelta(seconds=60)
LOCK_TIMEOUT = "2s"
"""How long one statement may wait for a table, since everybody else waits behind it."""
STATEMENT_TIMEOUT = "60s"
"""How long one statement may take that others may wait for."""


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
