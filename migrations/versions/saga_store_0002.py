"""Check that a lease has both its halves, and index failed sagas by age."""

from collections.abc import Sequence

from saga_store.migrations import online

revision: str = "saga_store_0002"
down_revision: str | None = "saga_store_0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


@online.in_one_schema
def upgrade() -> None:
    # Half a lease is none: nobody can be told from it, or nobody knows until when.
    online.backfill(
        "saga_executions",
        assign="lease_owner = NULL, lease_expires_at = NULL",
        where="(lease_owner IS NULL) <> (lease_expires_at IS NULL)",
    )
    online.add_check(
        "ck_saga_executions_lease", "saga_executions", "(lease_owner IS NULL) = (lease_expires_at IS NULL)"
    )
    online.create_index("ix_saga_executions_failed", "saga_executions", "(created_at) WHERE status = 'FAILED'")


@online.in_one_schema
def downgrade() -> None:
    online.drop_check("ck_saga_executions_lease", "saga_executions")
    online.drop_index("ix_saga_executions_failed")
