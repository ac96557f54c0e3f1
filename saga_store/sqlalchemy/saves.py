"""The statements that write sagas, put together for what there is to write; no I/O.

A refused write raises nothing, for that would abort the caller's transaction. There are two kinds of statement:

- One that *hurries* returns the id and the version of each saga that it wrote, and nothing of the others.
- One that *tells* writes as well whatever may be written, and says of each write what came of it. What the first kind
  left out goes through it.

What they have in common:

- The row is locked before it is changed, also for log entries alone: so `version` is the latest committed one, and the
  ids of a saga's entries follow the order of its commits. Batches lock in id order, so that two can't deadlock.
- The times are the statement's, not the transaction's, which may have begun long ago; a step that waited in a buffer
  gets the time at which it was logged.
- A lease is taken only if nobody else holds it, which the lock decides too. Renewing it changes the row but not its
  version; a finished saga has none. If the statement had to wait for the row, its clock is behind: then it takes a
  lease that has just expired for one that still holds, never the other way round.
- A write with an id (see write_ids.py) puts it into the row. One whose id is there already isn't written again. As long
  as the version stays, ids of writes that don't raise it aren't dropped; when there are too many of them, the next ones
  go in without a trace, but never the second time.
- Those that wait for nobody skip a row that somebody has locked. An INSERT can't skip an id that somebody is creating,
  so it fails soon, with 55P03.
"""

from collections.abc import Mapping
from functools import cache

from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.write_ids import KEPT, KEPT_OF_ONE_VERSION, RANDOM_BITS, VERSION_MASK

# What a write may ask for: for a single one these are parameters, for a batch columns from parameters that are arrays.
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
# An entry of a history; these are always arrays.
_STEP_TYPES = {
    "step_name": "text",
    "step_action": "text",
    "step_status": "text",
    "step_details": "text",
    "step_age": "double precision",
}

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
_ACCEPTED = (
    f"({{expected}} IS NULL OR {{expected}} = version) AND NOT {_RECORDED}"
    " AND NOT COALESCE({lease_owner} <> lease_owner AND lease_expires_at > statement_timestamp(), FALSE)"
)
# In force as soon as it is called, until the end of the statement.
_PATIENCE = "(SELECT set_config('lock_timeout', '100ms', TRUE)) AS patience"

_CREATE = """
    INSERT INTO saga_executions (
        id, name, status, context, recovery_attempts, lease_owner, lease_expires_at, recent_writes,
        created_at, updated_at
    )
    SELECT {saga_id}, {name}, COALESCE({status}, 'PENDING'), COALESCE({context}, '{{}}'), COALESCE({attempts}, 0),
        CASE WHEN {status} IN ('COMPLETED', 'FAILED') THEN NULL ELSE {lease_owner} END,
        CASE WHEN {status} IN ('COMPLETED', 'FAILED') THEN NULL
            ELSE statement_timestamp() + make_interval(secs => {lease_seconds}) END,
        CASE WHEN {write_id} IS NOT NULL THEN ARRAY[{write_id}] END,
        statement_timestamp(), statement_timestamp()
    {source}
    ON CONFLICT (id) DO NOTHING
    RETURNING id, version
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
            ELSE COALESCE(statement_timestamp() + make_interval(secs => {{lease_seconds}}), e.lease_expires_at) END,
        recent_writes = CASE
            WHEN {{write_id}} IS NULL THEN e.recent_writes
            WHEN {{changes}} THEN
                e.recent_writes[GREATEST(cardinality(e.recent_writes) - {KEPT} + 2, 1):] || {{write_id}}
            WHEN (cardinality(e.recent_writes) < {KEPT_OF_ONE_VERSION}) IS NOT FALSE
                THEN e.recent_writes || {{write_id}}
            WHEN e.recent_writes[1] >> {RANDOM_BITS} = e.version & {VERSION_MASK} THEN e.recent_writes
            ELSE e.recent_writes[2:] || {{write_id}} END,
        version = e.version + CAST({{changes}} AS integer),
        updated_at = CASE WHEN {{changes}} THEN statement_timestamp() ELSE e.updated_at END
    {{source}}
    RETURNING e.id, e.version
"""


def _parameter(name: str, kind: str) -> str:
    # JSON travels as text: what a driver makes of it depends on codecs that the application may have set.
    sent_as = kind.replace("json", "text")
    return f"CAST(:{name} AS {kind})" if sent_as == kind else f"CAST(CAST(:{name} AS {sent_as}) AS {kind})"


def _rows(types: Mapping[str, str], alias: str) -> str:
    """Return arrays as rows. SELECT around each hides its length from the planner.

    Otherwise it would find a plan of its own for every call cheaper than the prepared one, and planning takes longer
    than executing.
    """
    arrays = ", ".join(f"(SELECT {_parameter(name, f'{kind}[]')})" for name, kind in types.items())
    return f"unnest({arrays}) WITH ORDINALITY AS {alias} ({', '.join(types)}, position)"


# `written` has locked the rows before the sequence is drawn from.
_LOG = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT w.id, s.step_name, s.step_action, s.step_status, s.step_details,
        statement_timestamp() - make_interval(secs => COALESCE(s.step_age, 0))
    FROM written w
    {steps}
    ORDER BY s.position
"""
_LOG_ONE = _LOG.format(steps=f"CROSS JOIN {_rows(_STEP_TYPES, 's')}")
_LOG_MANY = _LOG.format(steps=f"JOIN {_rows({'step_saga_id': 'uuid', **_STEP_TYPES}, 's')} ON s.step_saga_id = w.id")
_WRITTEN = "SELECT id, version FROM written"


@cache
def save_one(present: frozenset[str], *, waits: bool) -> Statement:
    """Return a statement that hurries, for a single write with these parameters."""
    asked = _absent(present) | {name: _parameter(name, _TYPES[name]) for name in present & _TYPES.keys()}
    asked["changes"] = _CHANGES.format(**asked)
    if "name" in present:
        written = _CREATE.format(**asked, source="" if waits else f"FROM {_PATIENCE}")
    else:
        found = f"""
            FROM saga_executions WHERE id = :saga_id AND {_ACCEPTED.format(**asked)}
            FOR NO KEY UPDATE {_wait(waits=waits)}"""
        if present & _UPDATING:
            written = _UPDATE.format(**asked, source=f"WHERE e.id = (SELECT id {found})")
        else:
            written = f"SELECT id, version {found}"
    if "step_name" not in present:
        return Statement(written)
    return Statement(f"WITH written AS ({written}), logged AS ({_LOG_ONE}) {_WRITTEN}")


@cache
def save_many(present: frozenset[str], *, creates: bool, finds: bool) -> Statement:
    """Return a statement that hurries, for writes to different sagas with these parameters, and waits for nobody.

    Some of them create their sagas, or find sagas that are there, or both.
    """
    asked = _absent(present) | _columns(present)
    only = f"AND {_ACCEPTED.format(**asked)}"
    return Statement(f"{_batch(present, creates=creates, finds=finds, waits=False, only=only)} {_WRITTEN}")


@cache
def tell(*, waits: bool, again: bool = False) -> Statement:
    """Return a statement that tells, for writes to different sagas; ``again`` is for what may have been written.

    Each write comes back by its position. If it isn't written, `written` is NULL, `found` is the version that the saga
    is at, and if that is NULL too, `is_there` tells a saga that somebody has locked from one that is missing.
    """
    everything = frozenset((*_TYPES, *_STEP_TYPES))
    accepted = _ACCEPTED
    if again:
        accepted += f" AND NOT ({{write_id}} IS NOT NULL AND NOT {{changes}} AND {_FULL_UP})"
    asked = _columns(everything)
    answers = f""",
            lease_owner AS holder, lease_expires_at AS held_until, {_RECORDED.format(**asked)} AS recorded,
            {accepted.format(**asked)} AS accepted"""
    return Statement(f"""{_batch(everything, creates=True, finds=True, waits=waits, answers=answers)}
SELECT i.position,
    COALESCE(w.version, CASE WHEN l.recorded THEN i.expected + CAST(i.changes AS integer) END) AS written,
    l.version AS found, l.holder, l.held_until,
    CASE WHEN l.id IS NULL THEN (SELECT TRUE FROM saga_executions WHERE id = i.saga_id) END AS is_there
FROM input i
LEFT JOIN written w ON w.id = i.saga_id
LEFT JOIN locked l ON l.id = i.saga_id
""")


def _batch(  # noqa: PLR0913 - what varies between statements
    present: frozenset[str], *, creates: bool, finds: bool, waits: bool, only: str = "", answers: str = ""
) -> str:
    """Return the part that writes. It locks what fulfils ``only``; with ``answers``, they say what is accepted."""
    asked = _absent(present) | _columns(present)
    logs, updates = "step_name" in present, bool(present & _UPDATING)
    accepted = "i.accepted AND" if answers else ""
    rows = _rows({name: kind for name, kind in _TYPES.items() if name in present}, "i")
    parts = {"input": f"SELECT i.*, {_CHANGES.format(**asked)} AS changes FROM {rows} ORDER BY saga_id"}
    written = []
    if creates:
        patience = "" if waits else f"CROSS JOIN {_PATIENCE}"
        parts["created"] = _CREATE.format(**asked, source=f"FROM input i {patience} WHERE i.name IS NOT NULL")
        written.append("SELECT id, version FROM created")
    if finds:
        # LATERAL makes it one index probe a saga, and the condition on the name, by which the planner expects a single
        # row, makes it another in the update, whatever the statistics say: a cached plan that was made when the table
        # was empty must not turn into a sequential scan per write when it is full.
        parts["locked"] = f"""
    SELECT i.*, e.*, {_UPDATES.format(**asked)} AS updates
    FROM input i
    CROSS JOIN LATERAL (
        SELECT id, version, {_FULL_UP} AS full_up{answers}
        FROM saga_executions WHERE id = i.saga_id {only} FOR NO KEY UPDATE {_wait(waits=waits)}
    ) e
    WHERE i.name IS NULL
"""
        if updates:
            which = f"FROM locked i WHERE e.id = i.id AND {accepted} i.updates"
            parts["updated"] = _UPDATE.format(**asked, source=which)
            written.append("SELECT id, version FROM updated")
        if logs:
            written.append(f"SELECT id, version FROM locked i WHERE {accepted} NOT i.updates")
    parts["written"] = " UNION ALL ".join(written)
    if logs:
        parts["logged"] = _LOG_MANY
    return "WITH " + ", ".join(f"{name} AS ({query})" for name, query in parts.items())


def _absent(present: frozenset[str]) -> dict[str, str]:
    """Return NULLs for what isn't there: the planner drops whatever depends on it."""
    return {name: f"CAST(NULL AS {kind})" for name, kind in _TYPES.items() if name not in present}


def _columns(present: frozenset[str]) -> dict[str, str]:
    return {name: f"i.{name}" for name in (*(present & _TYPES.keys()), "changes")}


def _wait(*, waits: bool) -> str:
    return "" if waits else "SKIP LOCKED"
