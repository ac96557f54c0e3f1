"""The tables as mapped classes, for ad-hoc queries; the migrations own them, and a test keeps both alike."""

from datetime import datetime
from typing import Any, ClassVar
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
    UniqueConstraint,
    Uuid,
    event,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REVISION = "saga_store_0008"
"""The migration that this release needs."""

_NOW = text("now()")
_ZERO = text("0")
_UNFINISHED = text("status IN ('PENDING', 'RUNNING', 'COMPENSATING')")


class Base(DeclarativeBase):
    """Base of the mapped classes; ``Base.metadata`` holds the tables."""

    metadata: ClassVar[MetaData] = MetaData(naming_convention={"pk": "pk_%(table_name)s"})


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
    archived_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True),
        comment="This is a stub, and its record is in the archive of that time; NULL: the saga is here",
    )
    retain_until: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True),
        comment="It is held: kept until then, whatever a policy says; infinity: until it is released",
    )
    __table_args__: Any = (
        CheckConstraint(
            "status IN ('PENDING', 'RUNNING', 'COMPENSATING', 'COMPLETED', 'FAILED')",
            name="ck_saga_executions_status",
        ),
        # Half a lease is none.
        CheckConstraint("(lease_owner IS NULL) = (lease_expires_at IS NULL)", name="ck_saga_executions_lease"),
        # Nothing is written to a stub, also by those who don't know of any.
        CheckConstraint(
            "archived_at IS NULL OR (status IN ('COMPLETED', 'FAILED') AND lease_owner IS NULL "
            "AND updated_at <= archived_at AND CAST(context AS text) = '{}')",
            name="ck_saga_executions_stub",
        ),
        # Sagas by age: reports, and deleting the oldest.
        Index("ix_saga_executions_created_at", "created_at"),
        # What recovery scans: the living sagas only, by a column that never changes.
        Index("ix_saga_executions_recovery", "created_at", postgresql_where=_UNFINISHED),
        # Which sagas failed lately: an operator's question.
        Index("ix_saga_executions_failed", "created_at", postgresql_where=text("status = 'FAILED'")),
        {"comment": "Sagas: one row each, with its present state (saga-store)"},
    )


# SQLAlchemy 2.0 has no option for it.
for _options in (
    "ALTER TABLE saga_executions SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02)",
    "ALTER TABLE saga_logs SET (autovacuum_vacuum_scale_factor = 0.02)",
):
    event.listen(Base.metadata, "after_create", DDL(_options))  # type: ignore[no-untyped-call] # SQLAlchemy's


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
    __table_args__: Any = (
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


class SagaArchiveModel(Base):
    """A row of ``saga_archives``."""

    __tablename__ = "saga_archives"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True, comment="The archiver's id for the archive")
    uri: Mapped[str | None] = mapped_column(Text, comment="Where its object is; NULL: sagas were removed without one")
    state: Mapped[str] = mapped_column(
        String(32), comment="WRITING, VERIFIED: its sagas may become stubs, REMOVED: they have; FAILED"
    )
    archived_by: Mapped[str] = mapped_column(String(255), comment="Who archived")
    begun_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=_NOW, comment="When it was registered, by the database's clock"
    )
    archived_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True),
        comment="When it was verified; its stubs have the same time, and those of no other archive",
    )
    removed_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True), comment="When the last of its sagas became a stub"
    )
    sha256: Mapped[str | None] = mapped_column(String(64), comment="Of its object")
    sagas: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO, comment="How many sagas it holds")
    entries: Mapped[int] = mapped_column(
        BigInteger, server_default=_ZERO, comment="How many entries they have together"
    )
    bytes: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO, comment="How big its object is")
    removed: Mapped[int] = mapped_column(
        BigInteger, server_default=_ZERO, comment="How many of its sagas have become stubs by it"
    )
    watermark: Mapped[str | None] = mapped_column(Text, comment="Where its walk ended; NULL: at the end")
    error: Mapped[str | None] = mapped_column(Text, comment="Why it failed")
    __table_args__: Any = (
        # A stub finds its archive by this.
        UniqueConstraint("archived_at", name="uq_saga_archives_archived_at"),
        CheckConstraint("state IN ('WRITING', 'VERIFIED', 'REMOVED', 'FAILED')", name="ck_saga_archives_state"),
        {"comment": "The ledger of archives: what was let go, where its record is, and who let it go (saga-store)"},
    )


class SagaShardModel(Base):
    """The row of ``saga_shard``, if the database is a shard."""

    __tablename__ = "saga_shard"

    only_row: Mapped[bool] = mapped_column(
        primary_key=True, server_default=text("true"), comment="There is one row at most"
    )
    cluster: Mapped[UUID] = mapped_column(Uuid, comment="Which shards belong together")
    shard: Mapped[int] = mapped_column(comment="Which of them this database is, from 0 on")
    shards: Mapped[int] = mapped_column(comment="How many they are")
    hash: Mapped[str] = mapped_column(String(32), comment="How the ids of sagas are spread over them")
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=_NOW, comment="When it was recorded, by the database's clock"
    )
    __table_args__: Any = (
        CheckConstraint("only_row", name="ck_saga_shard_only_row"),
        CheckConstraint("shard >= 0 AND shard < shards", name="ck_saga_shard_shard"),
        {"comment": "Which shard this database is; no row: none (saga-store)"},
    )
