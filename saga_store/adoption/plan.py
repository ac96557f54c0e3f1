"""Decide what is to be done: which way, which steps, and whether it may be done at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from saga_store.adoption import steps as ways
from saga_store.adoption.forms import TABLES
from saga_store.adoption.revision import REVISION
from saga_store.adoption.shape import Shape, unknown
from saga_store.adoption.steps import NO_LOCK, Step
from saga_store.schema.fingerprint import differences, expected_fingerprints, unfinished
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
        left = {*_unfinished(found, back=True), *_unfinished(found, back=False)}
        present = {thing: being for thing, being in found.shape.fingerprint.items() if thing not in left}
        expected = expected_fingerprints()[found.revision]
        yield from differences({thing: being for thing, being in expected.items() if thing not in left}, present)


def _steps(goal: Goal, found: Found, *, rewrite: bool) -> list[Step]:
    if goal == "finish":
        return ways.finish(found.shape)
    if goal == "adopt":
        return [*_to_ours(found, rewrite=rewrite), *_upgrade(found)]
    return [*_downgrade(found), *ways.steps(found.shape, "cqrs", rewrite=rewrite)]


def _to_ours(found: Found, *, rewrite: bool) -> list[Step]:
    if found.revision is not None:
        return []
    record = Step(f"record revision {REVISION}", "stamp", (), NO_LOCK, (), revision=REVISION)
    return [*ways.steps(found.shape, "saga-store", rewrite=rewrite), record]


def _unfinished(found: Found, *, back: bool) -> list[str]:
    if found.revision is None:
        return []
    return unfinished(found.revision, found.shape.fingerprint, back=back)


def _upgrade(found: Found) -> list[Step]:
    place = found.history.index(found.revision or REVISION)
    interrupted = []
    if _unfinished(found, back=True):
        place -= 1
        interrupted.append(_downgrade_to(found.history[place]))
    left = found.history[place + 1 :]
    upgrade = Step(f"upgrade to {', '.join(left)}", "upgrade", (), "see CHANGELOG.md", (), revision=found.history[-1])
    return [*interrupted, upgrade] if left else []


def _downgrade(found: Found) -> list[Step]:
    if found.revision is None:
        return []
    interrupted = _upgrade(found) if _unfinished(found, back=False) else []
    taken = [_downgrade_to(REVISION)] if interrupted or found.revision != REVISION else []
    return [*interrupted, *taken, Step(FORGET, "transaction", (), NO_LOCK, (f"DROP TABLE {VERSION_TABLE}",))]


def _downgrade_to(revision: str) -> Step:
    return Step(f"downgrade to {revision}", "downgrade", TABLES, ways.SHORT, (), revision=revision)
