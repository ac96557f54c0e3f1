"""The public face: what it loads, what it exports, how it is typed, and which way imports run."""

import ast
import copy
import pickle
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

import saga_store
from saga_store import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "saga_store"
SAGA_ID = UUID("00000000-0000-0000-0000-000000000001")

ERRORS = [
    errors.SagaNotFoundError(SAGA_ID),
    errors.SagaArchivedError(SAGA_ID, "s3://archive/2024/1.jsonl.gz", datetime(2024, 1, 1, tzinfo=UTC)),
    errors.SagaArchivedError(SAGA_ID, None, datetime(2024, 1, 1, tzinfo=UTC)),
    errors.SagaAlreadyExistsError(SAGA_ID),
    errors.SagaAlreadyExistsError(SAGA_ID, "refund"),
    errors.SagaConcurrencyError(SAGA_ID, 1, 2),
    errors.SagaLeasedError(SAGA_ID, "worker-1", datetime(2024, 1, 1, tzinfo=UTC)),
    errors.SagaUnreadableError(SAGA_ID, "a time is infinity"),
    errors.InvalidSagaDataError("name", "must not be empty"),
    errors.ArchiverBusyError("pid 4711"),
    errors.StorageUnavailableError("the server is down", "57P03"),
    errors.SagaTimeoutError(SAGA_ID, timedelta(seconds=5), "RUNNING"),
    errors.UnknownOutcomeError(SAGA_ID),
    errors.UnknownOutcomeError(None),
    errors.ShardingError("storage 0 is shard 1 of 2"),
    errors.SchemaError(None, "saga_store_0001"),
    errors.SchemaError(None, "saga_store_0001", schema="shop"),
]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT)


class TestImport:
    def test_the_facade_loads_no_database_library_and_no_test_library(self) -> None:
        """`import saga_store` is pure Python: neither SQLAlchemy nor a driver, Alembic or pytest."""
        trace = run_python("-X", "importtime", "-c", "import saga_store").stderr
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in trace.splitlines()}

        assert "saga_store" in loaded
        assert not loaded & {
            "sqlalchemy",
            "alembic",
            "asyncpg",
            "psycopg",
            "pytest",
            "hypothesis",
            "cqrs",
            "opentelemetry",
            "prometheus_client",
        }

    def test_the_postgresql_storage_loads_no_driver_and_no_test_library(self) -> None:
        """Which driver is loaded is decided by the URL of the caller's engine."""
        trace = run_python("-X", "importtime", "-c", "import saga_store.sqlalchemy").stderr
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in trace.splitlines()}

        assert "sqlalchemy" in loaded
        assert not loaded & {
            "alembic",
            "asyncpg",
            "psycopg",
            "pytest",
            "hypothesis",
            "cqrs",
            "opentelemetry",
            "prometheus_client",
        }

    def test_all_is_sorted_and_complete(self) -> None:
        # pytest rewrites what comes with a plugin, and leaves names there that no program could write.
        public = {name for name in vars(saga_store) if name.isidentifier() and not name.startswith("_")}
        modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/*.py")}
        modules.add("migrations")  # whose folder is elsewhere in the checkout

        assert saga_store.__all__ == sorted(saga_store.__all__)
        assert public - modules == set(saga_store.__all__)


class TestErrors:
    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_an_error_survives_pickling_and_copying(self, error: errors.SagaStoreError) -> None:
        """A process pool or a task queue hands errors on: type, message and facts stay."""
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own bytes
            assert type(twin) is type(error)
            assert str(twin) == str(error)
            assert vars(twin) == vars(error)

    def test_every_error_has_the_one_base(self) -> None:
        kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]

        assert all(issubclass(kind, errors.SagaStoreError) for kind in kinds)
        assert issubclass(errors.InvalidSagaDataError, ValueError)
        assert {type(error) for error in ERRORS} == set(kinds) - {errors.SagaStoreError}


class TestTyping:
    def test_mypy_strict_infers_every_type_of_the_public_face(self, tmp_path: Path) -> None:
        """A program that uses the whole public face passes mypy --strict, and no result is Any."""
        program = tmp_path / "program.py"
        program.write_text((ROOT / "tests" / "typed_program.py").read_text())
        arguments = ["-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path), str(program)]
        result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
        revealed = re.findall(r'Revealed type is "(.*)"', result.stdout)

        assert result.returncode == 0, result.stdout + result.stderr
        assert [re.sub(r"builtins\.|datetime\.|uuid\.|saga_store\.model\.", "", found) for found in revealed] == [
            "SagaStart",
            "int | None",
            "SagaExecution",
            "int",
            "tuple[SagaStatus, dict[str, Any]]",
            "list[SagaLogEntry]",
            "SagaExecution",
            "list[SagaExecution]",
            "list[SagaExecution]",
            "list[SagaLogEntry]",
            "sqlalchemy.ext.asyncio.session.AsyncSession",
            "list[SagaLogEntry]",
            "Literal['act'] | Literal['compensate']",
        ]


# What each part may import of the package; the rest it has to do without.
ALLOWED = {
    "model": set(),
    "errors": set(),
    "grants": set(),
    "remedies": set(),
    "validation": {"remedies", "model", "errors"},
    "inspection": {"remedies", "validation", "model", "errors"},
    "telling": {"inspection", "model"},
    "retention_model": {"model"},
    "interface": {"retention_model", "inspection", "model", "errors"},
    "run_interface": {"interface", "model"},
    "waiting": set(),
    "write": {"remedies", "inspection", "validation", "model", "errors"},
    "write_ids": {"write"},
    "cancellation": set(),
    "joining": set(),
    "run": {"cancellation", "joining", "run_interface", "write", "write_ids", "validation", "model", "errors"},
    "retention_storage": {"retention_model", "inspection", "interface", "validation", "model", "errors"},
    "storage": {
        "retention_storage",
        "retention_model",
        "joining",
        "inspection",
        "interface",
        "run",
        "run_interface",
        "shard_records",
        "waiting",
        "write",
        "validation",
        "model",
        "errors",
    },
    "shard_records": {"errors"},
    "shard_merging": {"inspection", "errors"},
    "shard_set": {"remedies", "storage", "shard_records", "errors"},
    "shard_retention": {
        "shard_set",
        "shard_records",
        "retention_storage",
        "retention_model",
        "inspection",
        "errors",
    },
    "sharding": {
        "shard_set",
        "shard_records",
        "shard_merging",
        "shard_retention",
        "joining",
        "inspection",
        "storage",
        "run",
        "write",
        "validation",
        "model",
        "errors",
    },
    "memory_views": {"retention_model", "inspection", "validation", "model"},
    "memory_database": {
        "remedies",
        "shard_records",
        "memory_views",
        "retention_storage",
        "retention_model",
        "joining",
        "inspection",
        "write",
        "write_ids",
        "validation",
        "model",
        "errors",
    },
    "memory_retention": {
        "memory_database",
        "retention_storage",
        "retention_model",
        "inspection",
        "storage",
        "validation",
        "model",
        "errors",
    },
    "memory": {
        "remedies",
        "shard_records",
        "memory_database",
        "memory_retention",
        "joining",
        "inspection",
        "storage",
        "write",
        "write_ids",
        "validation",
        "interface",
        "model",
        "errors",
    },
    "sqlalchemy": {
        "remedies",
        "waiting",
        "shard_records",
        "sqlalchemy",
        "retention_storage",
        "retention_model",
        "joining",
        "inspection",
        "storage",
        "telemetry",
        "write",
        "write_ids",
        "validation",
        "interface",
        "model",
        "errors",
    },
    "recovery": {"remedies", "storage", "cancellation", "run", "write", "validation", "model", "errors"},
    "cqrs": {"cqrs", "interface", "inspection", "storage", "run", "write", "validation", "model", "errors"},
    "schema": {"schema", "sqlalchemy", "grants", "errors"},
    "adoption": {"adoption", "schema", "migrations", "sqlalchemy", "model"},
    # The command is on top of all else, and nothing imports it.
    "retention": {
        "retention",
        "retention_model",
        "inspection",
        "interface",
        "sharding",
        "sqlalchemy",
        "validation",
        "model",
        "errors",
    },
    "web": {"web", "telemetry", "telling", "retention", "inspection", "interface", "sharding", "model", "errors"},
    "telemetry": {"telemetry", "inspection", "interface", "retention_model", "validation", "errors"},
    "cli": {
        "cli",
        "shard_records",
        "sharding",
        "storage",
        "adoption",
        "schema",
        "grants",
        "inspection",
        "interface",
        "telling",
        "sqlalchemy",
        "validation",
        "retention",
        "retention_model",
        "telemetry",
        "web",
        "model",
        "errors",
    },
    "__main__": {"cli"},
    # The kit is a user of the public face; the twin is what it compares other storages with.
    "testing": {
        "testing",
        "schema",
        "memory",
        "retention_model",
        "inspection",
        "interface",
        "storage",
        "run",
        "run_interface",
        "validation",
        "model",
        "errors",
    },
    "__init__": {"memory", "storage", "run", "run_interface", "interface", "model", "errors"},
}


def imports(path: Path) -> set[str]:
    """Return the modules of the package that the file imports, by the name below `saga_store`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if node.module == "saga_store" else node.module for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    parts = [name.split(".") for name in found]
    return {part[1] for part in parts if part[0] == "saga_store" and len(part) > 1}


class TestArchitecture:
    @pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
    def test_imports_run_one_way(self, path: Path) -> None:
        """Engines import the shared half, never each other; nothing imports the contract kit."""
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        allowed = ALLOWED[part]

        assert imports(path) <= allowed

    @pytest.mark.parametrize(
        "path", sorted((ROOT / "migrations" / "versions").glob("saga_store_*.py")), ids=lambda path: path.stem
    )
    def test_a_released_revision_depends_on_no_code_of_ours(self, path: Path) -> None:
        """What a revision does must not change when the package does; the helper for full tables says how, not what."""
        assert imports(path) <= {"migrations"}
        used = re.findall(r"^.*import.*saga_store\..*$|^from saga_store\..*$", path.read_text(), re.MULTILINE)
        assert used in ([], ["from saga_store.migrations import online"])
