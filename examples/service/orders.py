"""An order: its rows, and the saga that reserves goods, takes the payment and ships."""

from uuid import UUID

from pydantic import BaseModel, Field
from sqlalchemy import ForeignKey, delete, insert, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.by_hand.runner import RefusedError, Step
from examples.service.outside import Bank, Carrier
from saga_store import Context, StepAction
from saga_store.sqlalchemy import SqlAlchemySagaStorage

NAME = "order"
"""What orders are called among the sagas."""


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "stock"

    item: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]


class Order(Base):
    """The saga of an order has the same id, so the order's row needn't say how far it has got."""

    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    item: Mapped[str]
    quantity: Mapped[int]
    payment: Mapped[str | None]
    parcel: Mapped[str | None]


class Reservation(Base):
    __tablename__ = "reservations"

    order_id: Mapped[UUID] = mapped_column(ForeignKey(Order.id), primary_key=True)
    item: Mapped[str]
    quantity: Mapped[int]


class NewOrder(BaseModel):
    """What a customer asks for."""

    item: str = Field(pattern="^[a-z ]{1,100}$")
    quantity: int = Field(ge=1, le=1000)
    price: int = Field(ge=0, le=1_000_000)
    address: str = Field(default="", max_length=500)


async def place(session: AsyncSession, order_id: UUID, order: NewOrder) -> bool:
    """Write the order and its saga in one transaction, for the caller to commit: both are there afterwards, or none.

    Returns:
        False if the order was placed before; then nothing is written.
    """
    saga = await SqlAlchemySagaStorage(session).get_or_create_saga(order_id, NAME, order.model_dump(mode="json"))
    if saga.created:
        session.add(Order(id=order_id, item=order.item, quantity=order.quantity))
    return saga.created


class ReserveGoods(Step):
    """Our own rows only: they change in the transaction that says that the step is done, so it is never in doubt."""

    async def record(self, session: AsyncSession, action: StepAction, saga_id: UUID, context: Context) -> None:
        if action == "compensate":
            await release(session, saga_id)
            return
        item, quantity = context["item"], context["quantity"]
        taken = (
            update(Stock)
            .where(Stock.item == item, Stock.free >= quantity)
            .values(free=Stock.free - quantity)
            .returning(Stock.item)
        )
        if (await session.scalar(taken)) is None:
            raise RefusedError(f"fewer than {quantity} of {item!r} are left")
        await session.execute(insert(Reservation).values(order_id=saga_id, item=item, quantity=quantity))


async def release(session: AsyncSession, order_id: UUID) -> None:
    given_back = delete(Reservation).where(Reservation.order_id == order_id).returning(Reservation)
    for reservation in await session.scalars(given_back):
        freed = Stock.free + reservation.quantity
        await session.execute(update(Stock).where(Stock.item == reservation.item).values(free=freed))


class TakePayment(Step):
    """A call elsewhere, with the order's id as its key; then a row of ours, with the end of the step."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    async def act(self, saga_id: UUID, context: Context) -> Context:
        return {"payment": await self._bank.charge(saga_id, context["price"])}

    async def undo(self, saga_id: UUID, context: Context) -> None:
        await self._bank.refund(saga_id)

    async def record(self, session: AsyncSession, action: StepAction, saga_id: UUID, context: Context) -> None:
        payment = context["payment"] if action == "act" else None
        await session.execute(update(Order).where(Order.id == saga_id).values(payment=payment))


class Ship(Step):
    """The last step: nothing can fail after it, so nothing undoes it."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    async def act(self, saga_id: UUID, context: Context) -> Context:
        item, quantity, address = context["item"], context["quantity"], context["address"]
        return {"parcel": await self._carrier.ship(saga_id, item, quantity, address)}

    async def record(self, session: AsyncSession, action: StepAction, saga_id: UUID, context: Context) -> None:
        await session.execute(update(Order).where(Order.id == saga_id).values(parcel=context["parcel"]))
        await session.execute(delete(Reservation).where(Reservation.order_id == saga_id))
