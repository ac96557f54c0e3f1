"""``python -m benchmarks.views``: what each view reads, among few sagas and among many.

A view has to cost the same however many sagas have finished. So as many are unfinished, and have failed lately, in a
small database as in a big one, and pages are compared. What is printed besides: views that look at all of a day, whose
cost goes by that; the SQL of docs/how-to/psql.md; and the big database once more, with an outage in it.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString, TypeAlias
from uuid import UUID

import psycopg
from psycopg.sql import SQL, Identifier, Literal
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.__main__ import FOLDER, say
from benchmarks.filling import filling
from benchmarks.machine import machine
from benchmarks.report import markdown
from saga_store import SagaStatus, schema
from saga_store.inspection import SagaCondition, SagaQuery
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.inspection_sql import READ_ONLY
from saga_store.sqlalchemy.statement import Statement
from saga_store.testing.postgres import serve
from saga_store.web import pages
from saga_store.web.asked import Asked
from saga_store.web.contexts import Redaction

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "psql.md"
UNFINISHED, FAILED, OUTAGE = 1_000, 6_000, 60_000
MOST_TIMES = 1.5

# Over 60 days, the unfinished and the failed ones evenly among the others; contexts are some hundred bytes long.
SAGAS: LiteralString = """
    INSERT INTO saga_executions (
        id, name, status, context, recovery_attempts, lease_owner, lease_expires_at, created_at, updated_at
    )
    SELECT CAST(md5(CAST(n AS text)) AS uuid), 'order-' || n % 7,
        CASE WHEN n % {unfinished} = 0 THEN 'RUNNING' WHEN n % {failed} = 1 THEN 'FAILED' ELSE 'COMPLETED' END,
        json_build_object('n', n, 'text', repeat('x', 300)), n / {unfinished} % 6,
        CASE WHEN n / {unfinished} % 3 = 0 THEN 'worker-1' END,
        CASE WHEN n / {unfinished} % 3 = 0 THEN now() - interval '1 day' END,
        now() - n * interval '60 days' / {sagas}, now() - n * interval '60 days' / {sagas}
    FROM generate_series(1, {sagas}) AS n
    ORDER BY n DESC
"""
LOGS: LiteralString = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT e.id, 'step-' || s.n, 'act', s.status, s.details, e.created_at
    FROM saga_executions e
    CROSS JOIN (
        VALUES (1, 'STARTED', NULL), (1, 'COMPLETED', NULL), (2, 'STARTED', NULL), (2, 'FAILED', 'error 7')
    ) AS s (n, status, details)
    ORDER BY e.created_at
"""
INTERVENTIONS: LiteralString = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, details)
    SELECT id, 'saga_store.break_lease', 'act', 'COMPLETED', '{"by": "alice", "reason": "x"}'
    FROM saga_executions
    WHERE status = 'RUNNING'
    LIMIT 50
"""
# Those that would have finished lately hang.
BREAK_DOWN: LiteralString = """
    UPDATE saga_executions
    SET status = 'RUNNING'
    WHERE id IN (SELECT id FROM saga_executions ORDER BY created_at DESC LIMIT {outage})
"""

View: TypeAlias = Callable[[SqlAlchemySagaStorage], Awaitable[object]]

DAY = timedelta(days=1)
STUCK = (SagaCondition.EXHAUSTED, SagaCondition.ABANDONED, SagaCondition.STALE)
NOTHING_HIDDEN = Redaction(None)
SOME_SAGA = UUID(hex="c4ca4238a0b923820dcc509a6f75849b")
"""md5 of 1: the newest."""


async def saga_page(storage: SqlAlchemySagaStorage) -> None:
    with_context = Asked((("context", "show"),))
    await pages.saga(storage, SOME_SAGA.hex[:8], with_context, NOTHING_HIDDEN, options={})


async def later_page(storage: SqlAlchemySagaStorage) -> None:
    page = await storage.find_sagas()
    for _ in range(20):
        page = await storage.find_sagas(after=page.after)


# What has to cost the same among few sagas and among many.
CONSTANT: dict[str, View] = {
    "page: attention": lambda storage: pages.attention(storage, Asked(())),
    "page: list": lambda storage: pages.sagas(storage, Asked(()), NOTHING_HIDDEN),
    "page: a saga, with its context": saga_page,
    "figures": lambda storage: storage.get_figures(),
    "groups of what is stuck": lambda storage: storage.group_sagas(SagaQuery(conditions=STUCK)),
    "20 pages of a list": later_page,
}
# What costs by how many sagas there are in a day, or in the sample.
OTHERS: dict[str, View] = {
    "list of what is stuck": lambda storage: storage.find_sagas(SagaQuery(conditions=STUCK)),
    "list of FAILED": lambda storage: storage.find_sagas(SagaQuery(statuses=[SagaStatus.FAILED])),
    "groups of FAILED": lambda storage: storage.group_sagas(SagaQuery(statuses=[SagaStatus.FAILED])),
    "in doubt": lambda storage: storage.find_sagas(SagaQuery(in_doubt=True)),
    "a name that is frequent": lambda storage: storage.find_sagas(SagaQuery(name="order-3")),
    "a name that doesn't occur": lambda storage: storage.find_sagas(SagaQuery(name="none")),
    "a field of contexts that doesn't occur": lambda storage: storage.find_sagas(SagaQuery(context={"n": -1})),
    "count of a day": lambda storage: storage.count_sagas(),
    "count of FAILED in a day": lambda storage: storage.count_sagas(SagaQuery(statuses=[SagaStatus.FAILED])),
    "interventions of 7 days": lambda storage: storage.find_interventions(since=datetime.now(UTC) - 7 * DAY),
    "find_stale_sagas": lambda storage: storage.find_stale_sagas(stale_after=timedelta(minutes=10)),
    "find_exhausted_sagas": lambda storage: storage.find_exhausted_sagas(),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a view took: pages of the buffer cache that it touched, and the server's time in milliseconds."""

    pages: int
    milliseconds: float
    scans: bool
    """Whether it went through a table from one end to the other."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.pages + other.pages, self.milliseconds + other.milliseconds, scans=self.scans or other.scans)


Sent: TypeAlias = tuple[Statement, Mapping[str, object]]
Costs: TypeAlias = dict[str, Cost]


async def statements_of(view: View, url: str) -> list[Sent]:
    """Return the statements that a view sends, with their parameters; ``READ_ONLY`` before each that begins with it."""
    sent: list[Sent] = []
    engine = create_async_engine(url)
    storage = SqlAlchemySagaStorage(engine)
    look, execute = storage._views._look, storage._execute  # noqa: SLF001 - there is no other way to see them

    async def looked(statement: Statement, parameters: Mapping[str, object]) -> list[list[Any]]:
        sent.extend([(READ_ONLY, {}), (statement, parameters)])
        return await look(statement, parameters)

    def executed(statement: Statement, parameters: Mapping[str, object], **how: Any) -> Any:  # noqa: ANN401 - as it is
        sent.append((statement, parameters))
        return execute(statement, parameters, **how)

    storage._views._look = looked  # type: ignore[method-assign] # noqa: SLF001 - likewise
    storage._execute = executed  # type: ignore[method-assign] # noqa: SLF001 - likewise
    await view(storage)
    await engine.dispose()
    return sent


def cost_of(connection: psycopg.Connection, query: str, parameters: Mapping[str, object] | None = None) -> Cost:
    """Return what a query costs once what it reads is in memory."""
    explained = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}".encode()
    connection.execute(explained, parameters)
    [([plan],)] = connection.execute(explained, parameters)
    top = plan["Plan"]
    pages: int = top["Shared Hit Blocks"] + top["Shared Read Blocks"]
    return Cost(pages, plan["Execution Time"], scans=any(_scans(top)))


def _scans(node: dict[str, Any]) -> Iterator[bool]:
    yield node["Node Type"] == "Seq Scan" and node["Relation Name"] in {"saga_executions", "saga_logs"}
    for inner in node.get("Plans", ()):
        yield from _scans(inner)


def costs(url: str) -> Costs:
    """Return what each view costs, and each query of that page."""
    found: Costs = {}
    # Parameters are written into the text: what is planned is what is asked.
    with psycopg.connect(url, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        for name, view in {**CONSTANT, **OTHERS}.items():
            for statement, parameters in asyncio.run(statements_of(view, url)):
                if statement is READ_ONLY:
                    continue
                cost = cost_of(connection, statement.spelled(None).named, parameters)
                found[name] = found[name] + cost if name in found else cost
        for title, query in queries_by_sql():
            found[f"By SQL: {title}"] = cost_of(connection, query)
    return found


def queries_by_sql() -> Iterator[tuple[str, str]]:
    """Yield the queries of sagas that the page shows, with the first words of what stands above each."""
    for above, query in re.findall(r"\n\n([^\n]+)(?:\n[^\n]+)*\n\n```sql\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if "FROM saga_" in query:
            yield re.split("[,:]", above)[0], query.strip().rstrip(";")


def fill(url: str, sagas: int) -> None:
    """Make the tables, and fill them."""
    schema.upgrade(url)
    sizes = {"sagas": sagas, "unfinished": max(sagas // UNFINISHED, 2), "failed": max(sagas // FAILED, 2)}
    with filling(url) as connection:
        connection.execute(SQL(SAGAS).format(**{name: Literal(size) for name, size in sizes.items()}))
        connection.execute(LOGS)
        connection.execute(INTERVENTIONS)


def break_down(url: str, outage: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SQL(BREAK_DOWN).format(outage=Literal(outage)))
        connection.execute("VACUUM ANALYZE")


def render(few: Costs, many: Costs, broken: Costs, sizes: tuple[int, int, int]) -> str:
    titles = [f"{sizes[0]:,} sagas", f"{sizes[1]:,} sagas", "ratio", f"and {sizes[2]:,} unfinished"]
    lines = [["pages (ms) of", *titles]]
    for name, cost in few.items():
        ratio = f"{many[name].pages / cost.pages:.2f}"
        lines.append([name, _cell(cost), _cell(many[name]), ratio, _cell(broken[name])])
    return "\n".join(markdown(lines))


def _cell(cost: Cost) -> str:
    return f"{cost.pages:,} ({cost.milliseconds:.1f})" + (", a scan" if cost.scans else "")


def misses(few: Costs, many: Costs) -> list[str]:
    """Return which views cost too much among many sagas, or read a whole table."""
    dearer = [
        f"{name}: {many[name].pages / few[name].pages:.2f} times as many pages"
        for name in CONSTANT
        if many[name].pages > MOST_TIMES * few[name].pages
    ]
    return dearer + [f"{name}: reads a whole table" for name, cost in many.items() if cost.scans]


def main() -> int:
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: list[Costs] = []
    with serve(options.postgres) as server:
        say(f"PostgreSQL {server.version}: {server.how}")
        url = ""
        for sagas in (options.few, options.sagas):
            url = _database(server.url, f"bench_views_{sagas}")
            began = time.monotonic()
            fill(url, sagas)
            say(f"{sagas:,} sagas with {4 * sagas:,} entries, made in {time.monotonic() - began:.0f} s")
            found.append(costs(url))
        break_down(url, options.outage)
        found.append(costs(url))
    few, many, broken = found
    report = {
        "machine": machine(options.folder),
        "sagas": [options.few, options.sagas],
        "unfinished": [UNFINISHED, UNFINISHED, options.outage],
        "costs": [{name: asdict(cost) for name, cost in costs.items()} for costs in found],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1))
    say(f"{render(few, many, broken, (options.few, options.sagas, options.outage))}\n\nall figures: {options.json}")
    missed = misses(few, many)
    for miss in missed:
        say(f"MISSED: {miss}; at most {MOST_TIMES} times, and no scan, is allowed")
    return 1 if missed else 0


def _database(url: str, name: str) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {} TEMPLATE template0").format(Identifier(name)))
    return url.rpartition("/")[0] + f"/{name}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.views", description="Count the pages that each view reads, among few sagas and many."
    )
    parser.add_argument("--sagas", type=int, default=3_000_000, help="how many are many (3,000,000)")
    parser.add_argument("--few", type=int, default=30_000, help="how many are few (30,000)")
    parser.add_argument("--outage", type=int, default=OUTAGE, help=f"how many hang in the end ({OUTAGE:,})")
    parser.add_argument("--postgres", default="embedded", help="as SAGA_STORE_TEST_PG (embedded)")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="a folder of this machine's, for its facts (.bench)"
    )
    parser.add_argument("--json", type=Path, default=FOLDER / "views.json", help="the file to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
