"""The statements that write sagas, put together for what there is to write; no I/O.

A refused write raises nothing, for that would abort the caller's transaction. There are two kinds of statement:

- One that *writes now* returns the id and the version of each saga that it wrote, and nothing of the others.
- One that *explains* writes as well whatever may be written, and says of each write what came of it. What the first
  kind left out goes through it.

What they have in common:

- The row is locked before it is changed, also for log entries alone: so `version` is the latest committed one, and the
  ids of a saga's entries follow the order of its commits.
- Two can't deadlock: those that wait for locked rows lock in id order, and sagas are created in id order.
- The times are the statement's, not the transaction's, which may have begun long ago; a step that waited in a buffer
  gets the time at which it was logged.
- A lease is taken only if nobody else holds it, which the lock decides too. Renewing it changes the row but not its
  version; a finished saga has none. If the statement had to wait for the row, its clock is behind: then it takes a
  lease that has just expired for one that still holds, never the other way round.
- A write with an id (see write_ids.py) puts it into the row. One whose id is there already isn't written again. As long
  as the version stays, ids of writes that don't raise it aren't dropped; when there are too many of them, the next ones
  go in without a trace, but never the second time.
- What a write asks for, and the times that follow from the clock, are columns of a FROM item, and in a CASE or COALESCE
  stands no function that isn't immutable: Citus refuses that. PostgreSQL pulls such an item up, and plans the same.
- Those that wait for nobody skip a row that somebody has locked. An INSERT can't skip an id that somebody is creating,
  so it fails soon, with 55P03.
"""

from collections.abc import Container, Mapping
from functools import cache

from saga_store.sqlalchemy.statement import Statement
from saga_store.write_ids import RANDOM_BITS, VERSION_MASK

# How many ids of writes a row keeps (see write_ids.py); a write that raises the version drops older ones.
KEPT = 8
# Writes that don't raise it may not drop each other's ids: nothing else keeps them from being written twice.
KEPT_OF_ONE_VERSION = 32

# What a write may ask for: parameters of a single one, and of several columns, made of parameters that are arrays.
_TYPES = {
    "saga_id": "uuid",
    "name": "text",
    "status": "text",
    "context": "json",
    "attempts": "integer",
    "expected": "bigint",
    "lease_owner": "text",
    "lease_seconds": "double precision",
    "releases": "boolean",
    "write_id": "bigint",
}
# What changes the row of a saga that is there.
_UPDATING = {"status", "context", "attempts", "lease_owner", "lease_seconds", "releases", "write_id"}
# The ones of them that may come without anything that raises the version.
_QUIET = {"lease_seconds", "write_id"}
# An entry of a history.
_STEP_TYPES = {
    "step_name": "text",
    "step_action": "text",
    "step_status": "text",
    "step_details": "text",
    "step_age": "double precision",
}
# Where there are many writes, an entry says whose it is.
_STEP_TYPES_OF_MANY = {"step_saga_id": "uuid", **_STEP_TYPES}
# The names of parameters for many writes begin by what those do: create a saga, update one, or append a single entry.
# Entries of the first two kinds have no prefix. The single entry of a single write goes by the last one, too.
NEW, UPDATE, APPEND = "new_", "update_", "append_"

# What may need quotes. Arrays of all else travel as one text each, which the server takes apart: drivers take their
# time over each element of an array, and may have been given other ideas of what ids and numbers look like.
_PROSE = {"name", "context", "lease_owner", "step_name", "step_details"}

_CHANGES = (
    "({status} IS NOT NULL OR {context} IS NOT NULL OR {attempts} IS NOT NULL OR {lease_owner} IS NOT NULL"
    " OR COALESCE({releases}, FALSE))"
)
_UPDATES = "({changes} OR {lease_seconds} IS NOT NULL OR ({write_id} IS NOT NULL AND NOT e.full_up))"
_RECORDED = "COALESCE({write_id} = ANY (recent_writes), FALSE)"
_FULL_UP = (
    f"COALESCE(cardinality(recent_writes) >= {KEPT_OF_ONE_VERSION}"
    f" AND recent_writes[1] >> {RANDOM_BITS} = version & {VERSION_MASK}, FALSE)"
)
# What a write has to fulfil, by what it asks for.
_CONDITIONS = {
    "expected": "({expected} IS NULL OR {expected} = version)",
    "write_id": f"NOT {_RECORDED}",
    "lease_owner": (
        "({lease_owner} IS NULL OR lease_owner IS NULL OR lease_owner = {lease_owner}"
        " OR lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())"
    ),
}
# Nothing is written to the stub of a saga that was let go. That is judged again when its row is locked, too.
_IS_HERE = "archived_at IS NULL"
# In force as soon as it is called, until the end of the statement.
_PATIENCE = "(SELECT set_config('lock_timeout', '100ms', TRUE)) AS patience"
# For what has been waited for before, and is tried again now and then.
_LITTLE_PATIENCE = _PATIENCE.replace("100ms", "10ms")

# When it is, and when a lease ends.
_TIMES = "statement_timestamp() AS at, statement_timestamp() + make_interval(secs => {lease_seconds}) AS ends"

# Both take what is asked from a FROM item i, with these times among its columns.
_CREATE = """
    INSERT INTO saga_executions (
        id, name, status, context, recovery_attempts, lease_owner, lease_expires_at, recent_writes,
        created_at, updated_at
    )
    SELECT i.saga_id, i.name, COALESCE({status}, 'PENDING'), COALESCE({context}, '{{}}'), COALESCE({attempts}, 0),
        CASE WHEN {status} IN ('COMPLETED', 'FAILED') THEN NULL ELSE {lease_owner} END,
        CASE WHEN {status} IN ('COMPLETED', 'FAILED') THEN NULL ELSE i.ends END,
        CASE WHEN {write_id} IS NOT NULL THEN ARRAY[{write_id}] END,
        i.at, i.at
    {source}
    ON CONFLICT (id) DO NOTHING
    RETURNING id, CAST(version AS bigint) AS version
"""
_UPDATE = f"""
    UPDATE saga_executions e
    SET status = COALESCE({{status}}, e.status),
        context = COALESCE({{context}}, e.context),
        recovery_attempts = COALESCE({{attempts}}, e.recovery_attempts),
        lease_owner = CASE WHEN {{status}} IN ('COMPLETED', 'FAILED') OR {{releases}} THEN NULL
            ELSE COALESCE({{lease_owner}}, e.lease_owner) END,
        lease_expires_at = CASE WHEN {{status}} IN ('COMPLETED', 'FAILED') OR {{releases}}
                OR COALESCE({{lease_owner}}, e.lease_owner) IS NULL THEN NULL
            ELSE COALESCE(i.ends, e.lease_expires_at) END,
        recent_writes = CASE
            WHEN {{write_id}} IS NULL THEN e.recent_writes
            WHEN {{changes}} THEN
                e.recent_writes[GREATEST(cardinality(e.recent_writes) - {KEPT} + 2, 1):] || {{write_id}}
            WHEN (cardinality(e.recent_writes) < {KEPT_OF_ONE_VERSION}) IS NOT FALSE
                THEN e.recent_writes || {{write_id}}
            WHEN e.recent_writes[1] >> {RANDOM_BITS} = e.version & {VERSION_MASK} THEN e.recent_writes
            ELSE e.recent_writes[2:] || {{write_id}} END,
        version = e.version + CAST({{changes}} AS integer),
        updated_at = CASE WHEN {{changes}} THEN i.at ELSE e.updated_at END
    {{source}}
    RETURNING e.id, CAST(e.version AS bigint) AS version
"""


# NULLs for what isn't there: the planner drops whatever depends on it.
_ABSENT = {name: f"CAST(NULL AS {kind})" for name, kind in {**_TYPES, **_STEP_TYPES}.items()}


def _parameter(name: str, kind: str) -> str:
    # JSON travels as text: what a driver makes of it depends on codecs that the application may have set.
    sent_as = kind.replace("json", "text")
    return f"CAST(:{name} AS {kind})" if sent_as == kind else f"CAST(CAST(:{name} AS {sent_as}) AS {kind})"


def _array(name: str, kind: str, parameter: str) -> str:
    if name in _PROSE:
        return _parameter(parameter, f"{kind}[]")
    if kind == "uuid":  # never NULL
        return f"CAST(CAST(:{parameter} AS text) AS uuid[])"
    # What is empty is NULL. By the word NULL the server's array_nulls may mean something else.
    return f"CAST(string_to_array(CAST(:{parameter} AS text), ',', '') AS {kind}[])"


def _row(asked: Mapping[str, str], parameters: Mapping[str, str]) -> str:
    """Return what a single write asks for as a row."""
    columns = "".join(f"{parameters[name]} AS {name}, " for name in asked)
    return f"(SELECT {columns}{_TIMES.format(**parameters)}) AS i"


def _rows(types: Mapping[str, str], alias: str, prefix: str = "") -> str:
    """Return arrays as rows. OFFSET hides their length from the planner.

    Otherwise it would find a plan of its own for every call cheaper than the prepared one, and planning takes longer
    than executing.
    """
    arrays = ", ".join(f"{_array(name, kind, prefix + name)} AS {name}" for name, kind in types.items())
    names = ", ".join(types)
    columns = ", ".join(f"{alias}_arrays.{name}" for name in types)
    return f"""(
        (SELECT {arrays} OFFSET 0) AS {alias}_arrays
        CROSS JOIN LATERAL unnest({columns}) WITH ORDINALITY AS {alias} ({names}, position)
    )"""


# What is logged has been locked before the sequence is drawn from.
_LOG = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT {step_saga_id}, {step_name}, {step_action}, {step_status}, {step_details},
        statement_timestamp() - make_interval(secs => COALESCE({step_age}, 0))
    {source}
"""


@cache
def write_one(present: frozenset[str], *, waits: bool) -> Statement:
    """Return a statement that writes now, for a single write with these parameters."""
    asked = _some(_TYPES, present)
    parameters = _ABSENT | {name: _parameter(name, kind) for name, kind in asked.items()}
    if "name" in present:
        source = f"FROM {_row(asked, parameters)}{'' if waits else f' CROSS JOIN {_PATIENCE}'}"
        written = _CREATE.format(**_columns(asked), source=source)
    else:
        updates = {name: kind for name, kind in asked.items() if name in _UPDATING}
        answers = "id" if updates else "id, version"
        written = _lock(":saga_id", _accepted(present), parameters, answers, waits=waits)
        if updates:
            columns = _columns(updates)
            source = f"FROM {_row(updates, parameters)} WHERE e.id = ({written})"
            written = _UPDATE.format(**columns, changes=_CHANGES.format(**columns), source=source)
    step, steps = _some(_STEP_TYPES, present, APPEND), _some(_STEP_TYPES, present)
    if step:
        entry = _ABSENT | {name: _parameter(APPEND + name, kind) for name, kind in step.items()}
        logged = _LOG.format(**entry, step_saga_id="w.id", source="FROM written w")
    elif steps:
        source = f"FROM written w CROSS JOIN {_rows(steps, 's')} ORDER BY s.position"
        logged = _LOG.format(**_columns(steps, "s"), step_saga_id="w.id", source=source)
    else:
        return Statement(written)
    return Statement(
        f"WITH written AS ({written}), logged AS ({logged}) SELECT id, CAST(version AS bigint) FROM written"
    )


@cache
def write_many(present: frozenset[str]) -> Statement:
    """Return a statement that writes now, for writes to different sagas with these parameters, and waits for nobody."""
    new, updates = _some(_TYPES, present, NEW), _some(_TYPES, present, UPDATE)
    steps = _some(_STEP_TYPES_OF_MANY, present)
    appends = _some({"expected": "bigint", **_STEP_TYPES_OF_MANY}, present, APPEND)
    parts, written = {}, []
    if new:
        asked = _columns(new)
        timed = f"(SELECT i.*, {_TIMES.format(**asked)} FROM {_rows(new, 'i', NEW)}) i"
        parts["created"] = _CREATE.format(**asked, source=f"FROM {timed} CROSS JOIN {_PATIENCE}")
        written.append("SELECT id, version FROM created")
    if updates:
        asked = _columns(updates)
        changes = _CHANGES.format(**asked) if updates.keys() & _QUIET else "TRUE"
        # By the last condition, which is always true, the planner expects a single row. So it makes it an index probe
        # in the update, too, whatever the statistics say: a cached plan that was made when the table was empty must
        # not turn into a sequential scan when it is full.
        locked = f"""
            SELECT i.*, {changes} AS changes, {_TIMES.format(**asked)}
            FROM {_rows(updates, "i", UPDATE)} CROSS JOIN LATERAL ({_lock("i.saga_id", _accepted(updates), asked)}) l
            WHERE l.id = i.saga_id"""
        source = f"FROM ({locked}) i WHERE e.id = i.saga_id"
        parts["updated"] = _UPDATE.format(**asked, changes="i.changes", source=source)
        written.append("SELECT id, version FROM updated")
    if steps:
        parts["written"] = " UNION ALL ".join(written)
        parts["logged"] = _log_written(steps)
    if appends:
        asked = _columns(appends, "s")
        locked = _lock("s.step_saga_id", _accepted(appends), asked)
        parts["appended"] = f"""
            SELECT s.*, l.version
            FROM {_rows(appends, "s", APPEND)} CROSS JOIN LATERAL ({locked}) l"""
        parts["logged_alone"] = _LOG.format(**asked, source="FROM appended s")
        written.append("SELECT step_saga_id, version FROM appended")
    return Statement(f"{_with(parts)} {' UNION ALL '.join(written)}")


@cache
def explain(*, waits: bool, again: bool = False) -> Statement:
    """Return a statement that explains, for writes to different sagas; ``again`` is for what may have been written.

    Each write comes back by its position. If it isn't written, `written` is NULL, `found` is the version that the saga
    is at, `archived_at` says that it is a stub, and if `found` is NULL too, `is_there` tells a saga that somebody has
    locked from one that is missing.
    """
    asked = _columns(_TYPES)
    accepted = _accepted(_TYPES)
    if again:
        accepted += f" AND NOT ({{write_id}} IS NOT NULL AND NOT i.changes AND {_FULL_UP})"
    answers = f"""
        id, version, archived_at, lease_owner AS holder, lease_expires_at AS held_until,
        {_FULL_UP} AS full_up, {_RECORDED} AS recorded, {accepted} AS accepted"""
    patience = "" if waits else f"CROSS JOIN {_LITTLE_PATIENCE}"
    changed = "FROM locked i WHERE e.id = i.id AND i.accepted AND i.updates"
    parts = {
        "input": f"""
            SELECT i.*, {_CHANGES.format(**asked)} AS changes, {_TIMES.format(**asked)}
            FROM {_rows(_TYPES, "i")} ORDER BY saga_id""",
        "created": _CREATE.format(**asked, source=f"FROM input i {patience} WHERE i.name IS NOT NULL"),
        # The condition on the name does here what the one on the id does above.
        "locked": f"""
            SELECT i.*, e.*, {_UPDATES.format(**asked, changes="i.changes")} AS updates
            FROM input i
            CROSS JOIN LATERAL ({_lock("i.saga_id", "TRUE", asked, answers, waits=waits)}) e
            WHERE i.name IS NULL""",
        "updated": _UPDATE.format(**asked, changes="i.changes", source=changed),
        "written": """
            SELECT id, version FROM created UNION ALL SELECT id, version FROM updated
            UNION ALL SELECT id, version FROM locked i WHERE i.accepted AND NOT i.updates""",
        "logged": _log_written(_STEP_TYPES_OF_MANY),
    }
    return Statement(f"""{_with(parts)}
SELECT i.position,
    COALESCE(w.version, CASE WHEN l.recorded THEN i.expected + CAST(i.changes AS integer) END) AS written,
    CAST(l.version AS bigint) AS found, convert_to(l.holder, 'UTF8') AS holder,
    timestamptz_send(l.held_until) AS held_until, timestamptz_send(l.archived_at) AS archived_at,
    CASE WHEN l.id IS NULL THEN (SELECT TRUE FROM saga_executions WHERE id = i.saga_id) END AS is_there
FROM input i
LEFT JOIN written w ON w.id = i.saga_id
LEFT JOIN locked l ON l.id = i.saga_id
""")


def _accepted(present: Container[str]) -> str:
    return " AND ".join([_IS_HERE, *(condition for name, condition in _CONDITIONS.items() if name in present)])


def _lock(
    saga_id: str, accepted: str, asked: Mapping[str, str], answers: str = "id, version", *, waits: bool = False
) -> str:
    """Return a query that locks a saga's row; LATERAL makes it one index probe for each of many."""
    return f"""
        SELECT {answers.format(**asked)}
        FROM saga_executions WHERE id = {saga_id} AND {accepted.format(**asked)}
        FOR NO KEY UPDATE {"" if waits else "SKIP LOCKED"}"""


def _log_written(steps: Mapping[str, str]) -> str:
    source = f"FROM written w JOIN {_rows(steps, 's')} ON s.step_saga_id = w.id ORDER BY s.position"
    return _LOG.format(**_columns(steps, "s"), source=source)


def _some(types: Mapping[str, str], present: frozenset[str], prefix: str = "") -> dict[str, str]:
    return {name: kind for name, kind in types.items() if prefix + name in present}


def _columns(present: Mapping[str, str], alias: str = "i") -> dict[str, str]:
    return _ABSENT | {name: f"{alias}.{name}" for name in present}


def _with(parts: Mapping[str, str]) -> str:
    return "WITH " + ", ".join(f"{name} AS ({query})" for name, query in parts.items())
