"""What a page's URL asks, in full: read into queries, and written into links that can be shared."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl

from saga_store.errors import InvalidSagaDataError
from saga_store.inspection import (
    MAX_ATTEMPTS,
    STALE_AFTER,
    SagaCondition,
    SagaGroup,
    SagaQuery,
    SagaSummary,
    fingerprint,
    visible,
)
from saga_store.model import SagaStatus
from saga_store.telling import read_duration, read_moment

JUDGING = ("stale_after", "max_attempts")
"""What decides about conditions; it stays as one goes from page to page."""
FILTERS = (
    "condition",
    "status",
    "name",
    "step",
    "owner",
    "silent_for",
    "created_after",
    "created_before",
    "in_doubt",
    "context",
    "id",
)
# What no storage looks for, so that it is looked for here: what tells one group from another.
_OF_GROUPS = ("action", "error", "no_error", "no_step")
KNOWN: dict[str, tuple[str, ...]] = {
    "attention": (*JUDGING, "groups"),
    "sagas": (*FILTERS, *_OF_GROUPS, *JUDGING, "limit", "after"),
    "saga": (*JUDGING, "history", "context"),
    "interventions": (*JUDGING, "since", "by", "limit", "after"),
    "metrics": (),
}
_SEVERAL = {"condition", "status", "context"}
_MOST_PARAMETERS = 100
_LIMIT, _MOST = 50, 200
_SEARCHED = 1000
"""Among how many sagas is looked for those of one group, a page at a time."""
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a URL's query asks; what is empty isn't asked, as forms send what nobody has filled in."""

    pairs: Pairs

    @classmethod
    def of(cls, page: str, query_string: str) -> "Asked":
        """Read what is asked of a page; InvalidSagaDataError names what it doesn't know."""
        try:
            found = parse_qsl(query_string, keep_blank_values=True, max_num_fields=_MOST_PARAMETERS)
        except ValueError:
            raise InvalidSagaDataError("URL", f"asks for more than {_MOST_PARAMETERS} things") from None
        known = KNOWN[page]
        for name, _ in found:
            if name not in known:
                raise InvalidSagaDataError(f"{name!r:.60}", f"isn't known here; known are {', '.join(known) or 'none'}")
        asked = cls(tuple((name, value) for name, value in found if value))
        for name, _ in asked.pairs:
            if name not in _SEVERAL and len(asked.all(name)) > 1:
                raise InvalidSagaDataError(name, "is asked more than once")
        return asked

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.pairs if key == name]

    def get(self, name: str) -> str | None:
        return next(iter(self.all(name)), None)

    def typed(self, name: str) -> str:
        """Return what to put into a form's field: nothing where the field couldn't show every character."""
        value = self.get(name) or ""
        return value if visible(value) == value.strip() else ""

    @property
    def judging(self) -> Pairs:
        return tuple(pair for pair in self.pairs if pair[0] in JUDGING)

    @property
    def stale_after(self) -> timedelta:
        found = self.duration("stale_after")
        return STALE_AFTER if found is None else found

    @property
    def max_attempts(self) -> int:
        return self.number("max_attempts", MAX_ATTEMPTS, 2**31 - 1)

    @property
    def limit(self) -> int:
        return self.number("limit", _LIMIT, _MOST, least=1)

    @property
    def is_for_a_group(self) -> bool:
        """Whether it asks for what the storage can't look for."""
        return any(name in _OF_GROUPS for name, _ in self.pairs)

    def without(self, *names: str) -> Pairs:
        return tuple(pair for pair in self.pairs if pair[0] not in names)

    @property
    def filters(self) -> list[tuple[str, str, Pairs]]:
        """What is asked for, and for each of it what is asked without it."""
        return [
            (name, value, tuple(pair for other, pair in enumerate(self.pairs) if other != index and pair[0] != "after"))
            for index, (name, value) in enumerate(self.pairs)
            if name in FILTERS or name in _OF_GROUPS
        ]

    def is_on(self, name: str, word: str = "1") -> bool:
        value = self.get(name)
        if value not in {None, word}:
            raise InvalidSagaDataError(name, f"must be {word} or left out, not {value!r:.60}")
        return value is not None

    def number(self, name: str, default: int, most: int, *, least: int = 0) -> int:
        value = self.get(name)
        if value is None:
            return default
        if not (
            value.isascii() and value.isdigit() and len(value) < len(str(most)) + 1 and least <= int(value) <= most
        ):
            raise InvalidSagaDataError(name, f"must be a number from {least} to {most}, not {value!r:.60}")
        return int(value)

    def duration(self, name: str) -> timedelta | None:
        value = self.get(name)
        try:
            return None if value is None else read_duration(value.strip())
        except ValueError as exc:
            raise InvalidSagaDataError(name, str(exc)) from None

    def moment(self, name: str, now: datetime) -> datetime | None:
        value = self.get(name)
        try:
            return None if value is None else read_moment(value.strip(), now)
        except ValueError as exc:
            raise InvalidSagaDataError(name, str(exc)) from None

    def query(self, now: datetime) -> SagaQuery:
        return SagaQuery(
            statuses=[_one_of(SagaStatus, "status", value) for value in self.all("status")],
            conditions=[_one_of(SagaCondition, "condition", value) for value in self.all("condition")],
            name=self.get("name"),
            step=self.get("step"),
            lease_owner=self.get("owner"),
            silent_for=self.duration("silent_for"),
            created_after=self.moment("created_after", now),
            created_before=self.moment("created_before", now),
            context=dict(self.fields()) or None,
            in_doubt=self.is_on("in_doubt") or None,
            id_prefix=_id_prefix(self.get("id")),
            stale_after=self.stale_after,
            max_attempts=self.max_attempts,
        )

    def fields(self) -> Iterator[tuple[str, Any]]:
        """Yield the fields of the context that are asked for; a value that is no JSON is text."""
        for field in self.all("context"):
            name, equals, value = field.partition("=")
            if not equals or not name.strip():
                raise InvalidSagaDataError("context", f"must be written like order_id=o-17, not {field!r:.60}")
            try:
                yield name.strip(), json.loads(value)
            except (ValueError, RecursionError):
                yield name.strip(), value

    def is_in_group(self, saga: SagaSummary) -> bool:
        """Whether what no storage looks for is so."""
        error = fingerprint(saga.last_error.details) if saga.last_error else None
        action = saga.last_entry.action if saga.last_entry else None
        return (
            self.get("error") in {None, error}
            and self.get("action") in {None, action}
            and not (self.is_on("no_error") and error is not None)
            and not (self.is_on("no_step") and action is not None)
        )

    @property
    def search_limit(self) -> int:
        return _SEARCHED if self.is_for_a_group else self.limit


def of_group(group: SagaGroup) -> Pairs:
    """Return what asks for the sagas of a group."""
    step = (("step", group.step_name), ("action", group.action)) if group.step_name else (("no_step", "1"),)
    error = (("error", group.error),) if group.error else (("no_error", "1"),)
    pairs = (("condition", group.condition.value), ("name", group.name), *step, *error)
    return tuple((name, value) for name, value in pairs if value)


def _one_of(kind: type[Any], name: str, value: str) -> Any:  # noqa: ANN401 - one of the kind
    for one in kind:
        if one.value.lower() == value.strip().lower():
            return one
    raise InvalidSagaDataError(name, f"must be one of {', '.join(one.value for one in kind)}, not {value!r:.60}")


def _id_prefix(value: str | None) -> str | None:
    return None if value is None else value.strip()
