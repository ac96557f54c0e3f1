"""Kill the processes of examples/service under load until all orders have ended, and compare what came of them.

python -m tests.service_kills [--orders N] [--kills N] [--seed S]

Customers place orders by HTTP, at whichever web process answers; they send one again until they hear that it was taken,
and then look until it has ended, before they place another. Meanwhile processes die by SIGKILL, web and worker, and
others take their place. In the end each order has to be one
whole: paid, shipped and gone from the stock, or none of it; and its history has to tell the story of that, whoever told
which part.
"""

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
from psycopg.rows import namedtuple_row
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from examples.service.migrate import GOODS, create_tables
from examples.service.processes import Processes
from saga_store import SagaStatus, schema
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing.postgres import serve
from tests.connections import free_port

CUSTOMERS = 12
LEASE_SECONDS = 2.0
MOST_SECONDS = 900.0
SETTINGS = {"LEASE_SECONDS": str(LEASE_SECONDS), "SECONDS_AWAY": "0.5"}

STEPS = ("ReserveGoods", "TakePayment", "Ship")
WHOLE = [(step, "act", status) for step in STEPS for status in ("STARTED", "COMPLETED")]
Story = list[tuple[str, str, str]]


def undone(failed: str) -> Story:
    """Return the story of an order that a step refuses."""
    at = STEPS.index(failed)
    back = [(step, "compensate", status) for step in reversed(STEPS[:at]) for status in ("STARTED", "COMPENSATED")]
    return [*WHOLE[: 2 * at], (failed, "act", "STARTED"), (failed, "act", "FAILED"), *back]


@dataclass(frozen=True)
class Kind:
    """What a customer asks for, how often, and how it has to end."""

    weight: int
    order: dict[str, object]
    story: Story

    @property
    def status(self) -> str:
        return SagaStatus.COMPLETED if self.story == WHOLE else SagaStatus.FAILED


KINDS = (
    Kind(6, {"item": "coffee", "quantity": 2, "price": 24, "address": "here"}, WHOLE),
    Kind(1, {"item": "coffee", "quantity": 1, "price": 12, "address": ""}, undone("Ship")),
    Kind(1, {"item": "coffee", "quantity": 3, "price": 9999, "address": "here"}, undone("TakePayment")),
    Kind(1, {"item": "tea", "quantity": 999, "price": 1, "address": "here"}, undone("ReserveGoods")),
)


@dataclass
class Outcome:
    """What came of it: ``problems`` is empty if nothing is inconsistent."""

    orders: dict[UUID, Kind]
    kills: Counter[str] = field(default_factory=Counter)
    sent_again: int = 0
    reset: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    taken_up: int = 0
    repeated: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{len(self.orders)} orders, {self.kills.total()} kills ({self.kills['web']} web, {self.kills['worker']} "
            f"worker) in {self.seconds:.0f} s; {self.ended['COMPLETED']} completed, {self.ended['FAILED']} undone; "
            f"{self.taken_up} taken up by another process, {self.repeated} calls of services repeated, "
            f"{self.sent_again} requests sent again; {self.reset} reset by an operator; "
            f"{len(self.problems)} inconsistent"
        )


class Killing:
    """The customers, who kills, and the operator."""

    def __init__(self, url: str, orders: int, kills: int, seed: str, log: Path) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable
        kinds = self._random.choices(KINDS, [kind.weight for kind in KINDS], k=orders)
        self.outcome = Outcome({UUID(int=self._random.getrandbits(128), version=4): kind for kind in kinds})
        self._kills = kills
        self._all_have_ended = asyncio.Event()
        self._url = make_url(url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
        self._processes = Processes(self._url, [free_port(), free_port()], SETTINGS, log=log)

    def run(self) -> Outcome:
        asyncio.run(create_tables(self._url))
        with self._processes.running():
            self._processes.wait_until_ready()
            begun = time.monotonic()
            asyncio.run(self._until_all_have_ended())
            self.outcome.seconds = time.monotonic() - begun
        return self.outcome

    async def _until_all_have_ended(self) -> None:
        waiting = list(self.outcome.orders)
        engine = create_async_engine(self._url)
        try:
            async with asyncio.timeout(MOST_SECONDS), asyncio.TaskGroup() as tasks, httpx.AsyncClient() as client:
                operator = tasks.create_task(self._operate(SqlAlchemySagaStorage(engine)))
                killing = tasks.create_task(self._kill())
                async with asyncio.TaskGroup() as customers:
                    for _ in range(CUSTOMERS):
                        customers.create_task(self._order(client, waiting))
                self._all_have_ended.set()
                await killing
                operator.cancel()
        finally:
            await engine.dispose()

    async def _order(self, client: httpx.AsyncClient, waiting: list[UUID]) -> None:
        """Be a customer: one order after the other, each until it has ended."""
        while waiting:
            order_id = waiting.pop()
            order = self.outcome.orders[order_id].order
            while await self._ask(client, "PUT", order_id, order) is None:
                self.outcome.sent_again += 1
                await asyncio.sleep(0.1)
            while (await self._ask(client, "GET", order_id) or {}).get("status") not in {"COMPLETED", "FAILED"}:  # noqa: ASYNC110 - over HTTP
                await asyncio.sleep(0.2)

    async def _ask(
        self, client: httpx.AsyncClient, method: str, order_id: UUID, order: Mapping[str, object] | None = None
    ) -> dict[str, str] | None:
        """Return what one of the web processes answers; None if it doesn't, or can't."""
        url = f"http://127.0.0.1:{self._random.choice(self._processes.ports)}/orders/{order_id}?wait=3"
        with suppress(httpx.TransportError):
            answer = await client.request(method, url, json=order, timeout=10)
            if answer.is_success:
                return dict(answer.json())
        return None

    async def _kill(self) -> None:
        """Kill some processes, mostly one, and start them again, once and again until all orders have ended."""
        while self.outcome.kills.total() < self._kills or not self._all_have_ended.is_set():
            await asyncio.sleep(self._random.uniform(0, 2))
            for name in self._random.sample(self._processes.names, self._random.choice((1, 1, 1, 2, 3))):
                self._processes.kill(name)
                self.outcome.kills[name.partition(" ")[0]] += 1
                self._processes.start(name)
            await asyncio.to_thread(self._processes.wait_until_ready)

    async def _operate(self, storage: SqlAlchemySagaStorage) -> None:
        """Give those sagas new attempts whose processes have died too often, as a person would."""
        while True:
            for saga in await storage.find_exhausted_sagas():
                await storage.reset_recovery_attempts(saga.id, by="operator", reason="its processes were killed")
                self.outcome.reset += 1
            await asyncio.sleep(0.2)


QUERY = """
SELECT s.id, s.status, s.recovery_attempts, s.lease_owner, o.quantity, o.payment, o.parcel,
    (SELECT array_agg(l.step_name || ' ' || l.action || ' ' || l.status ORDER BY l.id) FROM saga_logs l
        WHERE l.saga_id = s.id AND NOT starts_with(l.step_name, 'saga_store.')) AS history,
    p.amount, p.refunded, p.calls AS charges, d.quantity AS shipped, d.calls AS shipments
FROM saga_executions s FULL JOIN orders o ON o.id = s.id
FULL JOIN outside.payments p ON p.key = s.id FULL JOIN outside.parcels d ON d.key = s.id
"""


def compare(url: str, outcome: Outcome) -> None:
    """Look for what doesn't fit: between an order, its saga, its payment and its parcel, and in the stock."""
    with psycopg.connect(url, row_factory=namedtuple_row) as connection:
        rows: dict[UUID, Any] = {row[0]: row for row in connection.execute(QUERY.encode())}
        stock: dict[str, int] = dict(connection.execute("SELECT item, free FROM stock").fetchall())
        [[reserved]] = connection.execute("SELECT count(*) FROM reservations").fetchall()
    if rows.keys() != outcome.orders.keys():
        outcome.problems.append(f"{len(outcome.orders)} orders were placed, and {len(rows)} are there")
    gone = Counter[str]()
    for order_id in rows.keys() & outcome.orders.keys():
        row, kind = rows[order_id], outcome.orders[order_id]
        is_whole = kind.status == SagaStatus.COMPLETED
        said = [tuple(entry.split()) for entry in row.history or ()]
        facts = {
            f"{row.status} under the lease {row.lease_owner}": (row.status, row.lease_owner) == (kind.status, None),
            f"told as {said}": [entry for entry, _ in groupby(said)] == kind.story,
            f"paid {row.amount}, refunded: {row.refunded}": (row.amount, row.refunded) == (kind.order["price"], False)
            if is_whole
            else row.refunded is not False,
            f"shipped {row.shipped}": row.shipped == (kind.order["quantity"] if is_whole else None),
            f"an order with {row.payment} and {row.parcel}": (row.payment is not None, row.parcel is not None)
            == (is_whole, is_whole),
        }
        outcome.problems += [
            f"order {order_id}, of {kind.order}, is {fact}" for fact, is_so in facts.items() if not is_so
        ]
        outcome.ended[row.status] += 1
        outcome.taken_up += row.recovery_attempts > 0
        outcome.repeated += max((row.charges or 0) - 1, 0) + max((row.shipments or 0) - 1, 0)
        if is_whole:
            gone[str(kind.order["item"])] += row.quantity
    left = {str(goods["item"]): goods["free"] - gone[str(goods["item"])] for goods in GOODS}  # type: ignore[operator] # a number
    if stock != left or reserved:
        outcome.problems.append(f"the stock is {stock}, {reserved} are reserved, and it ought to be {left}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.service_kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--orders", type=int, default=300)
    parser.add_argument("--kills", type=int, default=40, help="at least; it goes on until all orders have ended")
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--url", help="a migrated database without orders (default: one of its own)")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)  # noqa: T201 - a program's output
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        url = given.url
        if url is None:
            url = stack.enter_context(serve("embedded")).url
            schema.upgrade(url)
        try:
            outcome = Killing(url, given.orders, given.kills, given.seed, log).run()
        except BaseException:
            print("\n".join(log.read_text().splitlines()[-100:]))  # noqa: T201 - as above
            raise
        compare(url, outcome)
    print(outcome)  # noqa: T201 - as above
    for problem in outcome.problems[:20]:
        print(f"! {problem}")  # noqa: T201 - as above
    return int(bool(outcome.problems))


if __name__ == "__main__":
    sys.exit(main())
