"""The web process: takes orders, works on them in the background, and shows how they are.

``uvicorn examples.service.web:app``, as many processes as you like, with DATABASE_URL set.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response, status
from starlette.types import Receive, Scope, Send

from examples.service.orders import NewOrder, Order, place
from examples.service.wiring import Service, opened
from saga_store import SagaNotFoundError, SagaTimeoutError, schema
from saga_store.telemetry.prometheus import CONTENT_TYPE, SagaCollector
from saga_store.web import create_app

routes = APIRouter()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    logging.basicConfig(level=logging.INFO)
    # Leaving the worker waits for what is at work; what isn't finished after its grace is left to other processes.
    async with opened() as service, service.worker:
        storage = service.storage
        yield {"service": service, "collector": SagaCollector(storage), "pages": create_app(storage)}


@routes.put("/orders/{order_id}", status_code=status.HTTP_202_ACCEPTED)
async def put_order(order_id: UUID, order: NewOrder, request: Request) -> dict[str, str]:
    """Place an order under an id of the customer's: to send it again, after an answer got lost, is safe."""
    service: Service = request.state.service
    async with service.sessions.begin() as session:
        is_new = await place(session, order_id, order)
    if is_new:
        await service.worker.take(order_id)
    return {"id": str(order_id)}


@routes.get("/orders/{order_id}")
async def get_order(
    order_id: UUID, request: Request, wait: Annotated[float, Query(ge=0, le=30)] = 0
) -> dict[str, str | None]:
    """Tell how an order is: at once, or when it has ended, but not later than ``wait`` seconds from now."""
    service: Service = request.state.service
    try:
        saga_status: str = (await service.storage.wait_for_saga(order_id, timedelta(seconds=wait))).status
    except SagaTimeoutError as exc:
        saga_status = exc.status
    except SagaNotFoundError as exc:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "there is no such order") from exc
    async with service.sessions() as session:
        order = await session.get_one(Order, order_id)
    return {"id": str(order_id), "status": saga_status, "payment": order.payment, "parcel": order.parcel}


@routes.get("/live")
async def live() -> str:
    """Whether the process answers; the database is no reason to restart it."""
    return "alive"


@routes.get("/ready")
async def ready(request: Request, response: Response) -> str:
    """Whether the database is there, and its tables are those that this release needs, or later ones."""
    try:
        check = await schema.acheck(request.state.service.engine)
    except schema.MigrationError as exc:
        response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
        return str(exc)
    if not check.is_ready:
        response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    return check.state


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(await request.state.collector.scrape(), media_type=CONTENT_TYPE)


async def sagas(scope: Scope, receive: Receive, send: Send) -> None:
    """Show the pages of the lifespan that there is: an application may have several, one after the other."""
    await scope["state"]["pages"](scope, receive, send)


app = FastAPI(title="Orders", lifespan=lifespan)
app.include_router(routes)
app.mount("/ops/sagas", sagas)
