"""Add saga_shard, in which a database records which shard it is, of how many, by which hash.

It is empty unless the database is one: a storage that isn't made of shards never looks at it.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from saga_store.migrations import online

revision: str = "saga_store_0008"
down_revision: str | None = "saga_store_0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


@online.in_one_schema
def upgrade() -> None:
    op.create_table(
        "saga_shard",
        sa.Column(
            "only_row", sa.Boolean(), server_default=sa.text("true"), nullable=False, comment="There is one row at most"
        ),
        sa.Column("cluster", sa.Uuid(), nullable=False, comment="Which shards belong together"),
        sa.Column("shard", sa.Integer(), nullable=False, comment="Which of them this database is, from 0 on"),
        sa.Column("shards", sa.Integer(), nullable=False, comment="How many they are"),
        sa.Column("hash", sa.String(32), nullable=False, comment="How the ids of sagas are spread over them"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was recorded, by the database's clock",
        ),
        sa.PrimaryKeyConstraint("only_row", name=op.f("pk_saga_shard")),
        sa.CheckConstraint("only_row", name=op.f("ck_saga_shard_only_row")),
        sa.CheckConstraint("shard >= 0 AND shard < shards", name=op.f("ck_saga_shard_shard")),
        comment="Which shard this database is; no row: none (saga-store)",
    )


@online.in_one_schema
def downgrade() -> None:
    op.drop_table("saga_shard")
