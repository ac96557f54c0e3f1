"""The story: an order whose worker is killed, and one that can't be paid.

Run it from the project's root with ``make demo`` or ``python -m examples.order_saga``.
"""

import asyncio
import sys
import uuid

from examples.order_saga.database import FOLDER, connect, database
from examples.order_saga.processes import DemoError, look, migrate, work
from examples.order_saga.saga import OrderContext
from examples.order_saga.shop import Shop
from examples.order_saga.terminal import say, show
from examples.order_saga.worker import CHARGED
from saga_store import SagaStatus
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing.postgres import PostgresUnavailableError
from saga_store.web import render_saga

ALICE = OrderContext(uuid.uuid4(), "alice", quantity=2)
BOB = OrderContext(uuid.uuid4(), "bob", quantity=3)


class Story:
    def __init__(self, url: str) -> None:
        self._url = url
        self._engine = connect(url)
        self._sagas = SqlAlchemySagaStorage(self._engine)
        self._shop = Shop(self._engine)

    async def tell(self) -> None:
        try:
            await self._open_the_shop()
            await self._kill_a_worker()
            await self._recover()
            await self._fail_a_payment()
            await self._check()
            await self._look_back()
        finally:
            await self._engine.dispose()

    async def _open_the_shop(self) -> None:
        chapter("2. A shop")
        await self._shop.create_tables()
        say("  A demo that was interrupted may have left orders half done; they are finished first.")
        await self._work("recover")
        await self._shop.start_afresh()
        await self._show_shop("stock", "accounts")

    async def _kill_a_worker(self) -> None:
        chapter("3. Alice orders 2 coffees, and her worker is killed in the middle of the payment")
        await self._work("run", *order_arguments(ALICE), "--hang", kill_at=CHARGED)
        say("\n  What the database knows about her order now:")
        await self._show_saga(ALICE)
        await self._show_shop("stock", "payments")
        say("\n  Look: she has paid, but the saga is RUNNING, and its TakePayment STARTED and has no outcome.")

    async def _recover(self) -> None:
        chapter("4. Another process finds the order, and goes on from the step that was under way")
        await self._work("recover")
        await self._show_saga(ALICE)
        await self._show_shop("stock", "accounts", "payments", "shipments")
        say("\n  Look: TakePayment STARTED twice, ReserveStock once; and there is one payment, of 24.00.")

    async def _fail_a_payment(self) -> None:
        chapter("5. Bob orders 3 coffees, which cost more than he has")
        await self._work("run", *order_arguments(BOB))
        await self._show_saga(BOB)
        await self._show_shop("stock", "accounts", "payments", "shipments")
        say("\n  Look: TakePayment FAILED, so ReserveStock was compensated, and nothing is left reserved.")

    async def _check(self) -> None:
        chapter("6. Is all of that true?")
        alice, bob = await self._sagas.get_saga(ALICE.order_id), await self._sagas.get_saga(BOB.order_id)
        payments, shipments = await self._shop.read("payments"), await self._shop.read("shipments")
        accounts, stock = await self._shop.read("accounts"), await self._shop.read("stock")
        facts = {
            "alice's order is COMPLETED": alice.status is SagaStatus.COMPLETED,
            "bob's order is FAILED": bob.status is SagaStatus.FAILED,
            "there is one payment, alice's": [row["order_id"] for row in payments] == [ALICE.order_id],
            "there is one shipment, alice's": [row["order_id"] for row in shipments] == [ALICE.order_id],
            "alice was charged once, bob not at all": [row["balance"] for row in accounts] == [100 - ALICE.total, 5],
            "2 of 10 coffees are gone, none is reserved": stock == [{"item": "coffee", "free": 8, "reserved": 0}],
        }
        for fact, holds in facts.items():
            say(f"  {'ok' if holds else 'NO'}  {fact}")
        if wrong := [fact for fact, holds in facts.items() if not holds]:
            raise DemoError(f"it isn't so that {', or that '.join(wrong)}")

    async def _look_back(self) -> None:
        """Show alice's order as whoever is called at night would see it."""
        chapter("7. What an operator sees of alice's order")
        await look(self._url, "show", ALICE.order_id.hex[:8])
        page = FOLDER / "alices_order.html"
        FOLDER.mkdir(exist_ok=True)
        page.write_text(await render_saga(self._sagas, ALICE.order_id), encoding="utf-8")
        say(f"\n  The same as a page for a browser: {page}")

    async def _work(self, *arguments: str, kill_at: str | None = None) -> None:
        await work(self._url, *arguments, kill_at=kill_at)

    async def _show_saga(self, order: OrderContext) -> None:
        saga = await self._sagas.get_saga(order.order_id)
        history = await self._sagas.get_step_history(order.order_id)
        show("saga_executions", [{"id": saga.id, "name": saga.name, "status": saga.status, "version": saga.version}])
        show(
            "saga_logs",
            [
                {
                    "created_at": f"{entry.created_at:%H:%M:%S.%f}",
                    "step_name": entry.step_name,
                    "action": entry.action,
                    "status": entry.status,
                    "details": entry.details,
                }
                for entry in history
            ],
        )

    async def _show_shop(self, *tables: str) -> None:
        for table in tables:
            show(table, await self._shop.read(table))


def chapter(title: str) -> None:
    say(f"\n{title}\n{'-' * len(title)}")


def order_arguments(order: OrderContext) -> tuple[str, str, str]:
    return str(order.order_id), order.customer, str(order.quantity)


async def tell(url: str) -> None:
    await migrate(url)
    await Story(url).tell()


def main() -> None:
    chapter("1. A database, with the tables saga_executions and saga_logs")
    try:
        with database() as (url, what):
            say(f"  It is {what}.")
            asyncio.run(tell(url))
    except (DemoError, PostgresUnavailableError) as exc:
        sys.exit(f"\nThe demo failed: {exc}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run it again: it finishes what it left half done.")
    say("\nThat's it. The code to read: examples/order_saga/saga.py, then worker.py.")


if __name__ == "__main__":
    main()
