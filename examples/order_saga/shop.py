"""The business: goods, money and parcels, in tables that know nothing of sagas.

Every change is one statement, and safe to repeat: the order's id is a unique key of what it inserts, so a
step that is run again after a crash finds that its work is done.
"""

from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

TABLES = """
CREATE SCHEMA IF NOT EXISTS saga_store_demo;

CREATE TABLE IF NOT EXISTS saga_store_demo.stock (
    item     text PRIMARY KEY,
    free     integer NOT NULL CHECK (free >= 0),
    reserved integer NOT NULL CHECK (reserved >= 0)
);
CREATE TABLE IF NOT EXISTS saga_store_demo.accounts (
    customer text PRIMARY KEY,
    balance  numeric(9, 2) NOT NULL CHECK (balance >= 0)
);
CREATE TABLE IF NOT EXISTS saga_store_demo.reservations (
    order_id uuid PRIMARY KEY,
    item     text NOT NULL REFERENCES saga_store_demo.stock,
    quantity integer NOT NULL
);
CREATE TABLE IF NOT EXISTS saga_store_demo.payments (
    order_id uuid PRIMARY KEY,
    customer text NOT NULL REFERENCES saga_store_demo.accounts,
    amount   numeric(9, 2) NOT NULL
);
CREATE TABLE IF NOT EXISTS saga_store_demo.shipments (
    order_id uuid PRIMARY KEY,
    item     text NOT NULL,
    quantity integer NOT NULL
)
"""

START = """
TRUNCATE saga_store_demo.stock, saga_store_demo.accounts, saga_store_demo.reservations, saga_store_demo.payments,
    saga_store_demo.shipments;
INSERT INTO saga_store_demo.stock VALUES ('coffee', 10, 0);
INSERT INTO saga_store_demo.accounts VALUES ('alice', 100), ('bob', 5)
"""

RESERVE = """
WITH new AS (
    INSERT INTO saga_store_demo.reservations (order_id, item, quantity) VALUES (:order_id, :item, :quantity)
    ON CONFLICT DO NOTHING RETURNING item, quantity
)
UPDATE saga_store_demo.stock SET free = free - quantity, reserved = reserved + quantity
FROM new WHERE stock.item = new.item
"""

RELEASE = """
WITH gone AS (
    DELETE FROM saga_store_demo.reservations WHERE order_id = :order_id RETURNING item, quantity
)
UPDATE saga_store_demo.stock SET free = free + quantity, reserved = reserved - quantity
FROM gone WHERE stock.item = gone.item
"""

CHARGE = """
WITH new AS (
    INSERT INTO saga_store_demo.payments (order_id, customer, amount) VALUES (:order_id, :customer, :amount)
    ON CONFLICT DO NOTHING RETURNING customer, amount
)
UPDATE saga_store_demo.accounts SET balance = balance - amount
FROM new WHERE accounts.customer = new.customer
"""

REFUND = """
WITH gone AS (
    DELETE FROM saga_store_demo.payments WHERE order_id = :order_id RETURNING customer, amount
)
UPDATE saga_store_demo.accounts SET balance = balance + amount
FROM gone WHERE accounts.customer = gone.customer
"""

SHIP = """
WITH gone AS (
    DELETE FROM saga_store_demo.reservations WHERE order_id = :order_id RETURNING order_id, item, quantity
), parcel AS (
    INSERT INTO saga_store_demo.shipments (order_id, item, quantity) SELECT order_id, item, quantity FROM gone
)
UPDATE saga_store_demo.stock SET reserved = reserved - quantity
FROM gone WHERE stock.item = gone.item
"""

READ = {
    "stock": "SELECT item, free, reserved FROM saga_store_demo.stock ORDER BY item",
    "accounts": "SELECT customer, balance FROM saga_store_demo.accounts ORDER BY customer",
    "payments": "SELECT order_id, customer, amount FROM saga_store_demo.payments",
    "shipments": "SELECT order_id, item, quantity FROM saga_store_demo.shipments",
}

Row = dict[str, Any]


class PaymentDeclinedError(Exception):
    """The account doesn't cover the amount; nothing was charged."""


class Shop:
    """Each change returns whether it did something: False means that it had been done before."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def reserve(self, order_id: UUID, item: str, quantity: int) -> bool:
        return await self._change(RESERVE, order_id=order_id, item=item, quantity=quantity)

    async def release(self, order_id: UUID) -> bool:
        return await self._change(RELEASE, order_id=order_id)

    async def charge(self, order_id: UUID, customer: str, amount: Decimal) -> bool:
        try:
            return await self._change(CHARGE, order_id=order_id, customer=customer, amount=amount)
        except IntegrityError as exc:
            raise PaymentDeclinedError(f"the account of {customer} doesn't cover {amount}") from exc

    async def refund(self, order_id: UUID) -> bool:
        return await self._change(REFUND, order_id=order_id)

    async def ship(self, order_id: UUID) -> bool:
        return await self._change(SHIP, order_id=order_id)

    async def create_tables(self) -> None:
        await self._script(TABLES)

    async def start_afresh(self) -> None:
        """Forget all orders, and start with the same goods and accounts."""
        await self._script(START)

    async def read(self, table: str) -> list[Row]:
        async with self._engine.connect() as db:
            return [dict(row) for row in (await db.execute(text(READ[table]))).mappings()]

    async def _change(self, statement: str, **values: object) -> bool:
        async with self._engine.begin() as db:
            return (await db.execute(text(statement), values)).rowcount == 1

    async def _script(self, script: str) -> None:
        async with self._engine.begin() as db:
            for statement in script.split(";"):
                await db.execute(text(statement))
