"""The rows of the table: who takes part, on which schema, and what counts as one call."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from benchmarks import handwritten, ours, peers
from benchmarks.workload import RunSaga

CONNECTIONS = 20
"""How many each may use. Of 5 to 64, no peer got faster with more, and python-cqrs slower with fewer."""

Schema: TypeAlias = Literal["saga_store", "cqrs", "dbos"]
Open: TypeAlias = Callable[[str, int], AbstractAsyncContextManager[RunSaga]]


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run the saga.

    Attributes:
        key: Its name in the JSON file and on the command line.
        title: Its name in the tables.
        schema: Whose tables it needs.
        call: What the latency is that of.
        open: Given a URL and a number of connections, makes the function that runs one saga.
        needs: A package without which the row is skipped.
    """

    key: str
    title: str
    schema: Schema
    call: str
    open: Open
    needs: str | None = None


CALL, CHECKPOINT, ADVANCE, STEP = "call", "checkpoint", "advance of the engine", "step"

ROWS = (
    Row("cqrs", "python-cqrs: its storage", "cqrs", CALL, peers.cqrs_storage),
    Row("cqrs-engine", "python-cqrs: its engine, its storage", "cqrs", ADVANCE, peers.cqrs_engine),
    Row("dbos", "DBOS: a workflow of 3 steps", "dbos", STEP, peers.dbos_workflow, needs="dbos"),
    Row("asyncpg", "hand-written: a statement per call", "saga_store", CALL, handwritten.statements),
    Row("methods", "saga-store: six methods", "saga_store", CALL, ours.methods),
    Row("checkpoints", "saga-store: checkpoints", "saga_store", CHECKPOINT, ours.checkpoints),
    Row("runs", "saga-store: runs", "saga_store", CHECKPOINT, ours.runs),
    Row("engine", "saga-store: python-cqrs's engine", "saga_store", ADVANCE, ours.cqrs_engine),
    Row("psycopg", "saga-store: six methods, psycopg", "saga_store", CALL, partial(ours.methods, driver="psycopg")),
    Row(
        "single",
        "saga-store: six methods, no group commit",
        "saga_store",
        CALL,
        partial(ours.methods, group_commit=False),
    ),
    Row("routed", "saga-store: six methods, routed by get_bind", "saga_store", CALL, ours.routed),
    Row("translated", "saga-store: six methods, schema_translate_map", "saga_store", CALL, ours.translated),
    Row("grouped", "saga-store: six methods, group_by", "saga_store", CALL, ours.grouped),
    Row("sharded", "saga-store: six methods, over one shard", "saga_store", CALL, ours.sharded),
    Row("floor", "floor: hand-written batches of calls", "saga_store", CALL, handwritten.batched_calls),
    Row(
        "floor-checkpoints",
        "floor: hand-written batches of checkpoints",
        "saga_store",
        CHECKPOINT,
        handwritten.batched_checkpoints,
    ),
)
BASE = "cqrs"
"""The row that the others are compared with."""
DIRECT, ROUTED = "methods", ("routed", "translated", "grouped", "sharded")
"""What is written straight to an engine, and what somebody has to say of where to."""
