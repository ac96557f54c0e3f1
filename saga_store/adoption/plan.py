"""Decide what is to be done: which way, which steps, and whether it may be done at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from saga_store.adoption import steps as ways
from saga_store.adoption.forms import TABLES
from saga_store.adoption.revision import REVISION
from saga_store.adoption.shape import Shape, unknown
from saga_store.adoption.steps import NO_LOCK, Step
from saga_store.schema.fingerprint import differences, expected_fingerprints
from saga_store.schema.scripts import VERSION_TABLE

FORGET = "forget the revision"
"""The step after which the tables can be compared with those that are known: later revisions are gone."""

Goal = Literal["adopt", "undo", "finish"]

REWRITE_BELOW = 100_000
"""With fewer rows, in both tables, the tables are rewritten in one go; that takes about a second."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done, and why not.

    Attributes:
        goal: What was asked for.
        schema: Where.
        rows: How many rows each of the tables holds; without the tables, none.
        refusals: What keeps it from being done, a line for each; then there are no steps.
        steps: What is left to do, in order; empty if it has been done.
    """

    goal: Goal
    schema: str
    rows: dict[str, int]
    refusals: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What a plan is made of: the tables' shape, their revision, leases that hold, stubs, and the known revisions."""

    shape: Shape
    revision: str | None
    leases: int
    stubs: bool
    history: tuple[str, ...]


def make_plan(goal: Goal, found: Found, *, rewrite_below: int) -> Plan:
    """Work out the plan; no I/O."""
    refusals = tuple(_refusals(goal, found))
    return Plan(
        goal=goal,
        schema=str(found.shape.schema),
        rows={name: table.rows for name, table in found.shape.tables.items()},
        refusals=refusals,
        steps=() if refusals else tuple(_steps(goal, found, rewrite=found.shape.rows < rewrite_below)),
    )


def _refusals(goal: Goal, found: Found) -> Iterator[str]:
    forms = {table.form for table in found.shape.tables.values()}
    if goal == "undo" and "saga-store" in forms and not found.shape.enums:
        yield "python-cqrs's types are gone: after --finish, or in tables that it never made, there is no way back"
    elif found.revision is None:
        if goal == "finish":
            yield "the tables haven't been adopted: no revision is recorded"
        else:
            yield from unknown(found.shape)
    elif found.revision not in found.history:
        yield f"revision {found.revision} is recorded, which this release doesn't know: use the release that made it"
    elif forms != {"saga-store"}:
        yield f"revision {found.revision} is recorded, but the tables aren't saga-store's: saga-store stamp base"
    elif goal == "finish":
        yield from found.shape.other_users
    elif goal == "undo":
        if found.leases:
            yield f"{found.leases} sagas are leased: stop the processes that use saga-store, or wait for them"
        if found.stubs:
            yield (
                "there are stubs of archived sagas, which python-cqrs would take for sagas without a history: restore "
                "them, or let them be forgotten"
            )
        yield from differences(expected_fingerprints()[found.revision], found.shape.fingerprint)


def _steps(goal: Goal, found: Found, *, rewrite: bool) -> list[Step]:
    if goal == "finish":
        return ways.finish(found.shape)
    if goal == "adopt":
        return [*_to_ours(found, rewrite=rewrite), *_upgrade(found)]
    return [*_downgrade(found), *ways.steps(found.shape, "cqrs", rewrite=rewrite)]


def _to_ours(found: Found, *, rewrite: bool) -> list[Step]:
    if found.revision is not None:
        return []
    record = Step(f"record revision {REVISION}", "stamp", (), NO_LOCK, ())
    return [*ways.steps(found.shape, "saga-store", rewrite=rewrite), record]


def _upgrade(found: Found) -> list[Step]:
    left = found.history[found.history.index(found.revision or REVISION) + 1 :]
    return [Step(f"upgrade to {', '.join(left)}", "upgrade", (), "see CHANGELOG.md", ())] if left else []


def _downgrade(found: Found) -> list[Step]:
    if found.revision is None:
        return []
    taken = [Step(f"downgrade to {REVISION}", "downgrade", TABLES, ways.SHORT, ())]
    forget = Step(FORGET, "transaction", (), NO_LOCK, (f"DROP TABLE {VERSION_TABLE}",))
    return [*(taken if found.revision != REVISION else []), forget]
