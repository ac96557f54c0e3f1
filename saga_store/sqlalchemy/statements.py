"""Every SQL statement of the storage; no I/O."""

from sqlalchemy import text
from sqlalchemy.dialects.postgresql import asyncpg, psycopg

from saga_store.sqlalchemy.write_ids import KEPT, KEPT_OF_ONE_VERSION, RANDOM_BITS, VERSION_MASK


class Statement:
    """SQL with ``:names`` for parameters, spelled for SQLAlchemy (``text``) and for each driver.

    Attributes:
        text: For SQLAlchemy.
        numbered: For asyncpg, with ``$1``; ``names`` says which parameter that is.
        named: For psycopg, with ``%(name)s``.
    """

    def __init__(self, sql: str) -> None:
        self.text = text(sql)
        numbered = self.text.compile(dialect=asyncpg.dialect())  # type: ignore[no-untyped-call] # SQLAlchemy leaves it so
        self.numbered = str(numbered)
        self.names = tuple(numbered.positiontup or ())
        self.named = str(self.text.compile(dialect=psycopg.dialect()))  # type: ignore[no-untyped-call] # likewise


# Applies a batch of writes to different sagas, each atomically, in one statement. A refused write raises
# nothing (it would abort the caller's transaction): its saga comes back with `written` NULL, and `found`
# says whether it is missing or at another version.
#
# - Rows are locked in id order, so that two batches can't deadlock; the lock also makes the ids of a saga's
#   log entries follow the order of its commits, and makes `version` the latest committed one.
# - LATERAL makes it one index probe a saga whatever the statistics say: a cached plan made when the table
#   was empty must not turn into a sequential scan per write when it is full.
# - SELECT around each array hides its length from the planner. Otherwise it would find a plan of its own for
#   every call cheaper than the prepared one, and planning takes longer than executing.
# - The times are the statement's, not the transaction's, which may have begun long ago; a step that waited in
#   a buffer gets the time at which it was logged.
# - A lease is taken only if nobody else holds it, which the lock decides too. Renewing it changes the row but not
#   its version; a finished saga has none. If the statement had to wait for the row, its clock is behind: then it
#   takes a lease that has just expired for one that still holds, never the other way round.
# - A write with an id (see write_ids.py) puts it into the row. One whose id is there already isn't written again,
#   and comes back as it did then. As long as the version stays, ids of writes that don't raise it aren't dropped;
#   when there are too many of them, the next ones go in without a trace, but never the second time (`again`).
# - SAVE_UNLOCKED waits for nobody: a row that somebody has locked is skipped, and `is_there` tells it from a
#   missing one; an INSERT can't skip an id that somebody is creating, so it fails soon, with 55P03.
_SAVE = """
WITH input AS MATERIALIZED (
    SELECT i.*, i.status IS NOT NULL OR i.context IS NOT NULL OR i.attempts IS NOT NULL OR i.lease_owner IS NOT NULL
        OR COALESCE(i.releases, FALSE) AS changes
    FROM unnest(
        (SELECT CAST(:saga_ids AS uuid[])), (SELECT CAST(:names AS text[])), (SELECT CAST(:statuses AS text[])),
        (SELECT CAST(CAST(:contexts AS text[]) AS json[])), (SELECT CAST(:attempts AS integer[])),
        (SELECT CAST(:expected AS bigint[])), (SELECT CAST(:lease_owners AS text[])),
        (SELECT CAST(:lease_seconds AS double precision[])), (SELECT CAST(:releases AS boolean[])),
        (SELECT CAST(:write_ids AS bigint[]))
    ) WITH ORDINALITY AS i (
        saga_id, name, status, context, attempts, expected, lease_owner, lease_seconds, releases, write_id, position
    )
    {patience}
    ORDER BY saga_id
), created AS (
    INSERT INTO saga_executions (
        id, name, status, context, recovery_attempts, lease_owner, lease_expires_at, recent_writes,
        created_at, updated_at
    )
    SELECT saga_id, name, COALESCE(status, 'PENDING'), COALESCE(context, '{{}}'), COALESCE(attempts, 0),
        CASE WHEN status IN ('COMPLETED', 'FAILED') THEN NULL ELSE lease_owner END,
        CASE WHEN status IN ('COMPLETED', 'FAILED') THEN NULL
            ELSE statement_timestamp() + make_interval(secs => lease_seconds) END,
        CASE WHEN write_id IS NOT NULL THEN ARRAY[write_id] END,
        statement_timestamp(), statement_timestamp()
    FROM input
    WHERE name IS NOT NULL
    ON CONFLICT (id) DO NOTHING
    RETURNING id, version
), locked AS MATERIALIZED (
    SELECT e.id, e.version, e.holder, e.held_until, e.recorded,
        i.status, i.context, i.attempts, i.lease_owner, i.lease_seconds, i.releases, i.write_id, i.changes,
        (i.expected IS NULL OR i.expected = e.version) AND NOT e.recorded {again}
            AND NOT (i.lease_owner IS NOT NULL AND e.leased AND i.lease_owner <> e.holder) AS accepted,
        i.changes OR i.lease_seconds IS NOT NULL OR (i.write_id IS NOT NULL AND NOT e.full_up) AS updates
    FROM input i
    CROSS JOIN LATERAL (
        SELECT id, version, lease_owner AS holder, lease_expires_at AS held_until,
            COALESCE(lease_expires_at > statement_timestamp(), FALSE) AS leased,
            COALESCE(i.write_id = ANY (recent_writes), FALSE) AS recorded,
            COALESCE(cardinality(recent_writes) >= {kept_of_one_version}
                AND recent_writes[1] >> {random_bits} = version & {version_mask}, FALSE) AS full_up
        FROM saga_executions WHERE id = i.saga_id FOR NO KEY UPDATE {wait}
    ) e
    WHERE i.name IS NULL
), updated AS (
    UPDATE saga_executions e
    SET status = COALESCE(l.status, e.status),
        context = COALESCE(l.context, e.context),
        recovery_attempts = COALESCE(l.attempts, e.recovery_attempts),
        lease_owner = CASE WHEN l.status IN ('COMPLETED', 'FAILED') OR l.releases THEN NULL
            ELSE COALESCE(l.lease_owner, e.lease_owner) END,
        lease_expires_at = CASE WHEN l.status IN ('COMPLETED', 'FAILED') OR l.releases
                OR COALESCE(l.lease_owner, e.lease_owner) IS NULL THEN NULL
            ELSE COALESCE(statement_timestamp() + make_interval(secs => l.lease_seconds), e.lease_expires_at) END,
        recent_writes = CASE
            WHEN l.write_id IS NULL THEN e.recent_writes
            WHEN l.changes THEN e.recent_writes[GREATEST(cardinality(e.recent_writes) - {kept} + 2, 1):] || l.write_id
            WHEN (cardinality(e.recent_writes) < {kept_of_one_version}) IS NOT FALSE
                THEN e.recent_writes || l.write_id
            WHEN e.recent_writes[1] >> {random_bits} = e.version & {version_mask} THEN e.recent_writes
            ELSE e.recent_writes[2:] || l.write_id END,
        version = e.version + CAST(l.changes AS integer),
        updated_at = CASE WHEN l.changes THEN statement_timestamp() ELSE e.updated_at END
    FROM locked l
    WHERE e.id = l.id AND l.accepted AND l.updates
    RETURNING e.id, e.version
), written AS (
    SELECT id, version FROM created
    UNION ALL
    SELECT id, version FROM updated
    UNION ALL
    SELECT id, version FROM locked WHERE accepted AND NOT updates
), logged AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT s.saga_id, s.step_name, s.action, s.status, s.details,
        statement_timestamp() - make_interval(secs => COALESCE(s.age, 0))
    FROM unnest(
        (SELECT CAST(:step_saga_ids AS uuid[])), (SELECT CAST(:step_names AS text[])),
        (SELECT CAST(:step_actions AS text[])), (SELECT CAST(:step_statuses AS text[])),
        (SELECT CAST(:step_details AS text[])), (SELECT CAST(:step_ages AS double precision[]))
    ) WITH ORDINALITY AS s (saga_id, step_name, action, status, details, age, position)
    JOIN written w ON w.id = s.saga_id
    ORDER BY s.position
)
SELECT i.position,
    COALESCE(w.version, CASE WHEN l.recorded THEN i.expected + CAST(i.changes AS integer) END) AS written,
    l.version AS found, l.holder, l.held_until,
    CASE WHEN l.id IS NULL THEN (SELECT TRUE FROM saga_executions WHERE id = i.saga_id) END AS is_there
FROM input i
LEFT JOIN written w ON w.id = i.saga_id
LEFT JOIN locked l ON l.id = i.saga_id
"""


def _save(*, waits: bool, again: bool = False) -> Statement:
    return Statement(
        _SAVE.format(
            wait="" if waits else "SKIP LOCKED",
            # In force as soon as it is called, until the end of this statement.
            patience="" if waits else "CROSS JOIN (SELECT set_config('lock_timeout', '100ms', TRUE)) AS patience",
            again="AND NOT (e.full_up AND i.write_id IS NOT NULL AND NOT i.changes)" if again else "",
            kept=KEPT,
            kept_of_one_version=KEPT_OF_ONE_VERSION,
            random_bits=RANDOM_BITS,
            version_mask=VERSION_MASK,
        )
    )


SAVE = _save(waits=True)
SAVE_UNLOCKED = _save(waits=False)
# Writes once more what may have been written already. It waits for nobody, lest one locked row hold up the others.
SAVE_AGAIN = _save(waits=False, again=True)

RECENT_WRITES = Statement("""
SELECT id, version, recent_writes
FROM saga_executions
WHERE id = ANY (CAST(:saga_ids AS uuid[]))
""")

_EXECUTION = """
    id, name, status, CAST(context AS text) AS context, version, recovery_attempts,
    lease_owner, lease_expires_at, created_at, updated_at
"""

SAGA = Statement(f"SELECT {_EXECUTION} FROM saga_executions WHERE id = :saga_id")  # noqa: S608 - put together from constants

# The outer join tells a saga without history (one row of NULLs) from one that isn't there (no row).
HISTORY = Statement("""
SELECT l.id, l.step_name, l.action, l.status, l.details, l.created_at
FROM saga_executions e
LEFT JOIN saga_logs l ON l.saga_id = e.id
WHERE e.id = :saga_id
ORDER BY l.id
""")

# LATERAL, so that the limit is one of entries and a saga without any still gives a row.
HISTORY_PAGE = Statement("""
SELECT l.id, l.step_name, l.action, l.status, l.details, l.created_at
FROM saga_executions e
LEFT JOIN LATERAL (
    SELECT *
    FROM saga_logs
    WHERE saga_id = e.id AND id > :after
    ORDER BY id
    LIMIT :limit
) l ON TRUE
WHERE e.id = :saga_id
ORDER BY l.id
""")

# The status list stands as in the predicate of ix_saga_executions_recovery, which holds the living sagas only.
STALE = Statement(f"""
SELECT {_EXECUTION}
FROM saga_executions
WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING')
    AND updated_at <= statement_timestamp() - CAST(:stale_after AS interval)
    AND recovery_attempts < :max_attempts
    AND (lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
    AND (CAST(:name AS text) IS NULL OR name = CAST(:name AS text))
ORDER BY recovery_attempts, updated_at, id
LIMIT :limit
""")  # noqa: S608 - put together from constants

# What nobody claims any more. The last attempt of a leased one isn't over.
EXHAUSTED = Statement(f"""
SELECT {_EXECUTION}
FROM saga_executions
WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING')
    AND recovery_attempts >= :max_attempts
    AND (lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
    AND (CAST(:name AS text) IS NULL OR name = CAST(:name AS text))
ORDER BY updated_at, id
LIMIT :limit
""")  # noqa: S608 - put together from constants

# Leases stale sagas. A row that somebody has locked is skipped, so that claims of several workers don't wait for
# each other; one that was changed since the statement began is judged anew when it is locked. LEAST keeps power()
# from overflowing.
CLAIM = Statement(f"""
WITH candidates AS MATERIALIZED (
    SELECT id, recovery_attempts, updated_at
    FROM saga_executions
    WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING')
        AND updated_at <= statement_timestamp() - CAST(:stale_after AS interval) - make_interval(
            secs => LEAST(
                CAST(:max_backoff AS double precision),
                CAST(:backoff AS double precision) * (power(2, LEAST(recovery_attempts, 60)) - 1)
            )
        )
        AND recovery_attempts < :max_attempts
        AND (lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
        AND (CAST(:name AS text) IS NULL OR name = CAST(:name AS text))
    ORDER BY recovery_attempts, updated_at, id
    LIMIT :limit
    FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (
    UPDATE saga_executions e
    SET lease_owner = CAST(:owner AS text),
        lease_expires_at = statement_timestamp() + CAST(:lease AS interval),
        recovery_attempts = e.recovery_attempts + 1,
        version = e.version + 1,
        updated_at = statement_timestamp()
    FROM candidates c
    WHERE e.id = c.id
    RETURNING e.*, c.recovery_attempts AS tried, c.updated_at AS unchanged_since
)
SELECT {_EXECUTION}
FROM claimed
ORDER BY tried, unchanged_since, id
""")  # noqa: S608 - put together from constants

HOLDS = Statement("""
SELECT lease_owner = CAST(:owner AS text) AND version = :version AND lease_expires_at > statement_timestamp() AS held
FROM saga_executions
WHERE id = :saga_id
""")

# As in HISTORY, a saga with nothing in doubt gives one row of NULLs, and a missing one none.
IN_DOUBT = Statement("""
SELECT l.id, l.step_name, l.action, l.status, l.details, l.created_at
FROM saga_executions e
LEFT JOIN saga_logs l ON l.saga_id = e.id AND l.status = 'STARTED' AND NOT EXISTS (
    SELECT FROM saga_logs later
    WHERE later.saga_id = l.saga_id AND later.id > l.id AND later.status <> 'STARTED'
        AND later.step_name = l.step_name AND later.action = l.action
)
WHERE e.id = :saga_id
ORDER BY l.id
""")

REVISION = Statement("SELECT version_num FROM saga_store_version")
