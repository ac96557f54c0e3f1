"""Bring saga-store's tables to what its next release needs."""

from saga_store import migrations

revision = "shop_0003"
down_revision = "shop_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    migrations.upgrade(from_="saga_store_0001", to="saga_store_0003")


def downgrade() -> None:
    migrations.downgrade(from_="saga_store_0003", to="saga_store_0001")
