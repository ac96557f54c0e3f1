"""The statements that let sagas go and take them back, and those of the ledger; no I/O.

Who makes stubs locks first and compares later, by a statement of its own, whose snapshot is younger than the locks:
or an entry that was committed in between would be overlooked. The lock is FOR UPDATE, since whoever appends an entry by
SQL of their own takes none but that of the foreign key.

Times travel as text in UTC, and infinity is a word like any other.
"""

from saga_store.sqlalchemy.inspection_sql import _answer, _utc
from saga_store.sqlalchemy.statement import Statement

SEEN_AT_ONCE = 20_000
"""How many rows one page of a walk looks at."""
SMALL_CONTEXT_BYTES = 2**18
"""A saga that takes more than this is read by itself, and piece by piece."""
PIECE_CHARACTERS = 2**22
"""How much of a context is read at once: for each piece the server unpacks the whole."""
PAGE_BYTES = 2**22
PAGE_ENTRIES = 1000


def _moment(parameter: str) -> str:
    return f"CAST(CAST(:{parameter} AS text) AS timestamp) AT TIME ZONE 'UTC'"


# A column of a FROM item, as in write_sql.py; PostgreSQL pulls it up.
_CLOCK = "(SELECT statement_timestamp() AS at) AS clock"


def _id(parameter: str) -> str:
    return f"CAST(CAST(:{parameter} AS text) AS uuid)"


def _array(parameter: str, kind: str) -> str:
    """Return an array of what needs no quotes: one text, which the server takes apart; what is empty is NULL."""
    if kind == "uuid":
        return f"CAST(CAST(:{parameter} AS text) AS uuid[])"
    return f"CAST(string_to_array(CAST(:{parameter} AS text), ',', '') AS {kind}[])"


_KEPT = """
    CASE WHEN name = ANY (CAST(:names AS text[])) THEN (
            SELECT term.seconds
            FROM unnest(CAST(:names AS text[]), {terms}) AS term (name, seconds)
            WHERE term.name = saga_executions.name)
        WHEN status = 'COMPLETED' THEN CAST(:completed AS double precision)
        ELSE CAST(:failed AS double precision) END""".format(terms=_array("terms", "double precision"))  # noqa: S608 - put together from constants


def _expired(*, goes_on: bool) -> Statement:
    following = f"AND (created_at, id) > ({_moment('after_created_at')}, {_id('after_id')})" if goes_on else ""
    return Statement(f"""
WITH seen AS MATERIALIZED (
    SELECT id, name, status, version, created_at, updated_at,
        CASE WHEN status IN ('COMPLETED', 'FAILED') AND archived_at IS NULL AND isfinite(updated_at)
            AND (retain_until IS NULL OR retain_until <= clock.at)
            AND (lease_owner IS NULL OR lease_expires_at <= clock.at)
            THEN CAST(EXTRACT(EPOCH FROM clock.at - updated_at) AS double precision) - ({_KEPT}) END AS overdue
    FROM saga_executions CROSS JOIN {_CLOCK}
    WHERE isfinite(created_at) {following}
        AND created_at <= statement_timestamp() - make_interval(secs => CAST(:least AS double precision))
    ORDER BY created_at, id
    LIMIT {SEEN_AT_ONCE}
), expired AS MATERIALIZED (
    SELECT *
    FROM seen
    WHERE overdue >= 0
    ORDER BY created_at, id
    LIMIT :limit
)
(SELECT {_answer("count(*)", f"(SELECT json_build_array({_utc('created_at')}, id) FROM seen ORDER BY created_at DESC, id DESC LIMIT 1)")} AS answer
FROM seen)
UNION ALL
(SELECT {_answer("e.id", "e.version", "l.entries", "l.last_id", "e.name", "e.status", _utc("e.created_at"), _utc("e.updated_at"), "l.size + c.size", "e.overdue")}
FROM expired e
CROSS JOIN LATERAL (
    SELECT count(*) AS entries, COALESCE(max(id), 0) AS last_id, COALESCE(sum(octet_length(details)), 0) AS size
    FROM saga_logs
    WHERE saga_id = e.id
    OFFSET 0
) l
CROSS JOIN LATERAL (
    SELECT octet_length(CAST(context AS text)) AS size
    FROM saga_executions
    WHERE id = e.id
    LIMIT 1
) c
ORDER BY e.created_at, e.id)
""")  # noqa: E501, S608 - columns, and put together from constants


EXPIRED = _expired(goes_on=False)
EXPIRED_AFTER = _expired(goes_on=True)

_ROW = """
    e.id, convert_to(e.name, 'UTF8'), convert_to(e.status, 'UTF8'), CAST(e.version AS bigint),
    CAST(e.recovery_attempts AS bigint), timestamptz_send(e.created_at), timestamptz_send(e.updated_at)"""
_ENTRY = """
    CAST(l.id AS bigint), convert_to(l.step_name, 'UTF8'), convert_to(l.action, 'UTF8'), convert_to(l.status, 'UTF8'),
    convert_to(l.details, 'UTF8'), timestamptz_send(l.created_at)"""
_GIVEN = f"unnest({_array('saga_ids', 'uuid')}) WITH ORDINALITY AS given (id, position)"

ROWS = Statement(f"""
SELECT {_ROW}, CASE WHEN octet_length(CAST(e.context AS text)) <= {SMALL_CONTEXT_BYTES}
    THEN convert_to(CAST(e.context AS text), 'UTF8') END
FROM {_GIVEN}
CROSS JOIN LATERAL (SELECT * FROM saga_executions WHERE id = given.id LIMIT 1) e
ORDER BY given.position
""")  # noqa: S608 - put together from constants
ENTRIES = Statement(f"""
SELECT given.id, {_ENTRY}
FROM {_GIVEN}
CROSS JOIN LATERAL (SELECT * FROM saga_logs WHERE saga_id = given.id ORDER BY id OFFSET 0) l
ORDER BY given.position, l.id
""")  # noqa: S608 - put together from constants
CONTEXT_PIECE = Statement(f"""
SELECT convert_to(substr(CAST(context AS text), CAST(:first AS integer), {PIECE_CHARACTERS}), 'UTF8')
FROM saga_executions
WHERE id = {_id("saga_id")}
""")  # noqa: S608 - put together from constants
# So many that they aren't more than so many bytes, but one at least.
ENTRIES_PAGE = Statement(f"""
SELECT {_ENTRY}
FROM (
    SELECT *, sum(octet_length(COALESCE(details, ''))) OVER (ORDER BY id)
            - octet_length(COALESCE(details, '')) AS before
    FROM (
        SELECT *
        FROM saga_logs
        WHERE saga_id = {_id("saga_id")} AND id > CAST(:after AS bigint)
        ORDER BY id
        LIMIT {PAGE_ENTRIES}
    ) page
) l
WHERE before < {PAGE_BYTES}
ORDER BY l.id
""")  # noqa: S608 - put together from constants

# Of the tables of this schema, for as long as the transaction lasts; which may take its time.
_TURN = "hashtextextended('archiver of ' || CAST(CAST(CAST('saga_archives' AS regclass) AS oid) AS text), 0)"
TAKE_TURN = Statement(f"""
SELECT pg_try_advisory_xact_lock({_TURN}),
    set_config('idle_in_transaction_session_timeout', '0', TRUE) IS NULL
""")
TURN_HOLDER = Statement(f"""
SELECT CAST(l.pid AS bigint), convert_to(COALESCE(a.application_name, ''), 'UTF8')
FROM pg_locks l
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (CAST(CAST(l.classid AS bigint) AS bit(64)) << 32 | CAST(CAST(l.objid AS bigint) AS bit(64)))
        = CAST({_TURN} AS bit(64))
""")  # noqa: S608 - put together from constants
ALIVE = Statement("SELECT TRUE")

_ARCHIVE = _answer(
    "a.id",
    "a.uri",
    "a.state",
    "a.archived_by",
    _utc("a.begun_at"),
    _utc("a.archived_at"),
    _utc("a.removed_at"),
    "a.sha256",
    "a.sagas",
    "a.entries",
    "a.bytes",
    "a.removed",
    "a.watermark",
    "a.error",
)
ADD_ARCHIVE = Statement(f"""
WITH a AS (
    INSERT INTO saga_archives (id, uri, state, archived_by, begun_at)
    VALUES ({_id("archive_id")}, CAST(:uri AS text), 'WRITING', CAST(:archived_by AS text), statement_timestamp())
    ON CONFLICT (id) DO NOTHING
    RETURNING *
)
SELECT {_ARCHIVE} AS answer FROM a
""")  # noqa: S608 - put together from constants
# The clock may have been set back: what is verified later gets the later time all the same.
CHANGE_ARCHIVE = Statement(f"""
WITH a AS (
    UPDATE saga_archives
    SET state = CAST(:state AS text),
        archived_at = CASE WHEN CAST(:state AS text) = 'VERIFIED' THEN clock.next ELSE archived_at END,
        removed_at = CASE WHEN CAST(:state AS text) = 'REMOVED' THEN clock.at ELSE removed_at END,
        sha256 = COALESCE(CAST(:sha256 AS text), sha256),
        sagas = COALESCE(CAST(:sagas AS bigint), sagas),
        entries = COALESCE(CAST(:entries AS bigint), entries),
        bytes = COALESCE(CAST(:bytes AS bigint), bytes),
        watermark = COALESCE(CAST(:watermark AS text), watermark),
        error = COALESCE(CAST(:error AS text), error)
    FROM (
        SELECT clock_timestamp() AS at,
            GREATEST(clock_timestamp(), max(archived_at) + interval '1 microsecond') AS next
        FROM saga_archives
    ) AS clock
    WHERE id = {_id("archive_id")} AND state = ANY (string_to_array(CAST(:states AS text), ','))
    RETURNING saga_archives.*
)
SELECT {_ARCHIVE} AS answer FROM a
""")  # noqa: S608 - put together from constants
# One after the other, or two would draw the same time.
LOCK_LEDGER = Statement("""
SELECT pg_advisory_xact_lock(hashtextextended(
    'archives of ' || CAST(CAST(CAST('saga_archives' AS regclass) AS oid) AS text), 0)) IS NULL
""")
FETCH_ARCHIVE = Statement(f"SELECT {_ARCHIVE} AS answer FROM saga_archives a WHERE a.id = {_id('archive_id')}")  # noqa: S608 - put together from constants


def _archives(*, goes_on: bool) -> Statement:
    following = f"AND (begun_at, id) < ({_moment('after_created_at')}, {_id('after_id')})" if goes_on else ""
    return Statement(f"""
SELECT {_ARCHIVE} AS answer
FROM saga_archives a
WHERE (CAST(:states AS text) IS NULL OR state = ANY (string_to_array(CAST(:states AS text), ','))) {following}
ORDER BY begun_at DESC, id DESC
LIMIT :limit
""")  # noqa: S608 - put together from constants


ARCHIVES = _archives(goes_on=False)
ARCHIVES_AFTER = _archives(goes_on=True)
STUB = Statement(f"""
SELECT {_answer("e.name", "e.status", "e.version", _utc("e.created_at"), _utc("e.archived_at"), "a.id")} AS answer
FROM saga_executions e
LEFT JOIN saga_archives a ON a.archived_at = e.archived_at
WHERE e.id = {_id("saga_id")} AND e.archived_at IS NOT NULL
""")  # noqa: S608 - put together from constants

# For as long as the transaction lasts. Whatever the statistics say, few sagas are meant: each is an index probe.
PROBES = Statement("""
SELECT set_config('enable_seqscan', 'off', TRUE), set_config('enable_hashjoin', 'off', TRUE),
    set_config('enable_mergejoin', 'off', TRUE), set_config('enable_material', 'off', TRUE)
""")
# Whoever fails the archive, or removes by it as well, waits.
LOCK_ARCHIVE = Statement(f"""
SELECT id
FROM saga_archives
WHERE id = {_id("archive_id")} AND state = 'VERIFIED'
FOR NO KEY UPDATE
""")  # noqa: S608 - put together from constants
_MARKS = f"""
    unnest({_array("saga_ids", "uuid")}, {_array("versions", "bigint")}, {_array("entries", "bigint")},
        {_array("last_ids", "bigint")}) AS mark (id, version, entries, last_id)"""
LOCK_MARKED = Statement(f"""
SELECT e.id
FROM {_MARKS}
CROSS JOIN (SELECT archived_at FROM saga_archives WHERE id = {_id("archive_id")}) a
CROSS JOIN LATERAL (
    SELECT id
    FROM saga_executions
    WHERE id = mark.id AND version = mark.version AND archived_at IS NULL AND updated_at <= a.archived_at
        AND status IN ('COMPLETED', 'FAILED')
        AND (lease_owner IS NULL OR lease_expires_at <= statement_timestamp())
        AND (retain_until IS NULL OR retain_until <= statement_timestamp())
    FOR UPDATE SKIP LOCKED
) e
""")  # noqa: S608 - put together from constants
# Of sagas that are locked by now.
MAKE_STUBS = Statement(f"""
WITH same AS MATERIALIZED (
    SELECT mark.id
    FROM {_MARKS}
    CROSS JOIN LATERAL (
        SELECT count(*) AS entries, COALESCE(max(id), 0) AS last_id
        FROM saga_logs
        WHERE saga_id = mark.id
        OFFSET 0
    ) l
    WHERE l.entries = mark.entries AND l.last_id = mark.last_id
), removed AS (
    DELETE FROM saga_logs l
    USING same s
    WHERE l.saga_id = s.id
), stubs AS (
    UPDATE saga_executions e
    SET context = '{{}}', archived_at = a.archived_at, retain_until = NULL, lease_owner = NULL, lease_expires_at = NULL
    FROM same s, saga_archives a
    WHERE e.id = s.id AND a.id = {_id("archive_id")}
    RETURNING e.id
), counted AS (
    UPDATE saga_archives SET removed = removed + (SELECT count(*) FROM stubs) WHERE id = {_id("archive_id")}
)
SELECT id FROM stubs
""")  # noqa: S608 - put together from constants
# Who may not delete has it done by the function that `saga-store grants --archiver` makes, which does the same.
MAY_DELETE = Statement("SELECT has_table_privilege(CAST('saga_logs' AS regclass), 'DELETE')")
HAVE_STUBS_MADE = Statement(f"""
SELECT made
FROM saga_store_make_stubs({_id("archive_id")}, {_array("saga_ids", "uuid")}, {_array("versions", "bigint")},
    {_array("entries", "bigint")}, {_array("last_ids", "bigint")}) AS made
""")  # noqa: S608 - put together from constants
STUBS_OF = Statement(f"""
SELECT e.id
FROM {_GIVEN}
CROSS JOIN LATERAL (SELECT id, archived_at FROM saga_executions WHERE id = given.id LIMIT 1) e
WHERE e.archived_at = (SELECT archived_at FROM saga_archives WHERE id = {_id("archive_id")})
""")  # noqa: S608 - put together from constants

_RECORDS = f"""
    unnest({_array("saga_ids", "uuid")}, CAST(:names AS text[]), {_array("statuses", "text")},
        CAST(:contexts AS text[]), {_array("versions", "integer")}, {_array("attempts", "integer")},
        {_array("created", "timestamp")}, {_array("updated", "timestamp")})
        AS record (id, name, status, context, version, attempts, created_at, updated_at)"""
_KEEP = "CASE WHEN CAST(:keep_for AS double precision) > 0 THEN keep.until END"
_KEEPING = """(
    SELECT statement_timestamp() + make_interval(secs => CAST(:keep_for AS double precision)) AS until) AS keep"""
ADD_ROWS = Statement(f"""
INSERT INTO saga_executions (
    id, name, status, context, version, recovery_attempts, created_at, updated_at, retain_until
)
SELECT id, name, status, CAST(context AS json), version, attempts, created_at AT TIME ZONE 'UTC',
    updated_at AT TIME ZONE 'UTC', {_KEEP}
FROM {_RECORDS}
CROSS JOIN {_KEEPING}
ORDER BY id
ON CONFLICT (id) DO NOTHING
RETURNING id
""")  # noqa: S608 - put together from constants
# What is there already is locked, and looked at after that: by a statement of its own, for its snapshot has to be
# younger than the locks. Of a stub, whether it has entries again; of a saga, how many it has.
LOCK_ROWS = Statement(f"""
SELECT id
FROM saga_executions
WHERE id = ANY ({_array("saga_ids", "uuid")})
ORDER BY id
FOR NO KEY UPDATE
""")  # noqa: S608 - put together from constants
LOCKED_ROWS = Statement(f"""
SELECT e.id, convert_to(e.name, 'UTF8'), CAST(e.version AS bigint), timestamptz_send(e.created_at),
    e.archived_at IS NOT NULL, (SELECT count(*) FROM saga_logs WHERE saga_id = e.id),
    CAST(octet_length(CAST(e.context AS text)) AS bigint),
    (SELECT id FROM saga_archives WHERE archived_at = e.archived_at)
FROM saga_executions e
WHERE e.id = ANY ({_array("saga_ids", "uuid")})
""")  # noqa: S608 - put together from constants
_SEQUENCE = "CAST(pg_get_serial_sequence(CAST(CAST('saga_logs' AS regclass) AS text), 'id') AS regclass)"
# A number that was drawn once is never drawn again.
FREE_IDS = Statement(f"""
SELECT pg_sequence_last_value({_SEQUENCE}),
    EXISTS (SELECT FROM saga_logs WHERE id = ANY ({_array("entry_ids", "bigint")}))
""")  # noqa: S608 - put together from constants
FILL_STUBS = Statement(f"""
UPDATE saga_executions e
SET status = record.status, context = CAST(record.context AS json), recovery_attempts = record.attempts,
    updated_at = record.updated_at AT TIME ZONE 'UTC', archived_at = NULL, retain_until = {_KEEP}
FROM {_RECORDS}
CROSS JOIN {_KEEPING}
WHERE e.id = record.id
RETURNING e.id
""")  # noqa: S608 - put together from constants
# A long context comes in pieces, as a string of JSON until it is whole: drivers copy what they send several times.
APPEND_TO_CONTEXT = Statement(f"""
UPDATE saga_executions
SET context = to_json((context #>> '{{}}') || CAST(:piece AS text))
WHERE id = {_id("saga_id")}
RETURNING id
""")  # noqa: S608 - put together from constants
END_CONTEXT = Statement(f"""
UPDATE saga_executions
SET context = CAST((context #>> '{{}}') AS json)
WHERE id = {_id("saga_id")}
RETURNING id
""")  # noqa: S608 - put together from constants
_RESTORED_ENTRIES = f"""
    unnest({_array("saga_ids", "uuid")}, {_array("entry_ids", "bigint")}, CAST(:step_names AS text[]),
        {_array("actions", "text")}, {_array("statuses", "text")}, CAST(:details AS text[]),
        {_array("created", "timestamp")})
        WITH ORDINALITY AS entry (saga_id, id, step_name, action, status, details, created_at, position)"""
ADD_ENTRIES = Statement(f"""
WITH added AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT saga_id, step_name, action, status, details, created_at AT TIME ZONE 'UTC'
    FROM {_RESTORED_ENTRIES}
    ORDER BY position
    RETURNING id
)
SELECT count(*) FROM added
""")  # noqa: S608 - put together from constants
ADD_ENTRIES_WITH_IDS = Statement(f"""
WITH added AS (
    INSERT INTO saga_logs (id, saga_id, step_name, action, status, details, created_at)
    SELECT id, saga_id, step_name, action, status, details, created_at AT TIME ZONE 'UTC'
    FROM {_RESTORED_ENTRIES}
    RETURNING id
)
SELECT count(*) FROM added
""")  # noqa: S608 - put together from constants


def _forgettable(*, goes_on: bool) -> Statement:
    following = f"AND (created_at, id) > ({_moment('after_created_at')}, {_id('after_id')})" if goes_on else ""
    return Statement(f"""
WITH seen AS MATERIALIZED (
    SELECT id, created_at, archived_at
    FROM saga_executions
    WHERE isfinite(created_at) {following}
        AND created_at <= statement_timestamp() - make_interval(secs => CAST(:older_than AS double precision))
    ORDER BY created_at, id
    LIMIT {SEEN_AT_ONCE}
)
(SELECT {_answer("count(*)", f"(SELECT json_build_array({_utc('created_at')}, id) FROM seen ORDER BY created_at DESC, id DESC LIMIT 1)")} AS answer
FROM seen)
UNION ALL
(SELECT {_answer("id", _utc("created_at"))}
FROM seen
WHERE archived_at <= statement_timestamp() - make_interval(secs => CAST(:older_than AS double precision))
    AND NOT EXISTS (SELECT FROM saga_logs WHERE saga_id = seen.id)
ORDER BY created_at, id
LIMIT :limit)
""")  # noqa: E501, S608 - columns, and put together from constants


FORGETTABLE = _forgettable(goes_on=False)
FORGETTABLE_AFTER = _forgettable(goes_on=True)
FORGET = Statement(f"""
DELETE FROM saga_executions
WHERE id = ANY ({_array("saga_ids", "uuid")})
    AND archived_at <= statement_timestamp() - make_interval(secs => CAST(:older_than AS double precision))
RETURNING id
""")  # noqa: S608 - put together from constants
HAVE_FORGOTTEN = Statement(f"""
SELECT forgotten
FROM saga_store_forget_stubs({_array("saga_ids", "uuid")}, CAST(:older_than AS double precision)) AS forgotten
""")  # noqa: S608 - put together from constants

LOCK_TO_HOLD = Statement(f"""
SELECT {_answer("status", "recovery_attempts", "lease_owner", _utc("retain_until"), _utc("archived_at"), _utc("statement_timestamp()"))} AS answer
FROM saga_executions
WHERE id = {_id("saga_id")}
FOR NO KEY UPDATE
""")  # noqa: E501, S608 - columns, and put together from constants
HOLD = Statement(f"""
WITH held AS (
    UPDATE saga_executions
    SET retain_until = CAST(CAST(:until AS text) AS timestamp) AT TIME ZONE 'UTC'
    WHERE id = {_id("saga_id")} AND archived_at IS NULL
    RETURNING id
), logged AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT id, CAST(:step_name AS text), 'act', 'COMPLETED', CAST(:details AS text), statement_timestamp()
    FROM held
)
SELECT id FROM held
""")  # noqa: S608 - put together from constants
