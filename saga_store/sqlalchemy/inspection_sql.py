"""The statements of the views, put together for what is asked, and what settling a step reads; no I/O.

How they keep to the indexes, however many rows there are:

- Unfinished, FAILED and COMPLETED sagas are picked apart from each other, each kind in the order of its own index, with
  the status as it stands in the predicate of that; unless all are asked for alike.
- A history is read from its end, by LATERAL with a limit of its own: one probe for each saga, whatever the statistics
  say.
- No context is read unless a field of it is asked for.
- The clock is a column of a FROM item, which PostgreSQL pulls up, as in write_sql.py: it stands in no CASE.

Each row comes as one JSON array, in UTF-8: what a name, a time or a number looks like then is no setting's business.
Times are in UTC, for which `infinity` is a word like any other.
"""

from functools import cache

from saga_store.inspection import (
    DETAILS_SHOWN,
    ENTRIES_SEEN,
    FEWEST_SEEN,
    HISTORY_SEEN,
    INTERVENTION,
    MOST_COUNTED,
    RECORD_SHOWN,
    SAGAS_SEEN,
)
from saga_store.model import SagaStatus
from saga_store.sqlalchemy.statement import Statement

VIEW_SECONDS = 5
"""How long a view may take, where the storage owns the transaction."""

_UNFINISHED = "status IN ('PENDING', 'RUNNING', 'COMPENSATING')"
# The kinds of sagas, by the first of their statuses.
_KINDS = {
    SagaStatus.PENDING: _UNFINISHED,
    SagaStatus.FAILED: "status = 'FAILED'",
    SagaStatus.COMPLETED: "status = 'COMPLETED'",
}
# How a saga is doing, as far as its row tells: one that is stale counts as active here.
_STANDING = f"""
    CASE WHEN NOT ({_UNFINISHED}) THEN 'finished'
        WHEN lease_expires_at > clock.at THEN 'held'
        WHEN recovery_attempts >= CAST(:max_attempts AS integer) THEN 'exhausted'
        WHEN lease_expires_at IS NOT NULL THEN 'abandoned'
        ELSE 'active' END"""
_ROW = (
    "id, name, status, version, recovery_attempts, lease_owner, lease_expires_at, created_at, updated_at, archived_at, "
    "retain_until"
)


def _moment(parameter: str) -> str:
    return f"CAST(CAST(:{parameter} AS text) AS timestamp) AT TIME ZONE 'UTC'"


_CLOCK = "(SELECT statement_timestamp() AS at) AS clock"


def _ago(parameter: str) -> str:
    return f"statement_timestamp() - make_interval(secs => CAST(:{parameter} AS double precision))"


def _utc(column: str) -> str:
    return f"{column} AT TIME ZONE 'UTC'"


def _answer(*columns: str) -> str:
    return f"convert_to(CAST(json_build_array({', '.join(columns)}) AS text), 'UTF8')"


# A field of a context, as jsonb. PostgreSQL can't hold every string that JSON can: NUL nowhere, half a surrogate pair
# neither, and in a database that isn't in UTF-8 hardly anything. So those escapes stay escapes, in both values. Escaped
# backslashes get another spelling first: then every backslash that is left begins an escape.
_ESCAPE = r"""CASE current_setting('server_encoding')
        WHEN 'UTF8' THEN E'\\\\u(0000|[dD][89a-fA-F]..)' ELSE E'\\\\u(....)' END"""
_BARE_CONTEXT = rf"""
    CASE WHEN {{text}} ~ ({_ESCAPE})
        THEN regexp_replace(replace({{text}}, E'\\\\', E'\\u005c'), ({_ESCAPE}), E'\\\\\\\\u\\1', 'g')
        ELSE {{text}} END"""


def _bare(text: str) -> str:
    return f"CAST({_BARE_CONTEXT.format(text=text)} AS json)"


# As long as what is asked for is an object, so is what is found: a context that is none has no fields.
_HAS_FIELDS = f"""
    NOT EXISTS (
        SELECT FROM json_each({_bare("CAST(:context AS text)")}) AS asked
        WHERE (CAST({_bare("CAST(context AS text)")} -> asked.key AS jsonb) = CAST(asked.value AS jsonb)) IS NOT TRUE
    )"""
# What a row has to fulfil, by what is asked.
_ROW_CONDITIONS = {
    "statuses": "status = ANY (CAST(:statuses AS text[]))",
    "standings": f"{_STANDING} = ANY (CAST(:standings AS text[]))",
    "name": "name = CAST(:name AS text)",
    "lease_owner": "lease_owner = CAST(:lease_owner AS text)",
    "created_after": f"created_at >= {_moment('created_after')}",
    "created_before": f"created_at < {_moment('created_before')}",
    "first_id": "id BETWEEN CAST(CAST(:first_id AS text) AS uuid) AND CAST(CAST(:last_id AS text) AS uuid)",
    "context": _HAS_FIELDS,
}
_WINDOW = f"created_at >= {_ago('window')}"
_KEYSET = f"(created_at, id) < ({_moment('after_created_at')}, CAST(CAST(:after_id AS text) AS uuid))"
# What its history has to fulfil.
_HISTORY_CONDITIONS = {
    "conditions": "condition = ANY (CAST(:conditions AS text[]))",
    "step": "last_step = CAST(:step AS text)",
    "silent_for": f"since <= {_ago('silent_for')}",
    "in_doubt": "(in_doubt > 0 AND condition <> 'held') = CAST(:in_doubt AS boolean)",
}


def _seen(sagas: str) -> str:
    """Return how many entries of each are looked at, as ``history_seen`` has it, if those of so many sagas are."""
    return f"GREATEST({FEWEST_SEEN}, LEAST({HISTORY_SEEN}, {ENTRIES_SEEN} / GREATEST({sagas}, 1)))"


def _digest(saga: str, *, only_if: str = "TRUE", seen: str = str(HISTORY_SEEN)) -> str:
    """Return a query for what a view needs of a saga's history, a row in any case.

    What one statement has written has one time. So what came with an intervention is a person's, and no sign of life.
    """
    return f"""
        SELECT max(last_id) AS last_id,
            max(failed_id) FILTER (WHERE failed_id > COALESCE(done_id, 0)) AS error_id,
            count(*) FILTER (WHERE started_id > GREATEST(failed_id, done_id, 0)) AS in_doubt,
            max(changed_at) AS changed_at,
            COALESCE(bool_or(is_touched), FALSE) AS is_touched
        FROM (
            SELECT max(id) FILTER (WHERE NOT is_intervention) AS last_id,
                max(id) FILTER (WHERE status = 'STARTED') AS started_id,
                max(id) FILTER (WHERE status = 'FAILED' AND NOT is_intervention) AS failed_id,
                max(id) FILTER (WHERE status IN ('COMPLETED', 'COMPENSATED')) AS done_id,
                max(created_at) FILTER (WHERE NOT is_by_person) AS changed_at,
                bool_or(is_intervention AND created_at = {saga}.updated_at) AS is_touched
            FROM (
                SELECT *, bool_or(is_intervention) OVER (PARTITION BY created_at) AS is_by_person
                FROM (
                    SELECT id, step_name, action, status, created_at,
                        starts_with(step_name, '{INTERVENTION}') AS is_intervention
                    FROM saga_logs
                    WHERE saga_id = {saga}.id AND {only_if}
                    ORDER BY id DESC
                    LIMIT {seen}
                ) recent
            ) told_apart
            GROUP BY step_name, action, is_intervention
        ) steps"""


_SINCE = "GREATEST(h.changed_at, CASE WHEN h.is_touched THEN {saga}.created_at ELSE {saga}.updated_at END)"


_STALE_CLOCK = f"(SELECT {_ago('stale_after')} AS stale_before) AS clock"


def _condition(saga: str) -> str:
    return f"""
        CASE WHEN {saga}.standing = 'active' AND {_SINCE.format(saga=saga)} <= clock.stale_before THEN 'stale'
            ELSE {saga}.standing END"""


def _entry(saga: str, entry_id: str) -> str:
    """Return a query for one entry of a saga, by LATERAL: an index probe, since it can't be made a join."""
    return f"SELECT * FROM saga_logs WHERE saga_id = {saga}.id AND id = {entry_id} LIMIT 1"


def _shown(entry: str) -> str:
    half = DETAILS_SHOWN // 2
    details = (
        f"CASE WHEN length({entry}.details) > {DETAILS_SHOWN} "
        f"THEN json_build_array(left({entry}.details, {half}), right({entry}.details, {half})) "
        f"ELSE to_json({entry}.details) END"
    )
    columns = (f"{entry}.id", f"{entry}.step_name", f"{entry}.action", f"{entry}.status", details)
    return f"json_build_array({', '.join(columns)}, {_utc(f'{entry}.created_at')})"


@cache
def _picked(asked: frozenset[str], kinds: tuple[SagaStatus, ...], *, samples: bool, most: str = ":limit") -> str:
    """Return a query for the rows that may be asked for, of each kind the first ones in its order."""
    conditions = [condition for name, condition in _ROW_CONDITIONS.items() if name in asked]
    # All kinds alike are one index scan. Apart, each would be searched for among the newest, of which it may have none.
    is_every_kind = len(kinds) == len(_KINDS) and not samples and "window" not in asked
    queries = []
    for kind in [None] if is_every_kind else kinds:
        lives = kind is SagaStatus.PENDING
        fulfilled = [*conditions] if kind is None else [_KINDS[kind], *conditions]
        if "window" in asked and not lives:
            fulfilled.append(_WINDOW)
        if "after_id" in asked and not samples:
            fulfilled.append(_KEYSET)
        # Of samples the oldest of those that live: they are the ones that are stuck.
        order = "created_at, id" if samples and lives else "created_at DESC, id DESC"
        position = f"row_number() OVER (ORDER BY {order})" if samples else "0"
        queries.append(f"""(
            SELECT {_ROW}, {_STANDING} AS standing, {position} AS position
            FROM saga_executions CROSS JOIN {_CLOCK}
            WHERE {" AND ".join(fulfilled) or "TRUE"}
            ORDER BY {order}
            LIMIT {SAGAS_SEEN + 1 if samples else most})""")
    return " UNION ALL ".join(queries)


def _judged(asked: frozenset[str], kinds: tuple[SagaStatus, ...], *, samples: bool) -> str:
    """Return CTEs that end by ``asked``: the sagas that are asked for, with what their histories tell."""
    most = "" if samples else "ORDER BY created_at DESC, id DESC LIMIT :limit"
    seen = _seen("(SELECT count(*) FROM first)") if samples else str(HISTORY_SEEN)
    conditions = [condition for name, condition in _HISTORY_CONDITIONS.items() if name in asked]
    if samples and "after_id" in asked:
        conditions.append(_KEYSET)
    return f"""
WITH picked AS MATERIALIZED ({_picked(asked, kinds, samples=samples)}),
first AS MATERIALIZED (
    SELECT * FROM picked
    WHERE position <= {SAGAS_SEEN}
    {most}
), judged AS MATERIALIZED (
    SELECT p.*, h.last_id, h.error_id, h.in_doubt, {_SINCE.format(saga="p")} AS since, {_condition("p")} AS condition,
        last.step_name AS last_step
    FROM first p
    CROSS JOIN {_STALE_CLOCK}
    CROSS JOIN LATERAL ({_digest("p", seen=seen)}) h
    LEFT JOIN LATERAL ({_entry("p", "h.last_id")}) last ON TRUE
), asked AS MATERIALIZED (
    SELECT * FROM judged
    WHERE {" AND ".join(conditions) or "TRUE"}
    ORDER BY created_at DESC, id DESC
    LIMIT :limit
)"""


_IS_PARTIAL = f"(SELECT COALESCE(bool_or(position > {SAGAS_SEEN}), FALSE) FROM picked)"


@cache
def find(asked: frozenset[str], kinds: tuple[SagaStatus, ...], *, samples: bool) -> Statement:
    """Return a statement that lists sagas; its first row tells the time, and whether not all was looked at."""
    moments = ("s.lease_expires_at", "s.created_at", "s.updated_at", "s.since", "s.archived_at", "s.retain_until")
    row = _answer(
        "s.id",
        *map(_utc, moments),
        "s.name",
        "s.status",
        "s.version",
        "s.recovery_attempts",
        "s.lease_owner",
        "s.condition",
        "s.in_doubt",
        f"CASE WHEN last.id IS NOT NULL THEN {_shown('last')} END",
        f"CASE WHEN error.id IS NOT NULL THEN {_shown('error')} END",
    )
    return Statement(f"""{_judged(asked, kinds, samples=samples)}
(SELECT {_answer(_utc("statement_timestamp()"), _IS_PARTIAL)} AS answer)
UNION ALL
(SELECT {row}
FROM asked s
LEFT JOIN LATERAL ({_entry("s", "s.last_id")}) last ON TRUE
LEFT JOIN LATERAL ({_entry("s", "s.error_id")}) error ON TRUE
ORDER BY s.created_at DESC, s.id DESC)
""")


@cache
def count(asked: frozenset[str], kinds: tuple[SagaStatus, ...], *, samples: bool) -> Statement:
    """Return a statement that counts sagas; with ``samples``, those whose histories had to be read."""
    if samples:
        return Statement(f"""{_judged(asked, kinds, samples=True)}
SELECT {_answer("(SELECT count(*) FROM asked)", _IS_PARTIAL)} AS answer
""")
    picked = _picked(asked, kinds, samples=False, most=str(MOST_COUNTED + 1))
    return Statement(f"SELECT {_answer('count(*)', 'FALSE')} AS answer FROM ({picked}) picked")


@cache
def interventions(*, asks_who: bool, goes_on: bool) -> Statement:
    """Return a statement that lists what persons did, by the partial index of their entries."""
    row = _answer(
        "l.id", "l.saga_id", "e.name", "l.step_name", f"left(l.details, {RECORD_SHOWN + 1})", _utc("l.created_at")
    )
    return Statement(f"""
SELECT {row} AS answer
FROM (
    SELECT *
    FROM saga_logs
    WHERE starts_with(step_name, '{INTERVENTION}') AND created_at >= {_moment("since")}
        {"AND starts_with(details, CAST(:prefix AS text))" if asks_who else ""}
        {"AND id < CAST(:after AS bigint)" if goes_on else ""}
    ORDER BY id DESC
    LIMIT :limit
) l
LEFT JOIN LATERAL (SELECT name FROM saga_executions WHERE id = l.saga_id LIMIT 1) e ON TRUE
ORDER BY l.id DESC
""")


# When a saga was archived, in an array, which is NULL if there is no such saga.
_ARCHIVED = f"json_build_array({_utc('archived_at')})"
# The end of a history. Its first row tells whether there is such a saga, and how many entries there are.
RECENT_HISTORY = Statement(f"""
(SELECT {
    _answer(
        f"(SELECT {_ARCHIVED} FROM saga_executions WHERE id = CAST(CAST(:saga_id AS text) AS uuid))",
        "(SELECT count(*) FROM saga_logs WHERE saga_id = CAST(CAST(:saga_id AS text) AS uuid)"
        " AND id > CAST(:after AS bigint))",
    )
} AS answer)
UNION ALL
(SELECT {_answer(_shown("l"))}
FROM (
    SELECT *
    FROM saga_logs
    WHERE saga_id = CAST(CAST(:saga_id AS text) AS uuid) AND id > CAST(:after AS bigint)
    ORDER BY id DESC
    LIMIT :limit
) l
ORDER BY l.id)
""")


# Its size is that of the JSON text as it is kept, which the server has to unpack for that, but not to send.
CONTEXT = Statement(f"""
SELECT {
    _answer("archived", "octet_length(text)", "CASE WHEN octet_length(text) <= CAST(:most AS integer) THEN text END")
} AS answer
FROM (
    SELECT {_ARCHIVED} AS archived, CAST(context AS text) AS text
    FROM saga_executions
    WHERE id = CAST(CAST(:saga_id AS text) AS uuid)
    OFFSET 0
) peeked
""")


def _of_table(table: str) -> str:
    oid = f"CAST('{table}' AS regclass)"
    parts = (f"pg_relation_size({oid})", f"pg_table_size({oid}) - pg_relation_size({oid})", f"pg_indexes_size({oid})")
    vacuumed = f"GREATEST(pg_stat_get_last_vacuum_time({oid}), pg_stat_get_last_autovacuum_time({oid}))"
    counts = (f"pg_stat_get_tuples_{kind}({oid})" for kind in ("updated", "hot_updated"))
    figures = (*parts, f"pg_stat_get_dead_tuples({oid})", *counts, _utc(vacuumed))
    return f"json_build_array({', '.join(figures)})"


# Of the oldest unfinished sagas histories are read; of the rest the row has to do, and there is an end to counting, so
# that there are figures on the day on which nothing finishes, or everything fails.
_OF_LIVING = _seen(f"(SELECT LEAST(count(*), {SAGAS_SEEN}) FROM living)")
_OF_FAILED = _seen(f"(SELECT LEAST(count(*), {SAGAS_SEEN}) FROM failed)")
FIGURES = Statement(f"""
WITH living AS MATERIALIZED (
    SELECT id, name, created_at, updated_at, {_STANDING} AS standing,
        row_number() OVER (ORDER BY created_at, id) AS position
    FROM (
        SELECT * FROM saga_executions WHERE {_UNFINISHED} ORDER BY created_at, id LIMIT {MOST_COUNTED + 1}
    ) oldest
    CROSS JOIN {_CLOCK}
), judged AS MATERIALIZED (
    SELECT p.name, {_condition("p")} AS condition, CASE WHEN p.standing <> 'held' THEN h.in_doubt END AS in_doubt
    FROM living p
    CROSS JOIN {_STALE_CLOCK}
    LEFT JOIN LATERAL ({_digest("p", only_if=f"p.position <= {SAGAS_SEEN}", seen=_OF_LIVING)}) h ON TRUE
    WHERE p.position <= {MOST_COUNTED}
), failed AS MATERIALIZED (
    SELECT id, updated_at, row_number() OVER (ORDER BY created_at DESC, id DESC) AS position
    FROM (
        SELECT * FROM saga_executions
        WHERE status = 'FAILED' AND {_WINDOW}
        ORDER BY created_at DESC, id DESC
        LIMIT {MOST_COUNTED + 1}
    ) newest
), failed_in_doubt AS (
    SELECT h.in_doubt
    FROM failed p
    CROSS JOIN LATERAL ({_digest("p", seen=_OF_FAILED)}) h
    WHERE p.position <= {SAGAS_SEEN}
), groups AS (
    SELECT name, condition, count(*) AS sagas
    FROM judged
    GROUP BY name, condition
)
SELECT {
    _answer(
        "(SELECT COALESCE(json_agg(json_build_array(name, condition, sagas)), '[]') FROM groups)",
        f"(SELECT {_utc('min(created_at)')} FROM living)",
        _utc("statement_timestamp()"),
        "(SELECT COALESCE(sum(in_doubt), 0) FROM judged) + (SELECT COALESCE(sum(in_doubt), 0) FROM failed_in_doubt)",
        "(SELECT count(*) FROM failed)",
        "(SELECT count(*) FROM living)",
        "(SELECT CAST(reltuples AS bigint) FROM pg_class WHERE oid = CAST('saga_executions' AS regclass))",
        "(SELECT id FROM saga_logs ORDER BY id DESC LIMIT 1)",
        _of_table("saga_executions"),
        _of_table("saga_logs"),
        "has_table_privilege(CAST('saga_archives' AS regclass), 'SELECT')",
    )
} AS answer
""")
# For those who may read it.
LEDGER = Statement(f"""
SELECT {
    _answer(
        "COALESCE(sum(removed), 0)",
        "COALESCE(sum(bytes) FILTER (WHERE state <> 'FAILED'), 0)",
        f"count(*) FILTER (WHERE state = 'FAILED' AND begun_at >= {_ago('window')})",
        _utc("max(archived_at)"),
        "EXTRACT(epoch FROM statement_timestamp() - min(begun_at) FILTER (WHERE state IN ('WRITING', 'VERIFIED')))",
    )
} AS answer
FROM saga_archives
""")

# The saga's row, locked. What is in doubt is asked after that, by a statement of its own, for its snapshot has to be
# younger than the lock, which whoever logs a step takes, too.
LOCK = Statement(f"""
SELECT {_answer(_ARCHIVED, "status", "recovery_attempts", "lease_owner", "version")} AS answer
FROM saga_executions
WHERE id = CAST(CAST(:saga_id AS text) AS uuid)
FOR NO KEY UPDATE
""")
# An entry in doubt, and which later attempt at the same step is in doubt as well.
_LATER = """(
        SELECT max(later.id) FROM saga_logs later
        WHERE later.saga_id = l.saga_id AND later.id > l.id
            AND later.step_name = l.step_name AND later.action = l.action
    )"""
DOUBT = Statement(f"""
SELECT {_answer("l.step_name", "l.action", _LATER)} AS answer
FROM saga_logs l
WHERE l.saga_id = CAST(CAST(:saga_id AS text) AS uuid) AND l.id = CAST(:entry_id AS bigint) AND l.status = 'STARTED'
    AND NOT EXISTS (
        SELECT FROM saga_logs later
        WHERE later.saga_id = l.saga_id AND later.id > l.id AND later.status <> 'STARTED'
            AND later.step_name = l.step_name AND later.action = l.action
    )
""")
# In force until the end of the transaction. A plan that was made for no values in particular would take an id's first
# digits for many rows, and look for them along the times of creation.
READ_ONLY = Statement(f"""
SELECT set_config('transaction_read_only', 'on', TRUE), set_config('statement_timeout', '{VIEW_SECONDS}s', TRUE),
    set_config('plan_cache_mode', 'force_custom_plan', TRUE)
""")
