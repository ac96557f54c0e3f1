"""What was stored: the tables, and an audit of each version that a saga's row ever had."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psycopg

# Written by a trigger, so in the transaction of the write itself, which both storages and their users do without.
AUDIT = """
CREATE TABLE crash_audit (
    position bigserial PRIMARY KEY, saga_id uuid NOT NULL, version integer NOT NULL,
    status text NOT NULL, token text, transaction bigint NOT NULL
);
CREATE FUNCTION crash_audit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO crash_audit (saga_id, version, status, token, transaction)
    VALUES (
        NEW.id, NEW.version, NEW.status, NEW.context ->> 'token',
        pg_current_xact_id()::text::bigint % (1::bigint << 32) -- as xmin shows it
    );
    RETURN NULL;
END $$;
CREATE TRIGGER crash_audit_insert AFTER INSERT ON saga_executions FOR EACH ROW EXECUTE FUNCTION crash_audit();
CREATE TRIGGER crash_audit_update AFTER UPDATE ON saga_executions FOR EACH ROW
    WHEN (OLD.version <> NEW.version) EXECUTE FUNCTION crash_audit();
CREATE TABLE crash_archived (saga_id uuid PRIMARY KEY);
CREATE FUNCTION crash_archived() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO crash_archived VALUES (NEW.id) ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;
CREATE TRIGGER crash_archived AFTER UPDATE ON saga_executions FOR EACH ROW
    WHEN (NEW.archived_at IS NOT NULL) EXECUTE FUNCTION crash_archived();
"""

STATES = "SELECT saga_id::text, version, status, token, transaction FROM crash_audit ORDER BY position"
# A saga that was ever archived has had its rows written once more, by a restore.
LOGS = """
SELECT l.saga_id::text, l.details, CASE WHEN a.saga_id IS NULL THEN l.xmin::text::bigint END
FROM saga_logs l LEFT JOIN crash_archived a USING (saga_id) ORDER BY l.id
"""
SAGAS = "SELECT id::text, version, status, context ->> 'token' FROM saga_executions"


@dataclass(frozen=True, slots=True)
class State:
    """A saga's row at one version; ``token`` is the one in its context."""

    version: int
    status: str
    token: str | None
    transaction: int


@dataclass(frozen=True, slots=True)
class LogRow:
    """A row of the history: the ``index``-th (from 0) of the write with this token; its transaction, if it is known."""

    token: str
    index: int
    transaction: int | None


@dataclass(frozen=True, slots=True)
class Stored:
    """By saga: its states in the order of their commits, its history in order, and its row's version, status, token."""

    states: Mapping[str, Sequence[State]]
    logs: Mapping[str, Sequence[LogRow]]
    sagas: Mapping[str, tuple[int, str, str | None]]


def details(token: str, index: int, padding: int = 0) -> str:
    """The details of a log entry that carries a token, made longer to fill the disk faster."""
    return f"{token} {index} {'.' * padding}"


def read(urls: Sequence[str]) -> Stored:
    """Read all, in one snapshot of each database; what a saga has in two of them shows as written twice."""
    states, logs = defaultdict(list), defaultdict(list)
    sagas: dict[str, tuple[int, str, str | None]] = {}
    for url in urls:
        with psycopg.connect(url, options="-c statement_timeout=0") as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            for saga, *state in connection.execute(STATES):
                states[saga].append(State(*state))
            for saga, text, transaction in connection.execute(LOGS):
                token, index, _ = text.split(" ", 2)
                logs[saga].append(LogRow(token, int(index), transaction))
            sagas |= {saga: (version, status, token) for saga, version, status, token in connection.execute(SAGAS)}
    return Stored(states, logs, sagas)
