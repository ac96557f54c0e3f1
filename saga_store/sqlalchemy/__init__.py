"""The storage in PostgreSQL, over SQLAlchemy with asyncpg or psycopg."""

from saga_store.sqlalchemy.repository import SqlAlchemySagaStorage
from saga_store.sqlalchemy.tables import Base, SagaArchiveModel, SagaExecutionModel, SagaLogModel

__all__ = ["Base", "SagaArchiveModel", "SagaExecutionModel", "SagaLogModel", "SqlAlchemySagaStorage"]
