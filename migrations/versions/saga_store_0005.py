"""Index what persons did to sagas, apart from what sagas did."""

from collections.abc import Sequence

from saga_store.migrations import online

revision: str = "saga_store_0005"
down_revision: str | None = "saga_store_0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


@online.in_one_schema
def upgrade() -> None:
    # Interventions are rare and histories are long: a list of them would read every entry of the time in question.
    # Whoever writes other entries pays for it by one look at the name.
    online.create_index("ix_saga_logs_interventions", "saga_logs", "(id) WHERE starts_with(step_name, 'saga_store.')")


@online.in_one_schema
def downgrade() -> None:
    online.drop_index("ix_saga_logs_interventions")
