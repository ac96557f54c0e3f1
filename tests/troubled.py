"""Sagas in trouble of every kind, at a time that stands still, for what is shown to be the same each time."""

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psycopg

NOW = datetime(2026, 11, 26, 3, 0, tzinfo=UTC)
HOSTILE = "z\x1b[31m\x9b2J\u202egnp.\u200b\u2028[bold]<script>`$(id)`'\";\n\t\u5929\u6c17 \U0001f600"

# The views ask for the time by a name that isn't qualified, so another schema of the path can answer.
CLOCK = """
    CREATE SCHEMA clock;
    CREATE TABLE clock.hand (now timestamptz NOT NULL);
    INSERT INTO clock.hand VALUES ('2026-11-26 03:00:00+00');
    CREATE FUNCTION clock.statement_timestamp() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT now FROM clock.hand';
    DO $$ BEGIN
        EXECUTE format('ALTER DATABASE %I SET search_path = clock, pg_catalog, public', current_database());
    END $$;
"""


def saga_id(number: int) -> UUID:
    """Return an id that tells its saga by its first digits."""
    return UUID(f"{number:08x}-5cc1-47af-b20d-245caf7a6e06")


def stop_the_clock(admin: psycopg.Connection, now: datetime = NOW) -> None:
    """Let the views find that it is this time; connections that are made from now on."""
    if admin.execute("SELECT to_regnamespace('clock')").fetchone() == (None,):
        admin.execute(CLOCK)
    admin.execute("UPDATE clock.hand SET now = %s", [now])


def make_saga(  # noqa: PLR0913 - a row's columns
    admin: psycopg.Connection,
    number: int,
    name: str,
    status: str,
    created_at: datetime,
    *,
    updated_at: datetime | None = None,
    attempts: int = 0,
    lease: tuple[str, timedelta] | None = None,
    steps: str = "",
    context: object = None,
) -> UUID:
    """Make a saga; ``steps`` are lines of: seconds after its creation, action, step, status, and details or nothing."""
    owner, expires = (None, None) if lease is None else (lease[0], NOW + lease[1])
    entries = [line.split(maxsplit=4) for line in steps.strip().splitlines()]
    times = [created_at + timedelta(seconds=float(entry[0])) for entry in entries]
    admin.execute(
        "INSERT INTO public.saga_executions (id, name, status, context, version, recovery_attempts, lease_owner,"
        " lease_expires_at, created_at, updated_at) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        [
            saga_id(number),
            name,
            status,
            json.dumps({} if context is None else context),
            len(entries) + 1,
            attempts,
            owner,
            expires,
            created_at,
            updated_at or max([created_at, *times]),
        ],
    )
    for entry, time in zip(entries, times, strict=True):
        _, action, step, ended, *details = entry
        admin.execute(
            "INSERT INTO public.saga_logs (saga_id, step_name, action, status, details, created_at)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            [saga_id(number), step, action, ended, details[0].replace("\\n", "\n") if details else None, time],
        )
    return saga_id(number)


def make_troubled_sagas(admin: psycopg.Connection) -> None:
    """Make some of every condition, with errors, doubts and interventions."""
    stop_the_clock(admin)
    at = NOW - timedelta(hours=4, minutes=9, seconds=43)
    make_saga(
        admin,
        0x7B0FFE96,
        "order",
        "COMPENSATING",
        at,
        steps="""
            0.037 act ReserveStock STARTED
            0.662 act ReserveStock COMPLETED
            0.674 act TakePayment STARTED
            0.964 act TakePayment COMPLETED
            1.0 act Ship STARTED
            8.7 act Ship FAILED httpx.ConnectTimeout: https://shipping.internal:8443/v2/labels timed out after 10.0s
            8.8 compensate TakePayment STARTED
        """,
    )
    for number in range(16):
        make_saga(
            admin,
            0x1F79A500 + number,
            "order",
            "RUNNING",
            NOW - timedelta(minutes=40 + number),
            steps="0.1 act ReserveStock STARTED\n0.2 act ReserveStock COMPLETED\n0.3 act Ship STARTED",
        )
    declined = "Traceback (most recent call last):\\n  in charge\\nPaymentDeclined: card_declined (order {})"
    for number in range(4):
        make_saga(
            admin,
            0x82B94010 + number,
            "subscription-renewal",
            "RUNNING",
            NOW - timedelta(hours=7, minutes=number),
            updated_at=NOW - timedelta(hours=5, minutes=number),
            attempts=5,
            lease=("worker-7f9c.eu-1 pid 4211", -timedelta(hours=4)),
            steps=f"1 act ChargeCard STARTED\n9 act ChargeCard FAILED {declined.format(4711 + number)}",
        )
    for number in range(3):
        make_saga(
            admin,
            0xAE80A700 + number,
            "onboarding",
            "RUNNING",
            NOW - timedelta(minutes=50 + number),
            updated_at=NOW - timedelta(minutes=46 + number),
            attempts=1,
            lease=("worker-7f9c.eu-1 pid 4211", -timedelta(minutes=41)),
            steps="1 act ProvisionTenant STARTED",
        )
    for number in range(2):
        make_saga(
            admin,
            0xCF7A4420 + number,
            "onboarding",
            "RUNNING",
            NOW - timedelta(minutes=50 + number),
            attempts=1,
            lease=("worker-2b1d.eu-1 pid 977", timedelta(minutes=2)),
            steps="1 act VerifyIdentity STARTED",
        )
    make_saga(
        admin,
        0x09A11184,
        "refund",
        "FAILED",
        NOW - timedelta(hours=3),
        steps="""
            1 act RefundPayment STARTED
            2 act RefundPayment FAILED gateway.GatewayError: 503 upstream connect error
            3000 act saga_store.give_up_saga COMPLETED {"by": "alice", "reason": "refunded by hand, ticket 7"}
        """,
    )
    make_saga(admin, 0x31641290, "order", "PENDING", NOW - timedelta(minutes=3))
    make_saga(
        admin,
        0x5E8FF674,
        "order",
        "COMPLETED",
        NOW - timedelta(minutes=20),
        steps="""
            0.1 act ReserveStock STARTED
            0.2 act ReserveStock COMPLETED
            0.3 act TakePayment STARTED
            600.3 act TakePayment STARTED
            600.7 act TakePayment COMPLETED
        """,
    )


def make_hostile_saga(admin: psycopg.Connection) -> UUID:
    """Make a saga of which every text is hostile."""
    made = make_saga(
        admin,
        0x883111B8,
        HOSTILE,
        "RUNNING",
        NOW - timedelta(minutes=56),
        attempts=1,
        lease=(HOSTILE, -timedelta(minutes=40)),
        context={HOSTILE: [HOSTILE]},
    )
    who = json.dumps({"by": HOSTILE, "reason": HOSTILE})
    for step, status, details in (
        (HOSTILE, "STARTED", None),
        (HOSTILE, "FAILED", f"{HOSTILE}\n{HOSTILE}"),
        ("saga_store.break_lease", "COMPLETED", who),
        (f"{HOSTILE}!", "STARTED", HOSTILE),
    ):
        admin.execute(
            "INSERT INTO public.saga_logs (saga_id, step_name, action, status, details, created_at)"
            " VALUES (%s, %s, 'act', %s, %s, %s)",
            [made, step, status, details, NOW - timedelta(minutes=55)],
        )
    return made
