"""The same saga as python-cqrs's engine runs it: 13 calls, in 6 checkpoints where the storage has runs."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import cqrs
from cqrs.saga.fallback import Fallback
from cqrs.saga.models import SagaContext
from cqrs.saga.saga import Saga
from cqrs.saga.storage.protocol import ISagaStorage

from benchmarks.workload import STEPS, Clock, new_order, receipt

T = TypeVar("T")


@dataclass
class Order(SagaContext):
    order_id: str
    customer: str
    items: list[dict[str, Any]]
    total: float
    receipts: dict[str, str] = field(default_factory=dict)


class Step(cqrs.SagaStepHandler[Order, None]):
    async def act(self, context: Order) -> cqrs.SagaStepResult[Order, None]:
        name = type(self).__name__
        context.receipts[name] = receipt(name)
        return self._generate_step_result(None)

    async def compensate(self, context: Order) -> None: ...


class OrderSaga(Saga[Order]):
    steps: ClassVar[list[type[cqrs.SagaStepHandler[Any, Any]] | Fallback]] = [type(name, (Step,), {}) for name in STEPS]


class Container(Generic[T]):
    """The smallest container that python-cqrs takes."""

    @property
    def external_container(self) -> NoReturn:
        raise NotImplementedError

    def attach_external_container(self, container: object) -> NoReturn:
        raise NotImplementedError

    async def resolve(self, type_: type[Any]) -> Any:  # noqa: ANN401 - the engine's protocol
        return type_()


SAGA = OrderSaga()
CONTAINER: Container[Any] = Container()


async def run_by_engine(storage: ISagaStorage, clock: Clock) -> None:
    """Run a saga, and time each advance: to the end of the first step, second, third, and of the saga."""
    async with SAGA.transaction(Order(**new_order()), CONTAINER, storage) as transaction:
        steps = aiter(transaction)
        try:
            while True:
                await clock.time(anext(steps))
        except StopAsyncIteration:
            pass
