"""The saga: three steps, each with what undoes it, written for python-cqrs as any application would."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

from cqrs.handlers.saga import SagaStepHandler, SagaStepResult
from cqrs.saga.fallback import Fallback
from cqrs.saga.models import SagaContext
from cqrs.saga.saga import Saga

from examples.order_saga.shop import Shop
from examples.order_saga.terminal import say


@dataclass
class OrderContext(SagaContext):
    """What travels from step to step, and comes back from the database after a crash.

    The order's id is the saga's id too. The steps hand it to the shop as the key of what they write, which
    is what makes them safe to repeat.
    """

    order_id: UUID
    customer: str
    quantity: int
    item: str = "coffee"
    price: Decimal = Decimal("12.00")

    @property
    def total(self) -> Decimal:
        return self.quantity * self.price


class OrderStep(SagaStepHandler[OrderContext, None]):
    """What the steps have in common: they change the shop, and say so."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop

    def _say(self, what: str) -> None:
        say(f"{type(self).__name__}: {what}")


class ReserveStock(OrderStep):
    async def act(self, context: OrderContext) -> SagaStepResult[OrderContext, None]:
        new = await self._shop.reserve(context.order_id, context.item, context.quantity)
        self._say(f"reserved {context.quantity} x {context.item}" if new else "that was done before")
        return self._generate_step_result(None)

    async def compensate(self, context: OrderContext) -> None:
        new = await self._shop.release(context.order_id)
        self._say(f"released {context.quantity} x {context.item}" if new else "nothing to release")


class TakePayment(OrderStep):
    async def act(self, context: OrderContext) -> SagaStepResult[OrderContext, None]:
        new = await self._shop.charge(context.order_id, context.customer, context.total)
        self._say(f"charged {context.customer} {context.total}" if new else "that was done before, so not again")
        return self._generate_step_result(None)

    async def compensate(self, context: OrderContext) -> None:
        new = await self._shop.refund(context.order_id)
        self._say(f"refunded {context.customer} {context.total}" if new else "nothing to refund")


class Ship(OrderStep):
    async def act(self, context: OrderContext) -> SagaStepResult[OrderContext, None]:
        new = await self._shop.ship(context.order_id)
        self._say(f"shipped {context.quantity} x {context.item}" if new else "that was done before")
        return self._generate_step_result(None)

    async def compensate(self, context: OrderContext) -> None:
        """Do nothing: it's the last step, so nothing can fail after it."""


class DemoOrderSaga(Saga[OrderContext]):
    """The class's name is the saga's name in the database; the steps' names are those in its history."""

    steps: ClassVar[list[type[SagaStepHandler[Any, Any]] | Fallback]] = [ReserveStock, TakePayment, Ship]
