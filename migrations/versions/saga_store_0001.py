"""Create saga_executions and saga_logs.

Names are in op.f, or else a naming convention of the application whose Alembic runs this would change them.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from saga_store.migrations import online

revision: str = "saga_store_0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = ("saga_store",)
depends_on: str | Sequence[str] | None = None


@online.in_one_schema
def upgrade() -> None:
    op.create_table(
        "saga_executions",
        sa.Column("id", sa.Uuid(), nullable=False, comment="The caller's id for the saga"),
        sa.Column("name", sa.String(255), nullable=False, comment="What kind of saga it is"),
        sa.Column(
            "status",
            sa.String(32),
            server_default=sa.text("'PENDING'"),
            nullable=False,
            comment="PENDING, RUNNING, COMPENSATING: unfinished; COMPLETED, FAILED: finished",
        ),
        sa.Column(
            "context",
            sa.JSON(),
            nullable=False,
            comment="What the saga carries from step to step; json, not jsonb, because it must come back unchanged",
        ),
        sa.Column(
            "version",
            sa.Integer(),
            server_default=sa.text("1"),
            nullable=False,
            comment="1 at creation, +1 for every change of this row; writers that expect another one are refused",
        ),
        sa.Column(
            "recovery_attempts",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="How often recovery has been tried",
        ),
        sa.Column("lease_owner", sa.String(255), nullable=True, comment="Who works on it now; NULL: nobody"),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True, comment="Until when the lease holds"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was created, by the database's clock",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When this row last changed; deliberately not indexed, so that updates stay HOT",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_saga_executions")),
        sa.CheckConstraint(
            "status IN ('PENDING', 'RUNNING', 'COMPENSATING', 'COMPLETED', 'FAILED')",
            name=op.f("ck_saga_executions_status"),
        ),
        comment="Sagas: one row each, with its present state (saga-store)",
    )
    # Room on each page for the next version of its rows, so that updates stay HOT.
    op.execute("ALTER TABLE saga_executions SET (fillfactor = 80)")
    op.create_index(op.f("ix_saga_executions_created_at"), "saga_executions", ["created_at"])
    op.create_index(
        op.f("ix_saga_executions_recovery"),
        "saga_executions",
        ["created_at"],
        postgresql_where=sa.text("status IN ('PENDING', 'RUNNING', 'COMPENSATING')"),
    )
    op.create_table(
        "saga_logs",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False, comment="The order of the history"),
        sa.Column("saga_id", sa.Uuid(), nullable=False, comment="Whose history this is"),
        sa.Column("step_name", sa.String(255), nullable=False, comment="Which step"),
        sa.Column("action", sa.String(), nullable=False, comment="act: do the step; compensate: undo it"),
        sa.Column(
            "status",
            sa.String(),
            nullable=False,
            comment="STARTED, then COMPLETED, FAILED or COMPENSATED; STARTED alone: in doubt",
        ),
        sa.Column("details", sa.Text(), nullable=True, comment="For a person, such as the text of an error"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it happened, by the database's clock; may tie, so order by id",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_saga_logs")),
        sa.ForeignKeyConstraint(["saga_id"], ["saga_executions.id"], name=op.f("fk_saga_logs_saga_id")),
        sa.CheckConstraint("action IN ('act', 'compensate')", name=op.f("ck_saga_logs_action")),
        sa.CheckConstraint(
            "status IN ('STARTED', 'COMPLETED', 'FAILED', 'COMPENSATED')", name=op.f("ck_saga_logs_status")
        ),
        comment="The history of every saga; rows are only ever added (saga-store)",
    )
    op.create_index(op.f("ix_saga_logs_saga_id"), "saga_logs", ["saga_id", "id"], unique=True)
    op.create_index(op.f("ix_saga_logs_created_at"), "saga_logs", ["created_at"])


@online.in_one_schema
def downgrade() -> None:
    op.drop_table("saga_logs")
    op.drop_table("saga_executions")
