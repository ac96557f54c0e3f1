"""The verbs with which a person intervenes: saga retry, give-up, break-lease, settle, hold, release."""

import argparse
import getpass
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar, get_args

from saga_store.cli.output import add_options
from saga_store.cli.saga_filters import ID_HELP, add_filters, add_judging, add_zone, moment, time_of
from saga_store.cli.saga_intervention import Deed, Intervene
from saga_store.cli.saga_plan import Planned
from saga_store.cli.sagas_shown import entry_as_text
from saga_store.cli.shards import ALL_AT_ONCE, add_shards
from saga_store.cli.verbs import Verbs
from saga_store.errors import InvalidSagaDataError
from saga_store.inspection import SagaCondition, SagaQuery, SagaSummary, in_doubt, last_in_doubt
from saga_store.model import SagaLogEntry, SagaStepStatus, StepAction
from saga_store.storage import SagaStorage

_MOST = 1000
_ENDS = (SagaStepStatus.COMPLETED, SagaStepStatus.FAILED, SagaStepStatus.COMPENSATED)
# What a step in doubt was at, by its action, the end that it comes to, and the one that is the other action's.
_WORDS: dict[StepAction, tuple[str, SagaStepStatus, SagaStepStatus]] = {
    "act": ("the step was being done", SagaStepStatus.COMPLETED, SagaStepStatus.COMPENSATED),
    "compensate": ("the step was being undone", SagaStepStatus.COMPENSATED, SagaStepStatus.COMPLETED),
}


def register(saga: Verbs) -> None:
    for deed, summary in (
        (Retry(), "Set recovery attempts to zero, so that workers take the sagas again."),
        (GiveUp(), "Make unfinished sagas FAILED, whoever works on them."),
        (BreakLease(), "Take sagas from whoever holds their leases."),
        (Settle(), "Say how a step in doubt ended."),
        (Hold(), "Keep sagas, whatever a policy of retention says."),
        (Release(), "End holds."),
    ):
        verb = saga.add(deed.verb, Intervene(deed), summary=summary, database=True)
        verb.add_argument("id", nargs="?", help=f"{ID_HELP}; or filters in place of it")
        if isinstance(deed, Retry):
            verb.add_argument(
                "--repeatable", action="store_true", help="also with a step in doubt, which may be done twice then"
            )
        if isinstance(deed, Settle):
            verb.add_argument("--entry", type=int, help="the entry in doubt, by its id; if there are several")
            verb.add_argument("--status", dest="outcome", required=True, choices=[end.value for end in _ENDS])
            verb.add_argument(
                "--action", choices=get_args(StepAction), help="only what was being done, or undone; takes any end"
            )
            verb.set_defaults(status=[])
        if isinstance(deed, Hold):
            verb.add_argument("--until", type=moment, help="a time, or how long from now (default: until released)")
        verb.add_argument("--reason", required=True, help="why; it is recorded")
        verb.add_argument("--by", default=_user(), help="who decides this (default: the system's user)")
        verb.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
        verb.add_argument("--yes", action="store_true", help="don't ask")
        verb.add_argument(
            "--plan", metavar="FILE", help="those of a plan, which --dry-run --json has printed; - is stdin"
        )
        verb.add_argument(
            "--max", type=int, default=_MOST, metavar="N", help=f"refuse to do it to more sagas than this ({_MOST})"
        )
        if deed.depends_on_version:
            verb.add_argument("--expected-version", type=int, metavar="N", help="with an id: only if it is at this one")
        else:
            verb.set_defaults(expected_version=None)
        add_filters(verb, statuses=not isinstance(deed, Settle))
        add_judging(verb)
        add_zone(verb)
        add_options(verb)
        add_shards(verb, ALL_AT_ONCE)


def _user() -> str | None:
    with suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return os.environ.get("USER")


class Retry(Deed):
    verb: ClassVar[str] = "retry"
    asks: ClassVar[str] = "Set the recovery attempts of {} to zero"
    done: ClassVar[str] = "the recovery attempts were set to zero"

    def refusal(self, saga: SagaSummary) -> str | None:
        if saga.condition is SagaCondition.HELD:
            return "a worker is at it; break-lease first"
        return super().refusal(saga) or (None if saga.recovery_attempts else "no recovery attempts to set to zero")

    async def plan(self, storage: SagaStorage, saga: SagaSummary, given: argparse.Namespace) -> Planned | str:
        if saga.in_doubt and not given.repeatable:
            return "a step is in doubt; settle it first, or say --repeatable if it may be done twice"
        return await super().plan(storage, saga, given)

    async def do(self, storage: SagaStorage, planned: Planned, given: argparse.Namespace) -> None:
        version = planned.expected_version
        # A lease may have been renewed since somebody looked, which leaves the version.
        page = await storage.find_sagas(SagaQuery(id_prefix=planned.saga_id.hex), limit=1)
        if page.unreadable:
            raise InvalidSagaDataError("saga_id", "can't be read, so no worker takes it, and nobody knows who is at it")
        if page.sagas:
            [saga] = page.sagas
            found = self.refusal(saga) or await self.plan(storage, saga, given)
            if isinstance(found, str) and version in {None, saga.version}:
                raise InvalidSagaDataError("saga_id", found)
            version = version or saga.version
        await storage.reset_recovery_attempts(
            planned.saga_id, by=given.by, reason=given.reason, expected_version=version
        )


class GiveUp(Deed):
    verb: ClassVar[str] = "give-up"
    asks: ClassVar[str] = "Give up {}"
    done: ClassVar[str] = "given up"

    async def do(self, storage: SagaStorage, planned: Planned, given: argparse.Namespace) -> None:
        await storage.give_up_saga(
            planned.saga_id, by=given.by, reason=given.reason, expected_version=planned.expected_version
        )


class BreakLease(Deed):
    verb: ClassVar[str] = "break-lease"
    asks: ClassVar[str] = "Break the lease of {}"
    done: ClassVar[str] = "the lease was broken"

    def refusal(self, saga: SagaSummary) -> str | None:
        return super().refusal(saga) or (None if saga.lease_owner is not None else "under no lease")

    async def do(self, storage: SagaStorage, planned: Planned, given: argparse.Namespace) -> None:
        await storage.break_lease(
            planned.saga_id, by=given.by, reason=given.reason, expected_version=planned.expected_version
        )


def _later(doubts: Sequence[SagaLogEntry], known: Sequence[SagaLogEntry], entry_id: int) -> int | None:
    """Return which entry in doubt is that of a later attempt at the same step."""
    lanes = {(entry.step_name, entry.action) for entry in known if entry.id == entry_id}
    return next((entry.id for entry in doubts if (entry.step_name, entry.action) in lanes), None)


class Settle(Deed):
    verb: ClassVar[str] = "settle"
    asks: ClassVar[str] = "Settle the step in doubt of {}"
    done: ClassVar[str] = "settled"
    needs_saga = True

    def narrowed(self, query: SagaQuery) -> SagaQuery:
        return replace(query, in_doubt=True)

    def refusal(self, saga: SagaSummary) -> str | None:
        del saga  # its history has to tell
        return None

    async def plan(self, storage: SagaStorage, saga: SagaSummary, given: argparse.Namespace) -> Planned | str:
        history = await storage.get_recent_history(saga.id)
        # There may be older ones than that tells.
        known = await storage.get_in_doubt_steps(saga.id) if history.left_out else in_doubt(history.entries)
        doubts = [
            entry
            for entry in last_in_doubt(known)
            if given.step in {None, entry.step_name} and given.action in {None, entry.action}
        ]
        if given.entry is not None:
            if given.entry not in {entry.id for entry in doubts} and (later := _later(doubts, known, given.entry)):
                return f"a later attempt at that step is in doubt, too: look at all, and settle the last, entry {later}"
            doubts = [entry for entry in doubts if entry.id == given.entry]
        if len(doubts) != 1:
            problem = "several steps are in doubt; say which by --entry" if doubts else "no such step is in doubt"
            return "\n".join([problem, *map(entry_as_text, doubts)])
        [entry] = doubts
        doing, end, other = _WORDS[entry.action]
        if given.outcome == other and given.action is None:
            problem = f"{doing}, which ends as {end} or FAILED, not as {other}; if it did, say --action {entry.action}"
            return "\n".join([problem, entry_as_text(entry)])
        return Planned(saga.id, saga, entry_id=entry.id, what=entry_as_text(entry))

    async def do(self, storage: SagaStorage, planned: Planned, given: argparse.Namespace) -> None:
        await storage.settle_step(
            planned.saga_id,
            planned.entry_id or 0,
            SagaStepStatus(given.outcome),
            by=given.by,
            reason=given.reason,
            expected_version=planned.expected_version,
        )

    def bound(self, given: argparse.Namespace) -> dict[str, Any]:
        return super().bound(given) | {"step_status": given.outcome}

    def facts(self, given: argparse.Namespace, outcome: str) -> dict[str, Any]:
        return super().facts(given, outcome) | {"settled": outcome == "done"}

    def described(self, planned: Planned, given: argparse.Namespace) -> str:
        verb = "would settle" if given.dry_run else "settled"
        return f"{verb} {planned.what} of saga {planned.saga_id} as {given.outcome}"


class _Retention(Deed):
    """What is done to any saga, finished or not, and fences no worker."""

    depends_on_version = False

    def narrowed(self, asked: SagaQuery) -> SagaQuery:
        return asked

    def refusal(self, saga: SagaSummary) -> str | None:
        del saga
        return None


class Hold(_Retention):
    verb: ClassVar[str] = "hold"
    asks: ClassVar[str] = "Hold {}"
    done: ClassVar[str] = "held"

    async def do(self, storage: SagaStorage, planned: Planned, given: argparse.Namespace) -> None:
        until = -given.until if isinstance(given.until, timedelta) else given.until
        until = None if until is None else time_of(until, local=given.local)
        await storage.hold_saga(planned.saga_id, by=given.by, reason=given.reason, until=until)


class Release(_Retention):
    verb: ClassVar[str] = "release"
    asks: ClassVar[str] = "Release {}"
    done: ClassVar[str] = "released"

    async def do(self, storage: SagaStorage, planned: Planned, given: argparse.Namespace) -> None:
        await storage.release_saga(planned.saga_id, by=given.by, reason=given.reason)
