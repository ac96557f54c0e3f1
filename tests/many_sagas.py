"""Three hundred sagas of all kinds in memory, and hostile ones, as of one moment: what pages are looked at with."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

from saga_store import Checkpoint, LogStep, MemorySagaStorage, SagaStatus, SagaStepStatus
from saga_store.memory import MemoryDatabase
from saga_store.model import StepAction

NOW = datetime(2026, 11, 26, 0, 44, 17, tzinfo=UTC)
HOSTILE = (
    "päyment \x1b[31mRED\x1b[0m \u202eevil\u202c <script>alert(1)</script> <img src=x onerror=alert(2)> "
    "{{ 7*7 }} {% raw %} '\"`$(id)`; rm -rf / & \u200b\ufeff\u2066 javascript:alert(3) ]]> <!--"
)
WIDE = "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 255
HOSTILE_TEXTS = (HOSTILE[:250], WIDE, "</title></style><script>alert(4)</script>", "\n\t\r", " ")
"""What hostile sagas have as name, step, owner, details and context."""
ERRORS = (
    "httpx.ConnectTimeout: https://shipping.internal:8443/v2/labels timed out after 10.0s",
    "gateway.GatewayError: 503 upstream connect error\n  upstream: pay-2.internal\n  request_id=req_8f21ab",
    "PaymentDeclined: card_declined (insufficient_funds) request_id=req_8f21ab",
    'Traceback (most recent call last):\n  File "ship.py", line 7, in ship\n    raise Late\nLate: 17 days',
)
STARTED, COMPLETED, FAILED, COMPENSATED = SagaStepStatus


@dataclass
class Clock:
    """The database's clock, which stands still until it is set."""

    now: datetime = NOW

    def __call__(self) -> datetime:
        return self.now


@dataclass
class ManySagas:
    """The storage, and some sagas by what is special about them."""

    clock: Clock = field(default_factory=Clock)
    named: dict[str, UUID] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.storage = MemorySagaStorage(MemoryDatabase(clock=self.clock))
        self._number = 0

    @property
    def ids(self) -> list[UUID]:
        return list(self.named.values())

    async def begin(self, name: str, ago: float, *, special: str | None = None, context: object = None) -> "Story":
        self._number += 1
        saga_id = UUID(int=(0x7B0FFE96 + self._number * 7919) << 96 | 0x4000 << 64 | 0x8 << 60 | self._number)
        self.named[special or f"{name} {self._number}"] = saga_id
        story = Story(self, saga_id, ago)
        await story.save(name=name, status=SagaStatus.RUNNING, context=context or {"order_id": f"o-{self._number}"})
        return story


@dataclass
class Story:
    """What happens to one saga, so many seconds before now."""

    sagas: ManySagas
    saga_id: UUID
    ago: float

    async def save(self, **checkpoint: object) -> None:
        self.sagas.clock.now = NOW - timedelta(seconds=self.ago)
        await self.sagas.storage.save(Checkpoint(self.saga_id, **checkpoint))  # type: ignore[arg-type] # its fields

    async def log(
        self, step: str, status: SagaStepStatus, *, action: StepAction = "act", details: str | None = None
    ) -> None:
        await self.save(steps=[LogStep(step, action, status, details)])

    async def step(
        self,
        step: str,
        took: float,
        status: SagaStepStatus = COMPLETED,
        *,
        action: StepAction = "act",
        details: str | None = None,
    ) -> None:
        await self.log(step, STARTED, action=action)
        self.ago -= took
        await self.log(step, status, action=action, details=details)

    async def end(self, status: SagaStatus) -> None:
        await self.save(status=status)


async def make_many_sagas() -> ManySagas:
    """Make them; what happened last is the clock's end."""
    many = ManySagas()
    await _finished(many)
    await _stuck(many)
    await _held(many)
    await _intervened(many)
    await _long(many)
    await _hostile(many)
    many.clock.now = NOW
    return many


async def _finished(many: ManySagas) -> None:
    for number in range(140):
        story = await many.begin("order", 80_000 - number * 500)
        await story.step("ReserveStock", 0.6)
        await story.step("TakePayment", 0.3)
        await story.step("Ship", 5)
        await story.end(SagaStatus.COMPLETED)
    for number in range(40):
        story = await many.begin("refund", 70_000 - number * 900, special=f"failed {number}")
        await story.step("RefundPayment", 0.5)
        await story.step("RestockItems", 2.25, FAILED, details=ERRORS[number % 4])
        await story.step("RefundPayment", 0.4, COMPENSATED, action="compensate")
        await story.end(SagaStatus.FAILED)


async def _stuck(many: ManySagas) -> None:
    for number in range(7):
        story = await many.begin("subscription-renewal", 23_000 - number * 300, special=f"exhausted {number}")
        await story.step("PriceQuote", 0.169)
        for silence in (0.01, 30, 87, 267, 807):
            story.ago -= silence
            await story.step("ChargeCard", 3, FAILED, details=ERRORS[number % 3])
        await story.save(recovery_attempts=5)
    for number in range(54):
        story = await many.begin("order", 7000 - number * 40, special=f"in doubt {number}")
        await story.step("ReserveStock", 0.625)
        if number % 3:
            await story.log("TakePayment", STARTED)
        else:
            await story.step("TakePayment", 0.29)
            await story.step("Ship", 7.7, FAILED, details=ERRORS[0])
            await story.save(status=SagaStatus.COMPENSATING)
            await story.log("TakePayment", STARTED, action="compensate")
    for number in range(9):
        await many.begin("invoice", 1500 + number, special=f"never began {number}")
    for number in range(6):
        story = await many.begin("order", 3000 - number, special=f"between two steps {number}")
        await story.step("ReserveStock", 0.5)
    for number in range(3):
        story = await many.begin("order", 4000 - number, special=f"failed in doubt {number}")
        await story.log("Ship", STARTED)
        await story.end(SagaStatus.FAILED)


async def _held(many: ManySagas) -> None:
    for name, count, lease in (("onboarding", 8, 60), ("shipping", 5, 7200)):
        for number in range(count):
            story = await many.begin(name, 4000 - number * 30, special=f"{name} {number}")
            await story.step("VerifyIdentity", 1.5)
        many.clock.now = NOW - timedelta(seconds=2800)
        owner = f"worker-7f9c.eu-1 pid {lease}"
        await many.storage.claim_sagas(
            owner=owner, lease=timedelta(seconds=lease), limit=count, stale_after=timedelta(seconds=1), name=name
        )
        for number in range(count):
            await Story(many, many.named[f"{name} {number}"], 2790 - number).log("ProvisionTenant", STARTED)
    for number in range(12):
        story = await many.begin("order", 40 + number, special=f"active {number}")
        await story.step("ReserveStock", 0.5)


async def _intervened(many: ManySagas) -> None:
    for number in range(10):
        story = await many.begin("subscription-renewal", 20_000 - number * 100, special=f"given up {number}")
        for silence in (0.01, 30, 87):
            story.ago -= silence
            await story.step("ChargeCard", 3, FAILED, details=ERRORS[2])
        many.clock.now = NOW - timedelta(seconds=1500 - number)
        await many.storage.give_up_saga(story.saga_id, by="alice", reason="card network says: never retry (case 4711)")
    story = await many.begin("order", 9000, special="settled")
    await story.log("TakePayment", STARTED)
    many.clock.now = NOW - timedelta(seconds=800)
    [entry] = await many.storage.get_in_doubt_steps(story.saga_id)
    await many.storage.settle_step(story.saga_id, entry.id, COMPLETED, by="bob", reason="paid, says the bank")


async def _long(many: ManySagas) -> None:
    story = await many.begin("order", 6500, special="polls")
    for number in range(149):
        await story.step("PollCarrier", 0.4 + number % 5 / 10, FAILED if number % 11 == 0 else COMPLETED)
        story.ago -= 30
    await story.step("ReserveStock", 0.2)
    story = await many.begin("order", 90_000, special="5,000 entries")
    for number in range(5000):
        await story.log(f"Step{number % 60}", COMPLETED, details="x" * (number % 50 * 100))
        story.ago -= 1


async def _hostile(many: ManySagas) -> None:
    for number, text in enumerate(HOSTILE_TEXTS):
        context = {text: text, "deep": _deep(400), "none": None}
        story = await many.begin(text, 5000 - number, special=f"hostile {number}", context=context)
        await story.step(text, 1, FAILED, details=HOSTILE + "\n" + text * 50)
        await story.log(text, STARTED, details=text)
        many.clock.now = NOW - timedelta(seconds=4000)
        await many.storage.reset_recovery_attempts(story.saga_id, by=text, reason=HOSTILE + text)
    story = await many.begin("huge", 4000, special="huge", context={"numbers": list(range(400_000))})
    await story.log("Ship", FAILED, details="\u202e\n<b>" * 1_000_000)
    await many.begin("wide", 4000, special="big", context={"numbers": list(range(100_000))})


def _deep(levels: int) -> object:
    value: object = "bottom"
    for _ in range(levels):
        value = [value]
    return value
