"""Create saga-store's tables, and give orders a saga."""

import sqlalchemy as sa
from alembic import op

from saga_store import migrations

revision = "shop_0002"
down_revision = "shop_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    migrations.upgrade(from_="base", to="saga_store_0001")
    op.add_column("orders", sa.Column("saga_id", sa.Uuid(), nullable=True))


def downgrade() -> None:
    op.drop_column("orders", "saga_id")
    migrations.downgrade(from_="saga_store_0001", to="base")
