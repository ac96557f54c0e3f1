"""The process that works: it runs one order, or recovers the orders that other workers left behind.

``python -m examples.order_saga.worker run ORDER_ID CUSTOMER QUANTITY [--hang]`` or
``python -m examples.order_saga.worker recover``, with DATABASE_URL set.
"""

import argparse
import asyncio
import os
import sys
from decimal import Decimal
from uuid import UUID

import di
from cqrs.bootstrap.saga import bootstrap
from cqrs.container.di import DIContainer
from cqrs.saga.recovery import recover_saga
from di.dependent import Dependent

from examples.order_saga.database import connect
from examples.order_saga.saga import DemoOrderSaga, OrderContext
from examples.order_saga.shop import PaymentDeclinedError, Shop
from examples.order_saga.terminal import say
from saga_store.cqrs import CqrsSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage

CHARGED = "the bank has charged, but doesn't answer"


class HangingShop(Shop):
    """A shop whose bank takes the money and never says so: the worst moment for a worker to die."""

    async def charge(self, order_id: UUID, customer: str, amount: Decimal) -> bool:
        charged = await super().charge(order_id, customer, amount)
        say(CHARGED)
        # Until whoever started this process kills it; or dies, which closes the pipe.
        await asyncio.to_thread(sys.stdin.read)
        return charged


async def run(order: OrderContext, storage: CqrsSagaStorage, container: DIContainer) -> None:
    mediator = bootstrap(
        container,
        sagas_mapper=lambda sagas: sagas.bind(OrderContext, DemoOrderSaga),
        saga_storage=storage,
    )
    try:
        async for _ in mediator.execute(order, saga_id=order.order_id):
            pass
    except PaymentDeclinedError as exc:
        say(f"order failed: {exc}")


async def recover(storage: CqrsSagaStorage, container: DIContainer) -> None:
    # Here every other worker is known to be dead. A job that runs beside living ones would pass
    # stale_after_seconds, longer than any step takes.
    found = await storage.get_sagas_for_recovery(limit=100, saga_name=DemoOrderSaga.__name__)
    say(f"interrupted orders: {len(found)}")
    for saga_id in found:
        say(f"recovering order {saga_id}")
        try:
            await recover_saga(DemoOrderSaga(), saga_id, OrderContext, container, storage)
        except PaymentDeclinedError as exc:
            say(f"order failed: {exc}")
        except RuntimeError as exc:
            # So python-cqrs says that it has finished a compensation that was interrupted.
            say(f"order undone: {exc}")


def container_for(shop: Shop) -> DIContainer:
    """Tell python-cqrs how to build the steps: whoever asks for a Shop gets this one."""
    bindings = di.Container()
    bindings.bind(di.bind_by_type(Dependent(lambda: shop, scope="request"), Shop))
    container = DIContainer()
    container.attach_external_container(bindings)
    return container


async def main(arguments: argparse.Namespace) -> None:
    engine = connect(os.environ["DATABASE_URL"])
    storage = CqrsSagaStorage(SqlAlchemySagaStorage(engine), write_ahead=True)
    try:
        if arguments.command == "recover":
            await recover(storage, container_for(Shop(engine)))
        else:
            order = OrderContext(arguments.order_id, arguments.customer, arguments.quantity)
            shop = HangingShop(engine) if arguments.hang else Shop(engine)
            await run(order, storage, container_for(shop))
    finally:
        await engine.dispose()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.order_saga.worker")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run one order")
    running.add_argument("order_id", type=UUID)
    running.add_argument("customer")
    running.add_argument("quantity", type=int)
    running.add_argument("--hang", action="store_true", help="let the bank hang once it has charged")
    commands.add_parser("recover", help="recover the orders that were interrupted")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parse_arguments()))
