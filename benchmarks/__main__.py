"""``python -m benchmarks``: measure, print the tables, and write the JSON file."""

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import VOLATILE, filesystem, installed, libraries, load, machine
from benchmarks.report import make_report, render
from benchmarks.rows import CONNECTIONS, ROWS, Row
from benchmarks.server import serve
from benchmarks.session import Plan, Session

FOLDER = Path(__file__).parent.parent / ".bench"
PLAN = Plan(
    crowds=(1, 16, 64, 256),
    rounds=5,
    seconds=1.0,
    budget=390.0,
    pairs=300,
    counted=20,
    hot_sagas=256,
    finished=1_000_000,
    seed=1,
)
QUICK = replace(PLAN, crowds=(1, 64), rounds=2, seconds=0.4, pairs=100, finished=50_000)


def main() -> None:
    options = _options()
    if options.render:
        say(render(json.loads(options.render.read_text())))
        return
    rows = tuple(row for row in ROWS if not options.rows or row.key in options.rows)
    skipped = {row.key: f"{row.needs} isn't installed" for row in rows if row.needs and not installed(row.needs)}
    rows = tuple(row for row in rows if row.key not in skipped)
    for key, reason in skipped.items():
        say(f"SKIPPED: {key}: {reason}")
    report = _measure(rows, _plan(options), options.folder, skipped)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1))
    say(f"\n{render(report)}\n\nall figures: {options.json}")


def _measure(rows: tuple[Row, ...], plan: Plan, folder: Path, skipped: dict[str, str]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if filesystem(folder) in VOLATILE:
        say(f"WARNING: {folder} is in memory, where nothing is durable and commits cost nothing: see --folder")
    before = machine(folder)
    with serve(folder) as server:
        session = Session(server, rows, plan, say)
        findings = session.run()
        facts = {
            "machine": {**before, "load_after": load()},
            "libraries": libraries(),
            "server": {"version": server.version, "settings": server.settings},
            "plan": {
                **asdict(plan),
                "rounds": max(map(len, findings.measurements.values())),
                "connections": CONNECTIONS,
            },
            "skipped": skipped,
        }
    return make_report(rows, session, facts)


def _plan(options: argparse.Namespace) -> Plan:
    chosen = {field.name: getattr(options, field.name) for field in fields(Plan)}
    plan = QUICK if options.quick else PLAN
    return replace(plan, **{name: value for name, value in chosen.items() if value is not None})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure saga-store beside others, on a PostgreSQL of its own whose commits are durable.",
    )
    keys = ", ".join(row.key for row in ROWS)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a minute, and rough figures")
    parser.add_argument("--only", dest="rows", type=_words, metavar="ROW,...", help=f"measure these alone: {keys}")
    parser.add_argument("--crowds", type=_numbers, metavar="N,...", help="sagas at a time (1,16,64,256)")
    parser.add_argument("--rounds", type=int, help="how often each row has its turn (5)")
    parser.add_argument("--seconds", type=float, help="how long a turn is (1.0)")
    parser.add_argument("--budget", type=float, help="make fewer rounds if they would take more seconds (390)")
    parser.add_argument("--pairs", type=int, help="lonely calls of each kind in a round (300)")
    parser.add_argument("--counted", type=int, help="sagas that statements are counted by, at least (20)")
    parser.add_argument("--hot-sagas", type=int, help="sagas whose contexts are updated to count HOT updates (256)")
    parser.add_argument("--finished", type=int, help="finished sagas among which stale ones are claimed (1,000,000)")
    parser.add_argument("--seed", type=int, help="of the order of turns (1)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="whose disk the server's data is on (.bench)")
    parser.add_argument("--json", type=Path, default=FOLDER / "latest.json", help="the file to write")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing, print the tables of such a file")
    return parser.parse_args()


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if unknown := set(words) - {row.key for row in ROWS}:
        raise argparse.ArgumentTypeError(f"no such row: {', '.join(sorted(unknown))}")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - what it finds is for the terminal


if __name__ == "__main__":
    main()
