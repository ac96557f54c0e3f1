"""The two forms that the tables can have, python-cqrs's and ours: what differs, and what is known of the rest."""

from dataclasses import dataclass
from typing import Literal

from saga_store.model import SagaStatus, SagaStepStatus

Form = Literal["cqrs", "saga-store"]

EXECUTIONS = "saga_executions"
LOGS = "saga_logs"
# The order in which they are changed: a log row's foreign key locks the logs first, and then the execution.
TABLES = (LOGS, EXECUTIONS)

# What stands beside a column while it is converted.
SUFFIX = "_converted"


@dataclass(frozen=True, slots=True)
class Column:
    """A column whose type differs between the forms; no value is lost either way."""

    table: str
    name: str
    cqrs: str
    ours: str
    values: tuple[str, ...]
    default: str | None = None

    @property
    def beside(self) -> str:
        return self.name + SUFFIX

    @property
    def check(self) -> str:
        return f"ck_{self.table}_{self.name}"

    @property
    def filled(self) -> str:
        """Name the constraint that says that every row has been converted."""
        return f"{self.check}{SUFFIX}"

    def type_in(self, form: Form) -> str:
        return self.cqrs if form == "cqrs" else self.ours

    def allowed(self, column: str) -> str:
        """Return the condition of our CHECK, on a column of that name."""
        return f"{column} IN ({', '.join(repr(value) for value in self.values)})"


CONVERTED = (
    Column(LOGS, "action", "character varying(50)", "character varying", ("act", "compensate")),
    Column(LOGS, "status", "sagastepstatus", "character varying", tuple(status.value for status in SagaStepStatus)),
    Column(
        EXECUTIONS,
        "status",
        "sagastatus",
        "character varying(32)",
        tuple(status.value for status in SagaStatus),
        default="'PENDING'",
    ),
)
ENUMS = {column.cqrs: column.values for column in CONVERTED if column.name == "status"}

LEASE = {"lease_owner": "character varying(255)", "lease_expires_at": "timestamp with time zone"}
# What older ones lack: version before 4.4.5, recovery_attempts before 4.7.
LATER = {"version": "integer NOT NULL DEFAULT 1", "recovery_attempts": "integer NOT NULL DEFAULT 0"}

_NOW = "timestamp with time zone NOT NULL DEFAULT now()"
_PRIMARY_KEY = "PRIMARY KEY (id)"
_FOREIGN_KEY = "FOREIGN KEY (saga_id) REFERENCES saga_executions(id)"
_UNIQUE = "CREATE UNIQUE INDEX {0}_pkey ON {0} USING btree (id)"

CQRS: dict[str, str] = {
    f"table {EXECUTIONS}": "ordinary",
    f"column {EXECUTIONS}.id": "uuid NOT NULL",
    f"column {EXECUTIONS}.name": "character varying(255) NOT NULL",
    f"column {EXECUTIONS}.status": "sagastatus NOT NULL",
    f"column {EXECUTIONS}.context": "json NOT NULL",
    f"column {EXECUTIONS}.version": "integer NOT NULL",
    f"column {EXECUTIONS}.recovery_attempts": "integer NOT NULL DEFAULT 0",
    f"column {EXECUTIONS}.created_at": _NOW,
    f"column {EXECUTIONS}.updated_at": _NOW,
    f"constraint {EXECUTIONS}.{EXECUTIONS}_pkey": _PRIMARY_KEY,
    f"index {EXECUTIONS}.{EXECUTIONS}_pkey": _UNIQUE.format(EXECUTIONS),
    f"table {LOGS}": "ordinary",
    f"column {LOGS}.id": "bigint NOT NULL IDENTITY",
    f"column {LOGS}.saga_id": "uuid NOT NULL",
    f"column {LOGS}.step_name": "character varying(255) NOT NULL",
    f"column {LOGS}.action": "character varying(50) NOT NULL",
    f"column {LOGS}.status": "sagastepstatus NOT NULL",
    f"column {LOGS}.details": "text",
    f"column {LOGS}.created_at": _NOW,
    f"constraint {LOGS}.{LOGS}_pkey": _PRIMARY_KEY,
    f"constraint {LOGS}.{LOGS}_saga_id_fkey": _FOREIGN_KEY,
    f"index {LOGS}.{LOGS}_pkey": _UNIQUE.format(LOGS),
}
"""What versions 4.7 to 5.3 make, in the words of ``saga_store.schema.fingerprint``."""

_KEY_NAMES: dict[tuple[str, str], dict[Form, str]] = {
    (EXECUTIONS, _PRIMARY_KEY): {"cqrs": f"{EXECUTIONS}_pkey", "saga-store": f"pk_{EXECUTIONS}"},
    (LOGS, _PRIMARY_KEY): {"cqrs": f"{LOGS}_pkey", "saga-store": f"pk_{LOGS}"},
    (LOGS, _FOREIGN_KEY): {"cqrs": f"{LOGS}_saga_id_fkey", "saga-store": f"fk_{LOGS}_saga_id"},
}

SEQUENCE = "saga_logs_id_seq"
FILLFACTOR = "fillfactor = 80"


def columns_of(table: str) -> tuple[Column, ...]:
    return tuple(column for column in CONVERTED if column.table == table)


def unfilled(table: str) -> str:
    """Return the condition for rows that have still to be converted, while columns stand beside others."""
    return f"({' OR '.join(f'{column.beside} IS NULL' for column in columns_of(table))})"


def key_name(definition: str, table: str, form: Form) -> str | None:
    """Name a primary or foreign key as a form has it; None for other constraints."""
    return _KEY_NAMES.get((table, definition), {}).get(form)


def trigger_of(table: str) -> str:
    """Name the trigger, and its function, that fill the columns beside while they are there."""
    return f"{table}{SUFFIX}"


def optional(table: str, form: Form) -> dict[str, set[str]]:
    """Return what may be there, and how (no matter how: an empty set): in some versions, or while work is under way."""
    other: Form = "cqrs" if form == "saga-store" else "saga-store"
    known: dict[str, set[str]] = {f"trigger {table}.{trigger_of(table)}": set()}
    for column in columns_of(table):
        known[f"column {table}.{column.beside}"] = {column.type_in(other)}
        known[f"constraint {table}.{column.filled}"] = set()
        if form == "cqrs":
            known[f"constraint {table}.{column.check}"] = set()
    if table == EXECUTIONS and form == "cqrs":
        known |= {f"column {table}.{name}": {definition} for name, definition in (LATER | LEASE).items()}
        known[f"column {table}.version"].add(CQRS[f"column {table}.version"])
    return known
