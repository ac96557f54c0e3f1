"""Which sagas a verb of ``saga`` is about: an id, by its first digits or whole, or filters."""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from typing import Any, TypeVar
from uuid import UUID

from saga_store.cli.storages import missing_of, reason_of
from saga_store.cli.verbs import duration
from saga_store.errors import InvalidSagaDataError
from saga_store.inspection import MAX_ATTEMPTS, STALE_AFTER, SagaCondition, SagaPage, SagaQuery, SagaSummary
from saga_store.interface import IInspectionStorage
from saga_store.model import SagaStatus

FEWEST_DIGITS = 8
ID_HELP = f"its id, or {FEWEST_DIGITS} of its first digits or more"
_MOST_LISTED = 20
_T = TypeVar("_T", bound=StrEnum)


def add_filters(parser: argparse.ArgumentParser, *, statuses: bool = True, conditions: bool = True) -> None:
    group = parser.add_argument_group("filters", "sagas of which all that is given is so")
    if statuses:
        described = ", ".join(SagaStatus)
        group.add_argument(
            "--status", action="append", type=_one_of(SagaStatus), metavar="STATUS", default=[], help=described
        )
    if conditions:
        described = ", ".join(SagaCondition)
        group.add_argument(
            "--condition", action="append", type=_one_of(SagaCondition), metavar="CONDITION", default=[], help=described
        )
    group.add_argument("--name", help="of this name")
    group.add_argument("--step", help="whose last entry is of this step")
    group.add_argument("--owner", help="whose lease is, or was, this owner's")
    group.add_argument("--silent-for", type=duration, help="silent for this long: 90s, 10m, 2h, 7d")
    group.add_argument("--created-after", type=moment, help="a time (ISO 8601), or how long ago")
    group.add_argument("--created-before", type=moment, help="likewise")
    group.add_argument("--in-doubt", action="store_true", default=None, help="with a step in doubt")
    group.add_argument(
        "--field", action="append", type=_field, metavar="NAME=VALUE", default=[], help="with this in its context"
    )


def add_judging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stale-after", type=duration, default=STALE_AFTER, help="silent for this long is stale")
    parser.add_argument("--max-attempts", type=int, default=MAX_ATTEMPTS, help="this many exhaust a saga")


def add_zone(parser: argparse.ArgumentParser) -> None:
    zones = parser.add_mutually_exclusive_group()
    zones.add_argument("--local", action="store_true", help="times in the local time zone, given and shown")
    zones.add_argument("--utc", dest="local", action="store_false", help="times in UTC (default)")


def judged(given: argparse.Namespace) -> SagaQuery:
    """Return a query for all sagas, that says what is stale and what exhausted."""
    return SagaQuery(stale_after=given.stale_after, max_attempts=given.max_attempts)


def query(given: argparse.Namespace, conditions: Iterable[SagaCondition] = ()) -> SagaQuery:
    """Return what the filters ask for; ``conditions`` in place of those that are given."""
    return replace(
        judged(given),
        statuses=tuple(given.status),
        conditions=tuple(conditions) or tuple(given.condition),
        name=given.name,
        step=given.step,
        lease_owner=given.owner,
        silent_for=given.silent_for,
        created_after=None if given.created_after is None else time_of(given.created_after, local=given.local),
        created_before=None if given.created_before is None else time_of(given.created_before, local=given.local),
        in_doubt=given.in_doubt,
        context=_context(given.field),
    )


def is_filtered(given: argparse.Namespace, *, but_step: bool = False) -> bool:
    """Whether any filter is given at all; ``but_step`` if the step isn't one."""
    asked = [given.name, given.owner, given.silent_for, given.created_after, given.created_before, given.in_doubt]
    asked += [] if but_step else [given.step]
    return any(value is not None for value in asked) or bool(given.status or given.condition or given.field)


async def only_saga(storage: IInspectionStorage, given: argparse.Namespace) -> tuple[SagaSummary, SagaPage]:
    """Return the saga that an id leads to, and the page on which it was found.

    Raises:
        InvalidSagaDataError: That is no id, or the beginning of none or of several sagas'.
        SagaNotFoundError: No saga has this id.
    """
    if len(given.id.replace("-", "")) < FEWEST_DIGITS:
        raise InvalidSagaDataError("id", f"must have its first {FEWEST_DIGITS} digits or more, not {given.id!r:.60}")
    if not re.fullmatch(r"[0-9a-fA-F-]{1,36}", given.id):
        raise InvalidSagaDataError("id", f"must be hexadecimal digits, with or without hyphens, not {given.id!r:.60}")
    page = await storage.find_sagas(replace(judged(given), id_prefix=given.id), limit=_MOST_LISTED)
    if len(page.sagas) == 1 and not page.unreadable:
        return page.sagas[0], page
    ids = [str(saga.id) for saga in page.sagas] + [str(saga_id) for saga_id in page.unreadable]
    if not ids:
        with suppress(ValueError):
            whole = UUID(given.id)
            await storage.get_recent_history(whole, limit=1)  # which knows why there is none
        if page.missing:
            why = "; ".join(map(reason_of, missing_of(storage).values()))
            raise UnknownIdError(f"is no saga's on the shards that answer: {given.id!r}; {why}")
        raise UnknownIdError(f"is no saga's: {given.id!r}")
    what = "can't be read" if len(ids) == 1 else "are several sagas; give more digits"
    unreadable = page.unreadable[0] if len(ids) == 1 else None
    raise UnknownIdError(f"{what}: {', '.join(ids)}{' and more' if page.after else ''}", unreadable)


class UnknownIdError(InvalidSagaDataError):
    """An id that could be one, and leads to no saga, to several, or to one that is ``unreadable``."""

    def __init__(self, reason: str, unreadable: UUID | None = None) -> None:
        super().__init__("id", reason)
        self.unreadable = unreadable


def zone_of(given: argparse.Namespace) -> tzinfo | None:
    """Return in which zone times are told; None is the local one."""
    return None if given.local else UTC


def moment(value: str) -> datetime | timedelta:
    """Read a time, with a zone or without, or how long ago it was, for argparse."""
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        with suppress(argparse.ArgumentTypeError):
            return duration(value)
    raise argparse.ArgumentTypeError(
        f"{value!r} is no time; write it like 2026-11-26T03:00, 2026-11-26T03:00+01:00, or how long ago, like 10m or 7d"
    )


def time_of(given: datetime | timedelta, *, local: bool) -> datetime:
    """Return the time that was meant; one without a zone is local if that was asked for, and UTC otherwise."""
    try:
        if isinstance(given, timedelta):
            return datetime.now(UTC) - given
        if given.tzinfo is None and not local:
            return given.replace(tzinfo=UTC)
        return given.astimezone(UTC)
    except (OverflowError, ValueError, OSError) as exc:
        raise InvalidSagaDataError("time", f"must be between the years 1 and 9999, which isn't so of {given}") from exc


def _context(fields: Iterable[tuple[str, Any]]) -> dict[str, Any] | None:
    return dict(fields) or None


def _field(value: str) -> tuple[str, Any]:
    """Read a field of a context; its value is JSON, or else a string."""
    name, equals, rest = value.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{value!r} is no field; write it like customer=alice or 'items=[1, 2]'")
    try:
        return name, json.loads(rest)
    except (ValueError, RecursionError):
        return name, rest


def _one_of(enumeration: type[_T]) -> Callable[[str], _T]:
    def read(value: str) -> _T:
        try:
            return enumeration(value)
        except ValueError:
            known = ", ".join(enumeration)
            raise argparse.ArgumentTypeError(f"{value!r} is none of {known}") from None

    return read
