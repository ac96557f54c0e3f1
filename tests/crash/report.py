"""Tells how it goes, and what came of it: a line that is rewritten on a terminal, a table, and a file."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tests.crash.checker import Finding, Verdict
from tests.crash.journal import Answer, Operation

FINDINGS_SHOWN = 20
LINES_A_RUN = 20


class Progress:
    """Shows each fault on a terminal; in a log, a line now and then."""

    def __init__(self, total: int, out: TextIO) -> None:
        self._total = total
        self._out = out
        self._begun = time.monotonic()

    def show(self, done: int, fault: str, acknowledged: int, unknown: int) -> None:
        line = (
            f"{done:4}/{self._total} faults, {time.monotonic() - self._begun:4.0f} s, "
            f"{acknowledged} acknowledged, {unknown} unknown; {fault}"
        )
        if self._out.isatty():
            self._out.write(f"\r\x1b[K{line}" + ("\n" if done == self._total else ""))
        elif done == self._total or done % max(1, self._total // LINES_A_RUN) == 0:
            self._out.write(f"{line}\n")
        self._out.flush()


@dataclass(frozen=True, slots=True)
class Result:
    """A run of the crash test: ``left_out`` are the faults that can't be had here."""

    seed: str
    server: str
    libraries: Mapping[str, str]
    clients: int
    seconds: float
    faults: Counter[str]
    left_out: Sequence[str]
    verdict: Verdict
    shards: int = 1
    archives: int = 0
    archived: int = 0

    def failed(self, *, definite: bool) -> bool:
        """Whether a storage that keeps its promises would have had another result."""
        return bool(self.verdict.findings or (definite and self.verdict.undecided))

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "server": self.server,
            "shards": self.shards,
            "libraries": dict(self.libraries),
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "faults": dict(sorted(self.faults.items())),
            "left_out": list(self.left_out),
            "answers": {answer or "none": count for answer, count in self.verdict.answers.items()},
            "unknown_with_version": [_waited(operation) for operation in self.verdict.undecided],
            "unknown_with_version_outrun": [_waited(operation) for operation in self.verdict.outrun],
            "archives": self.archives,
            "archived_at_the_end": self.archived,
            "found": {str(fault): count for fault, count in self.verdict.counts.items()},
            "findings": [str(finding) for finding in self.verdict.findings],
        }

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n")


def summary(result: Result) -> str:
    answers = result.verdict.answers
    rows: list[tuple[str, object]] = [
        ("servers, each a shard" if result.shards > 1 else "servers", result.shards),
        ("faults", result.faults.total()),
        *((f"  {name}", count) for name, count in sorted(result.faults.items())),
        *((f"  {name}", "can't be had here (it takes root and the right to mount)") for name in result.left_out),
        ("writes", answers.total()),
        ("  acknowledged", answers[Answer.OK]),
        ("  refused", answers[Answer.REFUSED]),
        ("  unavailable (nothing written)", answers[Answer.UNAVAILABLE]),
        ("  unknown", answers[Answer.UNKNOWN]),
        ("    of these with a version", len(result.verdict.undecided)),
        ("    outrun by 8 others or more", len(result.verdict.outrun)),
        ("  client died before an answer", answers[None]),
        ("archives whose sagas were removed", result.archives),
        ("  sagas archived at the end", result.archived),
        *((str(fault), count) for fault, count in result.verdict.counts.items()),
    ]
    lines = [f"{name:38} {value}" for name, value in rows]
    unknown = [*result.verdict.undecided, *result.verdict.outrun]
    undecided = [f"? {_waited(operation)}" for operation in unknown[:FINDINGS_SHOWN]]
    return "\n".join([*lines, *undecided, *_shown(result.verdict.findings)])


def _waited(operation: Operation) -> str:
    """How long the storage tried to find out, and why it couldn't."""
    asked, answered = operation.asked, operation.answered
    seconds = (answered.at - asked.at) / 1e9 if answered else 0
    notes = f": {answered.notes}" if answered and answered.notes else ""
    return f"{asked.call} {asked.token}: unknown after {seconds:.1f} s (saga {asked.saga}){notes}"


def _shown(findings: Sequence[Finding]) -> list[str]:
    shown = [f"! {finding}" for finding in findings[:FINDINGS_SHOWN]]
    more = len(findings) - len(shown)
    return [*shown, *([f"! and {more} more"] if more > 0 else [])]
