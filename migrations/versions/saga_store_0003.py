"""Add saga_executions.recent_writes, by which a write whose answer got lost is recognised.

A column that may be NULL and has no default changes the catalog only, whatever the size of the table; but it needs
the table for itself for that moment.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from saga_store.migrations import online

revision: str = "saga_store_0003"
down_revision: str | None = "saga_store_0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


@online.in_one_schema
def upgrade() -> None:
    op.add_column(
        "saga_executions",
        sa.Column(
            "recent_writes",
            sa.ARRAY(sa.BigInteger()),
            nullable=True,
            comment="Ids of the last writes that expected a version, so that one whose answer got lost is recognised",
        ),
    )


@online.in_one_schema
def downgrade() -> None:
    op.drop_column("saga_executions", "recent_writes")
