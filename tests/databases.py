"""Databases for tests: the kit's own, one for each test."""

from pathlib import Path

from saga_store.testing.postgres.databases import Database, Databases

__all__ = ["ALEMBIC_INI", "Database", "Databases"]

ALEMBIC_INI = Path(__file__).parent.parent / "alembic.ini"
