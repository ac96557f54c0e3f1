"""Compares what was asked and answered with what is stored; knows neither a database nor a clock.

What holds for each write, by its answer:

- ok: it is stored, whole, once, at the version that was told;
- refused or unavailable: nothing of it is stored;
- unknown, or none because the client died: it is stored whole and once, or not at all.

And for each saga: if a write was acknowledged before another was asked for, it comes first; so does the earlier of
two that are promised in the order of their calls. Versions rise by one. The log entries of a write stand together, in
their order, and all that belongs to it was written in one transaction.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tests.crash.journal import Answer, Operation
from tests.crash.tables import LogRow, State, Stored


class Fault(StrEnum):
    """What a storage can have done wrong."""

    LOST = "lost"
    DUPLICATED = "duplicated"
    HALF_WRITTEN = "half-written"
    OUT_OF_ORDER = "out of order"
    DENIED = "refused, but written"
    WRONG_VERSION = "wrong version"
    NOT_ASKED = "never asked for"
    UNEXPECTED = "unexpected error"
    NOWHERE = "in no archive and not in the tables"


@dataclass(frozen=True, slots=True)
class Finding:
    fault: Fault
    saga: str
    what: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.what} (saga {self.saga})"


# So many others that leave an id have to be written before nobody can tell any more: docs/ambiguous_commits.md.
OUTRUN_BY = 8


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of all writes.

    Attributes:
        answers: Counts them by answer.
        undecided: Those with a version whose outcome stayed unknown, although it could have been found out.
        findings: What the storage did wrong.
        outrun: Those with a version whose outcome stayed unknown, with others written meanwhile, so many that no row
            could tell.
    """

    answers: Counter[Answer | None]
    undecided: Sequence[Operation]
    findings: Sequence[Finding]
    outrun: Sequence[Operation] = ()

    @property
    def counts(self) -> dict[Fault, int]:
        found = Counter(finding.fault for finding in self.findings)
        return {fault: found[fault] for fault in Fault}


def check(operations: Sequence[Operation], stored: Stored, nowhere: Sequence[tuple[str, str]] = ()) -> Verdict:
    """Compare; ``nowhere`` are sagas whose archive hasn't got them, and why."""
    by_saga: dict[str, list[Operation]] = defaultdict(list)
    for operation in sorted(operations, key=lambda operation: operation.asked.at):
        by_saga[operation.asked.saga].append(operation)
    findings = [Finding(Fault.NOWHERE, saga, what) for saga, what in nowhere]
    outrun: list[Operation] = []
    for saga in {**by_saga, **stored.states, **stored.logs, **stored.sagas}:
        examined = _Saga(by_saga[saga], stored.states.get(saga, ()), stored.logs.get(saga, ()), stored.sagas.get(saga))
        findings += [Finding(fault, saga, what) for fault, what in examined.findings()]
        outrun += examined.outrun()
    unknown = [operation for operation in operations if operation.asked.fenced and operation.answer is Answer.UNKNOWN]
    return Verdict(
        Counter(operation.answer for operation in operations),
        [operation for operation in unknown if operation not in outrun],
        findings,
        outrun,
    )


@dataclass
class _Traces:
    """Where a write was found: positions among the saga's states, and among its log rows by index."""

    states: list[int] = field(default_factory=list)
    logs: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


class _Saga:
    def __init__(
        self,
        operations: Sequence[Operation],
        states: Sequence[State],
        logs: Sequence[LogRow],
        row: tuple[int, str, str | None] | None,
    ) -> None:
        self.operations = {operation.asked.token: operation for operation in operations}
        self.states = states
        self.logs = logs
        self.row = row
        self.traces: dict[str, _Traces] = defaultdict(_Traces)

    def findings(self) -> Iterator[tuple[Fault, str]]:
        yield from self._assign_states()
        yield from self._assign_logs()
        for token, operation in self.operations.items():
            yield from self._examine(operation, self.traces[token])
        yield from self._order("states", [(at, token) for token, found in self.traces.items() for at in found.states])
        yield from self._order("log entries", [(at, row.token) for at, row in enumerate(self.logs)])
        yield from self._versions()

    def outrun(self) -> Iterator[Operation]:
        """Yield what stayed unknown although it carries a version, where that is how it has to be."""
        with_id = [one for one in self.operations.values() if one.asked.leaves_an_id]
        for operation in with_id:
            if operation.asked.fenced and operation.answer is Answer.UNKNOWN and operation.answered:
                asked, told = operation.asked.at, operation.answered.at
                others = [
                    one
                    for one in with_id
                    if one is not operation
                    and one.asked.at < told
                    and (one.answered is None or one.answered.at > asked)
                    and self._is_there(one.asked.token)
                ]
                if len(others) >= OUTRUN_BY:
                    yield operation

    def _is_there(self, token: str) -> bool:
        return bool(self.traces[token].states) or any(self.traces[token].logs.values())

    def _assign_states(self) -> Iterator[tuple[Fault, str]]:
        alone: list[int] = []
        before: str | None = None
        for position, state in enumerate(self.states):
            if position and state.token == before:
                alone.append(position)
            elif state.token in self.operations:
                self.traces[state.token].states.append(position)
            else:
                yield Fault.NOT_ASKED, f"version {state.version} with the token {state.token}"
            before = state.token
        yield from self._assign_statuses(alone)

    def _assign_statuses(self, positions: Iterable[int]) -> Iterator[tuple[Fault, str]]:
        """Give states that brought no token to the writes of a status alone, which clients ask for one by one.

        No client asks for another once the outcome of one is open, so that which is which can be told.
        """
        asked = [operation for operation in self.operations.values() if operation.asked.is_status_alone]
        expected = [operation for operation in asked if operation.answer is Answer.OK or operation.is_open]
        for position in positions:
            status = self.states[position].status
            matching = next((at for at, operation in enumerate(expected) if operation.asked.status == status), None)
            if matching is not None:
                passed = [operation for operation in expected[:matching] if operation.answer is Answer.OK]
                self.traces[expected[matching].asked.token].states.append(position)
                # Those passed over may still come, and are out of order then; or they are lost.
                expected = passed + expected[matching + 1 :]
            elif denied := [
                operation
                for operation in asked
                if operation.asked.status == status and operation.answer in {Answer.REFUSED, Answer.UNAVAILABLE}
            ]:
                self.traces[denied[0].asked.token].states.append(position)
            else:
                yield Fault.DUPLICATED, f"version {self.states[position].version} writes {status} once more than asked"

    def _assign_logs(self) -> Iterator[tuple[Fault, str]]:
        for position, row in enumerate(self.logs):
            if row.token in self.operations and row.index < self.operations[row.token].asked.steps:
                self.traces[row.token].logs[row.index].append(position)
            else:
                yield Fault.NOT_ASKED, f"log entry {row.index} with the token {row.token}"

    def _examine(self, operation: Operation, traces: _Traces) -> Iterator[tuple[Fault, str]]:
        asked, answered = operation.asked, operation.answered
        what = f"{asked.call} {asked.token}, answered {answered.answer if answered else 'nothing'}"
        if answered and answered.answer is Answer.UNEXPECTED:
            yield Fault.UNEXPECTED, f"{what}: {answered.error} {answered.notes}".rstrip()
        parts = [traces.states] if asked.changes_row else []
        parts += [traces.logs[index] for index in range(asked.steps)]
        if not any(parts):
            if operation.answer is Answer.OK:
                yield Fault.LOST, what
            return
        if operation.answer in {Answer.REFUSED, Answer.UNAVAILABLE}:
            yield Fault.DENIED, f"{what} ({answered and answered.error})"
        if not all(parts):
            yield Fault.HALF_WRITTEN, f"{what}: {sum(map(bool, parts))} of {len(parts)} rows are there"
        elif any(len(part) > 1 for part in parts):
            yield Fault.DUPLICATED, f"{what}: {max(map(len, parts))} times"
        else:
            yield from self._examine_one(operation, traces, what)

    def _examine_one(self, operation: Operation, traces: _Traces, what: str) -> Iterator[tuple[Fault, str]]:
        asked, answered = operation.asked, operation.answered
        logs = [traces.logs[index][0] for index in range(asked.steps)]
        transactions: set[int | None] = {self.states[position].transaction for position in traces.states}
        transactions |= {self.logs[position].transaction for position in logs}
        if len(transactions - {None}) > 1:
            yield Fault.HALF_WRITTEN, f"{what}: in {len(transactions - {None})} transactions"
        if logs != [*range(logs[0], logs[0] + len(logs))] if logs else False:
            yield Fault.OUT_OF_ORDER, f"{what}: its log entries don't stand together in order"
        told = answered.version if answered else None
        if traces.states:
            version: int | None = self.states[traces.states[0]].version
            if asked.expects is not None and version != asked.expects + 1:
                yield Fault.WRONG_VERSION, f"{what}: expected version {asked.expects}, and wrote {version}"
        else:
            version = told if asked.expects is None else asked.expects
        if told is not None and told != version:
            yield Fault.WRONG_VERSION, f"{what}: was told {told}, and wrote {version}"

    def _order(self, where: str, placed: list[tuple[int, str]]) -> Iterator[tuple[Fault, str]]:
        latest: Operation | None = None
        lanes: dict[str, Operation] = {}
        seen: set[str] = set()
        for _, token in sorted(placed):
            operation = self.operations.get(token)
            if operation is None or token in seen:
                continue
            seen.add(token)
            asked, answered = operation.asked, operation.answered
            if answered and answered.answer is Answer.OK:
                if latest and answered.at < latest.asked.at:
                    yield (
                        Fault.OUT_OF_ORDER,
                        f"{where} of {asked.token} after those of {latest.asked.token}, asked later",
                    )
                if asked.lane:
                    last = lanes.setdefault(asked.lane, operation)
                    if last.asked.at > asked.at:
                        yield (
                            Fault.OUT_OF_ORDER,
                            f"{where} of {asked.token} after those of {last.asked.token}, called later",
                        )
                    lanes[asked.lane] = operation
            if latest is None or asked.at > latest.asked.at:
                latest = operation

    def _versions(self) -> Iterator[tuple[Fault, str]]:
        found = [state.version for state in self.states]
        if found != [*range(1, len(found) + 1)]:
            yield Fault.WRONG_VERSION, f"versions don't rise by one: {found[:20]}"
        last = self.states[-1] if self.states else None
        if self.row != (last and (last.version, last.status, last.token)):
            yield Fault.WRONG_VERSION, f"the row is {self.row}, and its last version {last}"
