"""Give orders a saga."""

import sqlalchemy as sa
from alembic import op

revision = "shop_0002"
down_revision = "shop_0001"
branch_labels = None
# Whoever upgrades the application alone gets what it needs of saga-store.
depends_on = "saga_store_0001"


def upgrade() -> None:
    op.add_column("orders", sa.Column("saga_id", sa.Uuid(), nullable=True))


def downgrade() -> None:
    op.drop_column("orders", "saga_id")
