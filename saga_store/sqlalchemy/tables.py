"""The tables as mapped classes, for ad-hoc queries; the migrations own them, and a test keeps both alike."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    DDL,
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    Uuid,
    event,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REVISION = "saga_store_0005"
"""The migration that this release needs."""

_NOW = text("now()")
_UNFINISHED = text("status IN ('PENDING', 'RUNNING', 'COMPENSATING')")


class Base(DeclarativeBase):
    """Base of the mapped classes; ``Base.metadata`` holds both tables."""

    metadata = MetaData(naming_convention={"pk": "pk_%(table_name)s"})


class SagaExecutionModel(Base):
    """A row of ``saga_executions``."""

    __tablename__ = "saga_executions"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True, comment="The caller's id for the saga")
    name: Mapped[str] = mapped_column(String(255), comment="What kind of saga it is")
    status: Mapped[str] = mapped_column(
        String(32),
        server_default=text("'PENDING'"),
        comment="PENDING, RUNNING, COMPENSATING: unfinished; COMPLETED, FAILED: finished",
    )
    context: Mapped[dict[str, Any]] = mapped_column(
        JSON, comment="What the saga carries from step to step; json, not jsonb, because it must come back unchanged"
    )
    version: Mapped[int] = mapped_column(
        server_default=text("1"),
        comment="1 at creation, +1 for every change of this row; writers that expect another one are refused",
    )
    recovery_attempts: Mapped[int] = mapped_column(
        server_default=text("0"), comment="How often recovery has been tried"
    )
    lease_owner: Mapped[str | None] = mapped_column(String(255), comment="Who works on it now; NULL: nobody")
    lease_expires_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True), comment="Until when the lease holds"
    )
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=_NOW, comment="When it was created, by the database's clock"
    )
    updated_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True),
        server_default=_NOW,
        comment="When this row last changed; deliberately not indexed, so that updates stay HOT",
    )
    recent_writes: Mapped[list[int] | None] = mapped_column(
        ARRAY(BigInteger),
        comment="Ids of the last writes that expected a version, so that one whose answer got lost is recognised",
    )
    __table_args__ = (
        CheckConstraint(
            "status IN ('PENDING', 'RUNNING', 'COMPENSATING', 'COMPLETED', 'FAILED')",
            name="ck_saga_executions_status",
        ),
        # Half a lease is none.
        CheckConstraint("(lease_owner IS NULL) = (lease_expires_at IS NULL)", name="ck_saga_executions_lease"),
        # Sagas by age: reports, and deleting the oldest.
        Index("ix_saga_executions_created_at", "created_at"),
        # What recovery scans: the living sagas only, by a column that never changes.
        Index("ix_saga_executions_recovery", "created_at", postgresql_where=_UNFINISHED),
        # Which sagas failed lately: an operator's question.
        Index("ix_saga_executions_failed", "created_at", postgresql_where=text("status = 'FAILED'")),
        {"comment": "Sagas: one row each, with its present state (saga-store)"},
    )


# SQLAlchemy 2.0 has no option for it.
_FILLFACTOR = DDL("ALTER TABLE saga_executions SET (fillfactor = 80)")  # type: ignore[no-untyped-call] # SQLAlchemy's
event.listen(Base.metadata, "after_create", _FILLFACTOR)


class SagaLogModel(Base):
    """A row of ``saga_logs``."""

    __tablename__ = "saga_logs"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, comment="The order of the history")
    saga_id: Mapped[UUID] = mapped_column(
        Uuid, ForeignKey("saga_executions.id", name="fk_saga_logs_saga_id"), comment="Whose history this is"
    )
    step_name: Mapped[str] = mapped_column(String(255), comment="Which step")
    action: Mapped[str] = mapped_column(String, comment="act: do the step; compensate: undo it")
    status: Mapped[str] = mapped_column(
        String, comment="STARTED, then COMPLETED, FAILED or COMPENSATED; STARTED alone: in doubt"
    )
    details: Mapped[str | None] = mapped_column(Text, comment="For a person, such as the text of an error")
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True),
        server_default=_NOW,
        comment="When it happened, by the database's clock; may tie, so order by id",
    )
    __table_args__ = (
        CheckConstraint("action IN ('act', 'compensate')", name="ck_saga_logs_action"),
        CheckConstraint("status IN ('STARTED', 'COMPLETED', 'FAILED', 'COMPENSATED')", name="ck_saga_logs_status"),
        # A saga's history, in order.
        Index("ix_saga_logs_saga_id", "saga_id", "id", unique=True),
        # What happened when: reports, and deleting the oldest.
        Index("ix_saga_logs_created_at", "created_at"),
        # What persons did: a few entries among many.
        Index("ix_saga_logs_interventions", "id", postgresql_where=text("starts_with(step_name, 'saga_store.')")),
        {"comment": "The history of every saga; rows are only ever added (saga-store)"},
    )
