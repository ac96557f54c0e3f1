"""What was found, as what the JSON file holds, and as text: tables in Markdown, which read well in a terminal, too."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, TypeAlias

from benchmarks.rows import BASE, DIRECT, ROUTED, Row
from benchmarks.session import Session
from benchmarks.targets import targets
from benchmarks.workload import Measurement

Report: TypeAlias = dict[str, Any]
"""What the JSON file holds."""

NOTHING = "-"
MILLI = 1000


def make_report(rows: tuple[Row, ...], session: Session, facts: dict[str, Any]) -> Report:
    findings = session.findings
    crowds = sorted({crowd for _, crowd in findings.measurements})

    def ratio(row: str, base: str, crowd: int) -> float | None:
        """Compare round by round: the two were measured within seconds of each other."""
        pairs = zip(
            findings.measurements.get((row, crowd), ()), findings.measurements.get((base, crowd), ()), strict=False
        )
        return _median([_speed(one) / _speed(other) for one, other in pairs])

    def figures(row: Row, crowd: int) -> dict[str, Any]:
        measured = findings.measurements[row.key, crowd]
        return {
            "sagas_per_second": _median([_speed(one) for one in measured]),
            "slowest_round": min(_speed(one) for one in measured),
            "fastest_round": max(_speed(one) for one in measured),
            "ratio": ratio(row.key, BASE, crowd),
            "p50_ms": _median([one.p50 * MILLI for one in measured]),
            "p99_ms": _median([one.p99 * MILLI for one in measured]),
            "client_cores": _median([one.cpu_seconds / one.seconds for one in measured]),
            "other_cores": _median(
                [(one.busy_seconds - one.cpu_seconds) / one.seconds for one in measured if one.busy_seconds is not None]
            ),
            "client_cpu_ms": _median([one.cpu_seconds / one.sagas * MILLI for one in measured]),
            **findings.counts[row.key, crowd],
            "rounds": [asdict(one) for one in measured],
        }

    lonely = _median([one / other for one, other in findings.lonely])
    return {
        **facts,
        "crowds": crowds,
        "rows": {
            row.key: {
                "title": row.title,
                "call": row.call,
                "sagas": session.beds[row.key].sagas,
                "at": {str(crowd): figures(row, crowd) for crowd in crowds},
            }
            for row in rows
        },
        "routing": {
            row: {str(crowd): ratio(row, DIRECT, crowd) for crowd in crowds} for row in ROUTED if row in session.beds
        },
        "lonely_call": {
            "with_ms": _median([pair[0] * MILLI for pair in findings.lonely]),
            "without_ms": _median([pair[1] * MILLI for pair in findings.lonely]),
            "ratio": lonely,
        },
        "claim_ms": [seconds * MILLI for seconds in findings.claims or ()],
        "hot_context_updates": {str(crowd): share for crowd, share in findings.hot.items()},
        "targets": [target.as_json() for target in targets(ratio, findings, lonely)],
    }


def _speed(measured: Measurement) -> float:
    return measured.sagas / measured.seconds


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def render(report: Report) -> str:
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    machine, server = report["machine"], report["server"]
    yield f"- {machine['cores']} cores ({machine['cpu']}), shared by server and client; {machine['system']}"
    yield (
        f"- one page written for good in {machine['sync_ms']:.2f} ms on {machine['filesystem']}; "
        f"load {machine['load_before']} before, {machine['load_after']} after"
    )
    if machine["load_before"] > machine["cores"] / 2:
        yield "- WARNING: others were busy on this machine when it began: the figures are rough, the ratios less so"
    settings = ", ".join(f"{name} {value}" for name, value in server["settings"].items())
    yield f"- PostgreSQL {server['version']}: {settings}"
    libraries = ", ".join(f"{name} {version}" for name, version in report["libraries"].items() if version)
    yield f"- Python {machine['python']}: {libraries}"
    plan = report["plan"]
    yield f"- {plan['rounds']} rounds of {plan['seconds']} s, at most {plan['connections']} connections each"
    yield from (f"- SKIPPED: {row}: {reason}" for row, reason in report["skipped"].items())

    yield from _table(report, "Sagas per second, and how many times those of python-cqrs's storage", _speed_cell)
    yield from _table(report, "Latency of a call in ms, p50 / p99", _latency_cell, of_call=True)
    yield from _table(report, "CPU of the client in ms per saga", _cell("client_cpu_ms", "{:.2f}"))
    yield from _cores(report)
    yield from _routing(report)
    yield from _table(report, "Statements per saga (BEGIN and COMMIT count)", _cell("statements", "{:.3g}"))
    yield from _table(report, "Transactions per saga", _cell("transactions", "{:.3g}"))
    yield from _table(report, "WAL in bytes per saga, without full-page images", _cell("wal_bytes", "{:,.0f}"))
    yield from _table(report, "Share of HOT among the updates of saga_executions", _cell("hot", "{:.2f}"))
    yield from _targets(report)


def _cores(report: Report) -> Iterator[str]:
    """What of the machine is used, and what is idle: there a batch waits for another, or for the disk."""
    cores = report["machine"]["cores"]

    def cell(figures: dict[str, Any]) -> str:
        client, others = figures["client_cores"], figures["other_cores"]
        if others is None:
            return f"{client:.2f} / {NOTHING}"
        return f"{client:.2f} / {others:.2f} ({max(0, 1 - (client + others) / cores):.0%} idle)"

    yield from _table(report, f"Of {cores} cores: client / all else (server)", cell)


def _routing(report: Report) -> Iterator[str]:
    lines = [
        ["Speed of what is routed / straight to the engine", *(f"{crowd} at a time" for crowd in report["crowds"])]
    ]
    for row, ratios in report["routing"].items():
        cells = [NOTHING if (found := ratios[str(crowd)]) is None else f"{found:.2f}" for crowd in report["crowds"]]
        lines.append([report["rows"][row]["title"], *cells])
    yield from markdown(lines)


Cell: TypeAlias = Callable[[dict[str, Any]], str]


def _table(report: Report, title: str, cell: Cell, *, of_call: bool = False) -> Iterator[str]:
    lines = [[title, *(f"{crowd} at a time" for crowd in report["crowds"])]]
    for row in report["rows"].values():
        name = f"{row['title']} ({row['call']})" if of_call else row["title"]
        lines.append([name, *(cell(row["at"][str(crowd)]) for crowd in report["crowds"])])
    yield from markdown(lines)


def markdown(lines: list[list[str]]) -> Iterator[str]:
    """Yield the table, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    yield ""
    for number, line in enumerate(lines):
        first, *others = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"


def _cell(name: str, form: str) -> Cell:
    return lambda figures: NOTHING if figures[name] is None else form.format(figures[name])


def _speed_cell(figures: dict[str, Any]) -> str:
    ratio = "" if figures["ratio"] is None else f" ({figures['ratio']:.1f}x)"
    return f"{figures['sagas_per_second']:,.0f}{ratio}"


def _latency_cell(figures: dict[str, Any]) -> str:
    return f"{figures['p50_ms']:.1f} / {figures['p99_ms']:.1f}"


def _targets(report: Report) -> Iterator[str]:
    lonely = report["lonely_call"]
    if lonely["ratio"] is not None:
        yield ""
        yield f"A lonely call: {lonely['with_ms']:.2f} ms with group commit, {lonely['without_ms']:.2f} ms without"
    if claims := report["claim_ms"]:
        among = f"{report['plan']['finished']:,} finished sagas"
        yield f"A claim of 100 stale sagas: {claims[0]:.1f} ms among {among}, {claims[1]:.1f} ms among none"
    lines = [["Target", "measured", "wanted", ""]]
    for target in report["targets"]:
        least, most = target["least"], target["most"]
        wanted = f"{least:g}" if least == most else f"≤ {most:g}" if least is None else f"≥ {least:g}"
        measured = NOTHING if target["measured"] is None else f"{target['measured']:.2f}"
        lines.append(
            [target["text"], measured, wanted, {True: "met", False: "NOT MET", None: "not measured"}[target["met"]]]
        )
    yield from markdown(lines)
