"""The targets, each with what was measured; they are shown, and nothing fails for missing them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from benchmarks.session import Findings

CHECKPOINTS_PER_SAGA = 6.0


class Target(NamedTuple):
    """A figure and its bounds; ``measured`` is None if what it needs didn't run."""

    text: str
    measured: float | None
    least: float | None = None
    most: float | None = None

    def as_json(self) -> dict[str, Any]:
        met = None
        if self.measured is not None:
            shown = round(self.measured, 3)
            met = (self.least is None or shown >= self.least) and (self.most is None or shown <= self.most)
        return {**self._asdict(), "met": met}


Ratio: TypeAlias = Callable[[str, str, int], float | None]
"""How many times as fast as another row a row is at a crowd."""


def targets(ratio: Ratio, findings: Findings, lonely: float | None) -> Iterator[Target]:
    yield Target("64 at a time: six methods / python-cqrs's storage", ratio("methods", "cqrs", 64), least=30)
    yield Target("64 at a time: six methods / DBOS", ratio("methods", "dbos", 64), least=30)
    yield Target("64 at a time: checkpoints / python-cqrs's storage", ratio("checkpoints", "cqrs", 64), least=40)
    yield Target("1 at a time: six methods / python-cqrs's storage", ratio("methods", "cqrs", 1), least=2.2)
    yield Target("1 at a time: checkpoints / python-cqrs's storage", ratio("checkpoints", "cqrs", 1), least=4.5)
    yield Target("1 at a time: python-cqrs's engine on ours / on its own", ratio("engine", "cqrs-engine", 1), least=3)
    yield Target(
        "64 at a time: python-cqrs's engine on ours / on its own", ratio("engine", "cqrs-engine", 64), least=15
    )
    for crowd in (64, 256):
        yield Target(f"{crowd} at a time: six methods / floor", ratio("methods", "floor", crowd), least=0.8)
        checkpoints = ratio("checkpoints", "floor-checkpoints", crowd)
        yield Target(f"{crowd} at a time: checkpoints / floor", checkpoints, least=0.8)
    yield Target("a lonely call: latency with group commit / without", lonely, most=1.05)
    for crowd, share in sorted(findings.hot.items()):
        yield Target(f"{crowd} at a time: HOT share of context updates", share, least=0.9)
    if findings.claims:
        yield Target("a claim: among many finished sagas / among none", findings.claims[0] / findings.claims[1], most=3)
    for what in ("statements", "transactions"):
        count = findings.counts.get(("checkpoints", 1), {}).get(what)
        each = None if count is None else count / CHECKPOINTS_PER_SAGA
        yield Target(f"{what} per lonely checkpoint", each, least=1, most=1)
