"""The bank and the carrier: services of others, as far as this example needs them.

In life they are reached by HTTP. Here they are tables in a schema of their own, each call one statement that is
committed at once, with a wait before it and after it. What matters is the same: a call has a key, the order's id, and
does its work once for that key; and to cancel what never came keeps it from coming.
"""

import asyncio
import os
import random
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncEngine

from examples.by_hand.runner import RefusedError

MOST_ON_CREDIT = 500
SECONDS_AWAY = float(os.environ.get("SECONDS_AWAY", "0.1"))
"""How long a call travels at most, there and back again."""

TABLES = """
CREATE SCHEMA IF NOT EXISTS outside;
CREATE TABLE IF NOT EXISTS outside.payments (
    key uuid PRIMARY KEY, amount integer NOT NULL, calls integer NOT NULL DEFAULT 1, refunded boolean NOT NULL
);
CREATE TABLE IF NOT EXISTS outside.parcels (
    key uuid PRIMARY KEY, item text NOT NULL, quantity integer NOT NULL, calls integer NOT NULL DEFAULT 1
)
"""

CHARGE = text("""
INSERT INTO outside.payments AS p (key, amount, refunded) VALUES (:key, :amount, FALSE)
ON CONFLICT (key) DO UPDATE SET calls = p.calls + 1 RETURNING refunded
""")
REFUND = text("""
INSERT INTO outside.payments (key, amount, refunded) VALUES (:key, 0, TRUE)
ON CONFLICT (key) DO UPDATE SET refunded = TRUE RETURNING refunded
""")
SHIP = text("""
INSERT INTO outside.parcels AS p (key, item, quantity) VALUES (:key, :item, :quantity)
ON CONFLICT (key) DO UPDATE SET calls = p.calls + 1 RETURNING key
""")


class Bank:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def charge(self, key: UUID, amount: int) -> str:
        """Charge once for this key, and return the payment's number; refused above a limit, and after a refund."""
        if amount > MOST_ON_CREDIT:
            raise RefusedError(f"{amount} is more than the account covers")
        if (await _call(self._engine, CHARGE, key=key, amount=amount)).refunded:
            raise RefusedError("the payment was cancelled")
        return f"p-{key.hex[:12]}"

    async def refund(self, key: UUID) -> None:
        """Give back what was charged for this key; if nothing was, nothing ever will be."""
        await _call(self._engine, REFUND, key=key)


class Carrier:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def ship(self, key: UUID, item: str, quantity: int, address: str) -> str:
        """Send one parcel for this key, and return its number; refused without an address."""
        if not address:
            raise RefusedError("there is no address to ship to")
        await _call(self._engine, SHIP, key=key, item=item, quantity=quantity)
        return f"s-{key.hex[:12]}"


async def _call(engine: AsyncEngine, statement: Any, **values: object) -> Row[Any]:  # noqa: ANN401 - a text() clause
    await _travel()
    async with engine.begin() as connection:
        answer = (await connection.execute(statement, values)).one()
    await _travel()
    return answer


async def _travel() -> None:
    await asyncio.sleep(random.uniform(0, SECONDS_AWAY))  # noqa: S311 - no secret
