"""A plan: what is to be done to which sagas, as they were when somebody looked; by filters, or read from a file."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from saga_store.cli import sagas_shown
from saga_store.cli.blocks import Block, Line, Verbatim, cell, line
from saga_store.cli.saga_filters import zone_of
from saga_store.errors import InvalidSagaDataError
from saga_store.inspection import SagaSummary
from saga_store.validation import valid_entry_id, valid_last_seen, valid_version


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be done: to which saga, which is None if its row can't be read, and to which of its entries."""

    saga_id: UUID
    saga: SagaSummary | None = None
    entry_id: int | None = None
    what: str = ""
    expected_version: int | None = None
    last_entry_id: int = 0

    def facts(self) -> dict[str, Any]:
        saga = self.saga
        facts: dict[str, Any] = {"saga_id": str(self.saga_id), "name": saga and saga.name}
        facts |= {"version": self.expected_version or (saga and saga.version), "last_entry_id": self.last_entry_id}
        facts |= {"status": saga and saga.status.value, "condition": saga and saga.condition.value}
        return facts if self.entry_id is None else facts | {"entry_id": self.entry_id}


@dataclass(slots=True)
class Plan:
    """What is to be done, why some of what was asked for is left out, and what the pages said that it was made from.

    ``missing`` are the shards that couldn't be asked.
    """

    planned: list[Planned] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[Line | Verbatim] = field(default_factory=list)
    missing: set[int] = field(default_factory=set)

    def blocks(self, given: argparse.Namespace) -> list[Block]:
        sagas = [planned.saga for planned in self.planned if planned.saga]
        blocks: list[Block] = [sagas_shown.sagas(sagas, zone_of(given)), line()] if sagas else []
        blocks += [line(cell(f"{count} left out: {why}", "dim")) for why, count in self.left_out.items()]
        return [*blocks, *self.notes, *sagas_shown.without(self.missing)]


def as_seen(planned: Planned, saga: SagaSummary) -> Planned:
    last = saga.last_entry.id if saga.last_entry else 0
    return replace(planned, expected_version=saga.version, last_entry_id=last)


def read_plan(name: str, bound: Mapping[str, Any]) -> Iterator[Planned]:
    """Read what a dry run has printed with ``--json`` or ``--ndjson``, from a file or, as ``-``, from stdin.

    Args:
        name: The file's name.
        bound: What is to be done: a plan that was made for anything else isn't carried out.

    Raises:
        InvalidSagaDataError: It can't be read, is no plan, or is one for something else.
    """
    for number, one in enumerate(_items(name), 1):
        try:
            planned = Planned(
                UUID(one["saga_id"]),
                entry_id=one.get("entry_id"),
                expected_version=valid_version(one["version"]),
                last_entry_id=valid_last_seen(one["last_entry_id"]),
            )
            valid_entry_id(planned.entry_id or 0)
        except (KeyError, TypeError, AttributeError, ValueError) as exc:
            raise InvalidSagaDataError("plan", f"has something else in place of saga {number}: {name}") from exc
        if planned.expected_version is None:
            raise InvalidSagaDataError("plan", f"says no version of saga {number}: {name}")
        for what, wanted in bound.items():
            if one.get(what) != wanted:
                problem = f"is for another {what} than {wanted}, or doesn't say for which: {one.get(what)!r:.60}"
                raise InvalidSagaDataError("plan", f"{problem}, of saga {number}: {name}")
        yield planned


def _items(name: str) -> list[Any]:
    """Return what stands in a plan: one JSON text, in lines or not, or one a line."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as exc:
        raise InvalidSagaDataError("plan", f"can't be read: {name}: {exc.strerror}") from exc
    except ValueError as exc:
        raise InvalidSagaDataError("plan", f"is no text in UTF-8: {name}: {exc}") from exc
    if not text.strip():
        raise InvalidSagaDataError("plan", f"is empty: {name}")
    try:
        try:
            found = json.loads(text)
        except ValueError:
            return [json.loads(each) for each in text.splitlines() if each.strip()]
    except (ValueError, RecursionError) as exc:
        raise InvalidSagaDataError("plan", f"is no JSON: {name}: {exc}") from exc
    if isinstance(found, dict) and isinstance(found.get("plan"), list):
        found = found["plan"]
    return found if isinstance(found, list) else [found]
