"""How a verb intervenes: by an id at once, or by filters, which make a plan that a person sees before it is done.

A plan names sagas at their versions. What has changed since is left alone, and reported; nothing else is touched. Each
write expects the version; that no steps were logged since, which leaves it, is looked at just before.
"""

import abc
import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from saga_store.cli import sagas_shown
from saga_store.cli.blocks import Block, Column, Row, Table, cell, line
from saga_store.cli.console import Console, warn, write
from saga_store.cli.exits import Exit
from saga_store.cli.output import Output
from saga_store.cli.saga_filters import UnknownIdError, is_filtered, only_saga, query, zone_of
from saga_store.cli.saga_plan import Plan, Planned, as_seen, read_plan
from saga_store.cli.saga_run import tell, with_storage
from saga_store.cli.storages import missing_of, reason_of
from saga_store.errors import (
    InvalidSagaDataError,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStoreError,
    SagaUnreadableError,
    SchemaError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.inspection import INTERVENTION, SagaPage, SagaQuery, SagaSummary
from saga_store.model import UNFINISHED
from saga_store.sharding import ShardedSagaStorage
from saga_store.storage import SagaStorage
from saga_store.validation import valid_count, valid_name, valid_text, valid_version

_PAGE = 1000
# What is known by these was refused for what the saga has become; all else is about what was given.
_ABOUT_THE_SAGA = {"saga_id", "entry_id"}
_INTERRUPTED = "interrupted while it was written"
_KINDS = {"done": "good", "changed": "warning", "refused": "warning", "unknown": "bad", "failed": "bad"}


class Deed(abc.ABC):
    """What a verb does to one saga, and to which it makes sense to do it."""

    verb: ClassVar[str]
    asks: ClassVar[str]
    """The question, with a place for how many."""
    done: ClassVar[str]
    needs_saga: ClassVar[bool] = False
    """Whether it can't be done to a saga whose row can't be read."""
    depends_on_version: ClassVar[bool] = True
    """Whether what has become of the saga since it was looked at makes a difference."""

    def narrowed(self, asked: SagaQuery) -> SagaQuery:
        """Return the query for those sagas only to which it can be done."""
        return asked if asked.statuses or asked.conditions else replace(asked, statuses=UNFINISHED)

    def refusal(self, saga: SagaSummary) -> str | None:
        """Return why it makes no sense."""
        return None if saga.status in UNFINISHED else f"{saga.status} already"

    async def plan(self, storage: SagaStorage, saga: SagaSummary, given: argparse.Namespace) -> Planned | str:
        """Return what is to be done, or why nothing can be."""
        del storage, given
        return Planned(saga.id, saga)

    @abc.abstractmethod
    async def do(self, storage: SagaStorage, planned: Planned, given: argparse.Namespace) -> None: ...

    def bound(self, given: argparse.Namespace) -> dict[str, Any]:
        """Return what a plan is for: what is to be done to its sagas, and nothing else."""
        del given
        return {"verb": self.verb}

    def facts(self, given: argparse.Namespace, outcome: str) -> dict[str, Any]:
        """Return what a machine is told besides which saga it was done to."""
        del outcome
        return self.bound(given)

    def described(self, planned: Planned, given: argparse.Namespace) -> str:
        """Return what was done to one saga, or would be."""
        if not given.dry_run:
            return f"{self.done}: saga {planned.saga_id}"
        asks = self.asks.format(f"saga {planned.saga_id}")
        return f"would {asks[0].lower()}{asks[1:]}"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it: done, changed (since the plan), refused, unknown, failed, or not tried; before that: planned."""

    planned: Planned
    outcome: str
    message: str | None = None


class Intervene:
    """The verb of a deed."""

    def __init__(self, deed: Deed) -> None:
        self._deed = deed

    def __call__(self, given: argparse.Namespace, console: Console) -> int:
        return tell(console, lambda: self._run(given, Output(given, console)))

    def _run(self, given: argparse.Namespace, output: Output) -> Exit:
        valid_name("by", given.by)
        if not valid_text("reason", given.reason).strip():
            raise InvalidSagaDataError("reason", "must not be empty; whoever reads the history will ask")
        valid_count("max", given.max)
        if given.id is not None:
            if is_filtered(given, but_step=self._deed.needs_saga):
                raise InvalidSagaDataError("id", "and filters can't be given both: name one saga, or say which sagas")
            if given.plan is not None:
                raise InvalidSagaDataError("id", "and a plan can't be given both")
            return asyncio.run(with_storage(self._one, given, output, writes=True))
        if is_filtered(given) == (given.plan is not None):
            raise InvalidSagaDataError(
                "id",
                "or a filter must be given, or a plan, and not both; see --help"
                if given.plan
                else f"or a filter must be given, or this would {self._deed.verb} every saga; see --help",
            )
        if given.expected_version is not None or getattr(given, "entry", None) is not None:
            raise InvalidSagaDataError("id", "must be given with --expected-version or --entry, which are one saga's")
        return self._several(given, output)

    async def _one(self, storage: SagaStorage, given: argparse.Namespace, output: Output) -> Exit:
        console = output.console
        found = await self._find(storage, given)
        if isinstance(found, str):
            return console.fail(ValueError(found), Exit.REFUSED)
        planned = as_seen(found, found.saga) if found.saga else found
        expected = valid_version(given.expected_version)
        if given.dry_run and found.saga and expected not in {None, found.saga.version}:
            changed = SagaConcurrencyError(planned.saga_id, expected or 0, found.saga.version)
            return console.fail(changed, Exit.REFUSED)
        try:
            if not given.dry_run:
                await self._deed.do(storage, replace(planned, expected_version=expected), given)
        except asyncio.CancelledError:
            facts = self._facts(Result(planned, "unknown", _INTERRUPTED), given)
            output.done([line(cell(f"saga {planned.saga_id}: {_INTERRUPTED}", "bad"))], facts)
            raise
        except SagaConcurrencyError as exc:
            return console.fail(exc, Exit.REFUSED)
        except InvalidSagaDataError as exc:
            return console.fail(exc, Exit.REFUSED if exc.field in _ABOUT_THE_SAGA else Exit.USAGE)
        facts = self._facts(Result(planned, "planned" if given.dry_run else "done"), given)
        output.done([line(self._deed.described(planned, given))], facts)
        return Exit.DONE

    def _facts(self, result: Result, given: argparse.Namespace) -> dict[str, Any]:
        """Return what a machine is told of one saga: in a plan, in results, and by itself."""
        facts = result.planned.facts() | self._deed.facts(given, result.outcome)
        return facts | {"outcome": result.outcome, "message": result.message}

    async def _find(self, storage: SagaStorage, given: argparse.Namespace) -> Planned | str:
        try:
            saga, page = await only_saga(storage, given)
        except UnknownIdError as exc:
            if exc.unreadable is None or self._deed.needs_saga:
                raise
            return Planned(exc.unreadable)
        if page.missing:
            why = "; ".join(map(reason_of, missing_of(storage).values()))
            return f"another saga's id may begin by {given.id} where nobody can look ({why}): give all of it, {saga.id}"
        found = self._deed.refusal(saga) or await self._deed.plan(storage, saga, given)
        return f"saga {saga.id}: {found}" if isinstance(found, str) else found

    def _several(self, given: argparse.Namespace, output: Output) -> Exit:
        plan = asyncio.run(with_storage(self._plan if given.plan is None else self._made_before, given, output))
        count = len(plan.planned)
        if count > given.max:
            refusal = (
                f"more than {given.max} sagas are asked for, so nothing was written: narrow the filters, or say --max"
            )
            return output.console.fail(ValueError(refusal), Exit.REFUSED)
        planned = [self._facts(Result(each, "planned"), given) for each in plan.planned]
        facts = {"plan": planned, "count": count, "left_out": dict(plan.left_out), "missing": sorted(plan.missing)}
        if not count or given.dry_run:
            said = f"{self._asks(count)}: not done, for this is a dry run" if count else "nothing to do"
            output.done([*plan.blocks(given), line(cell(said, "strong"))], facts, planned)
            return output.code(Exit.DONE)
        if not given.yes and (refused := self._refused(plan, given, output)):
            return refused
        return asyncio.run(with_storage(lambda *with_: self._act(plan, *with_), given, output, writes=True))

    async def _plan(self, storage: SagaStorage, given: argparse.Namespace, output: Output) -> Plan:
        asked, plan = self._deed.narrowed(query(given)), Plan()
        page: SagaPage | None = None
        while page is None or (page.after is not None and len(plan.planned) <= given.max):
            page = await storage.find_sagas(asked, limit=_PAGE, after=page.after if page else None)
            plan.missing.update(page.missing)
            output.lacks(storage, page.missing)
            for saga in page.sagas:
                try:
                    planned = self._deed.refusal(saga) or await self._deed.plan(storage, saga, given)
                except SagaUnreadableError:
                    planned = "a history that can't be read"
                except SagaNotFoundError:
                    planned = "not there any more"
                if isinstance(planned, str):
                    plan.left_out[planned.partition("\n")[0]] += 1
                else:
                    plan.planned.append(as_seen(planned, saga))
            plan.left_out["a row that can't be read"] += len(page.unreadable)
        plan.left_out = +plan.left_out
        plan.notes = sagas_shown.notes(replace(page, after=None, unreadable=(), missing=()), zone_of(given))
        return plan

    async def _made_before(self, storage: SagaStorage, given: argparse.Namespace, output: Output) -> Plan:
        """Return the plan that an earlier dry run has made, with the sagas as they are now, for a person to see."""
        plan = Plan()
        for planned in read_plan(given.plan, self._deed.bound(given)):
            try:
                page = await storage.find_sagas(SagaQuery(id_prefix=planned.saga_id.hex), limit=1)
                plan.planned.append(replace(planned, saga=page.sagas[0] if page.sagas else None))
            except StorageUnavailableError:
                if not isinstance(storage, ShardedSagaStorage):
                    raise
                plan.missing.add(storage.shard_of(planned.saga_id))
                output.lacks(storage, plan.missing)
                plan.planned.append(planned)
            if len(plan.planned) > given.max:
                break
        return plan

    def _refused(self, plan: Plan, given: argparse.Namespace, output: Output) -> Exit | None:
        """Show the plan and ask; return how it ends if the answer isn't yes."""
        count = len(plan.planned)
        asks = output.on_terminal and all(one is not None and one.isatty() for one in (sys.stdin, sys.stderr))
        if not output.for_machines:
            output.found(plan.blocks(given), {})
        if not asks:
            refusal = (
                f"{_sagas(count)} would be written to, and there is nobody to ask: look at --dry-run, then say --yes"
            )
            return output.console.fail(ValueError(refusal), Exit.REFUSED)
        write(sys.stderr, f"{self._asks(count)}? [y/N] ")
        if sys.stdin.readline().strip().lower() in {"y", "yes"}:
            return None
        warn("nothing was written")
        return Exit.REFUSED

    def _asks(self, count: int) -> str:
        return self._deed.asks.format(_sagas(count))

    async def _act(self, plan: Plan, storage: SagaStorage, given: argparse.Namespace, output: Output) -> Exit:
        results: list[Result] = []
        # Without shards all sagas are in one place.
        place_of = storage.shard_of if isinstance(storage, ShardedSagaStorage) else lambda _: 0
        away: set[int] = set()
        failure: Exception | None = None
        try:
            for planned in plan.planned:
                place = place_of(planned.saga_id)
                if place in away:  # it would fare no better
                    results.append(Result(planned, "not tried"))
                    continue
                try:
                    results.append(await self._do(storage, planned, given))
                except (StorageUnavailableError, SchemaError) as exc:
                    failure = failure or exc
                    results.append(Result(planned, "failed", str(exc)))
                    away.add(place)
                if results[-1].outcome == "unknown":
                    away.add(place)
        except asyncio.CancelledError:
            results.append(Result(plan.planned[len(results)], "unknown", _INTERRUPTED))
            self._report(plan, results, given, output)
            raise
        except Exception as exc:
            if _have_written(results):
                outcome = "refused" if isinstance(exc, InvalidSagaDataError) else "unknown"
                results.append(Result(plan.planned[len(results)], outcome, str(exc)))
                self._report(plan, results, given, output)
            raise
        if failure is not None and not _have_written(results):
            raise failure
        return self._report(plan, results, given, output)

    async def _do(self, storage: SagaStorage, planned: Planned, given: argparse.Namespace) -> Result:
        try:
            if self._deed.depends_on_version and await _goes_on(storage, planned):
                return Result(planned, "changed", "has logged steps since it was planned")
            await self._deed.do(storage, planned, given)
        except SagaConcurrencyError as exc:
            return Result(planned, "changed", f"is at version {exc.actual}, was at {exc.expected} when it was planned")
        except SagaNotFoundError:
            return Result(planned, "changed", "isn't there any more")
        except InvalidSagaDataError as exc:
            if exc.field not in _ABOUT_THE_SAGA:
                raise
            return Result(planned, "refused", str(exc))
        except (StorageUnavailableError, SchemaError):  # no other saga there would fare better
            raise
        except SagaStoreError as exc:
            return Result(planned, "unknown" if isinstance(exc, UnknownOutcomeError) else "failed", str(exc))
        return Result(planned, "done")

    def _report(self, plan: Plan, results: list[Result], given: argparse.Namespace, output: Output) -> Exit:
        results += [Result(planned, "not tried") for planned in plan.planned[len(results) :]]
        counts = Counter(result.outcome for result in results)
        facts = [self._facts(result, given) for result in results]
        others = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if outcome != "done")
        summary = f"{counts['done']} of {_sagas(len(results))}: {self._deed.done}" + (f"; {others}" if others else "")
        blocks: list[Block] = [_table(results), line(), line(cell(summary, "strong" if not others else "warning"))]
        output.done(
            [*blocks, *sagas_shown.without(plan.missing)],
            {"results": facts, "counts": dict(counts), "missing": sorted(plan.missing)},
            facts,
        )
        if counts["done"] == len(results):
            return output.code(Exit.DONE)
        if _have_written(results):
            return Exit.PARTLY
        return Exit.FAILED if counts["failed"] else Exit.REFUSED


def _have_written(results: Sequence[Result]) -> bool:
    """Whether something has come of it, or may have."""
    return any(result.outcome in {"done", "unknown"} for result in results)


async def _goes_on(storage: SagaStorage, planned: Planned) -> bool:
    """Whether the saga has logged steps since, which leaves its version; what persons did is no sign of life."""
    newer = await storage.get_recent_history(planned.saga_id, after=planned.last_entry_id)
    return any(not entry.step_name.startswith(INTERVENTION) for entry in newer.entries)


def _table(results: Sequence[Result]) -> Table:
    columns = (
        Column("ID", least=8),
        Column("NAME", least=10, wraps=True),
        Column("OUTCOME", least=9),
        Column("", least=20, wraps=True),
    )
    return Table(columns, tuple(_rows(results)))


def _rows(results: Sequence[Result]) -> Iterator[Row]:
    for result in results:
        saga = result.planned.saga
        yield Row(
            (
                cell(result.planned.saga_id.hex[:8], "strong"),
                cell(saga.name if saga else ""),
                cell(result.outcome, _KINDS.get(result.outcome, "dim")),
                cell(result.message or "", "dim"),
            )
        )


def _sagas(count: int) -> str:
    return "1 saga" if count == 1 else f"{count} sagas"
