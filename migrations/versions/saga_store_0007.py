"""Check that nothing is written to a stub, and vacuum both tables when 2 % of their rows are dead.

The check holds for those, too, who don't know stubs: whoever raises a version sets updated_at to a later time than that
of the archive.
"""

from collections.abc import Sequence

from alembic import op
from saga_store.migrations import online

revision: str = "saga_store_0007"
down_revision: str | None = "saga_store_0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_STUB = (
    "archived_at IS NULL OR (status IN ('COMPLETED', 'FAILED') AND lease_owner IS NULL "
    "AND updated_at <= archived_at AND CAST(context AS text) = '{}')"
)
_TABLES = ("saga_executions", "saga_logs")
# Of 3,000,000 sagas the usual 20 % are 600,000, whose room isn't used again before. Whoever has set another share has
# had reasons.
_VACUUM = """\
DO $vacuum$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_class c CROSS JOIN LATERAL unnest(c.reloptions) AS given
        WHERE c.oid = CAST(quote_ident(current_schema()) || '.{table}' AS regclass)
            AND starts_with(given, 'autovacuum_vacuum_scale_factor=')
    ) THEN
        EXECUTE 'ALTER TABLE ' || quote_ident(current_schema())
            || '.{table} SET (autovacuum_vacuum_scale_factor = 0.02)';
    END IF;
END
$vacuum$"""
_USUAL = """\
DO $vacuum$
BEGIN
    IF EXISTS (
        SELECT FROM pg_class c
        WHERE c.oid = CAST(quote_ident(current_schema()) || '.{table}' AS regclass)
            AND 'autovacuum_vacuum_scale_factor=0.02' = ANY (c.reloptions)
    ) THEN
        EXECUTE 'ALTER TABLE ' || quote_ident(current_schema()) || '.{table} RESET (autovacuum_vacuum_scale_factor)';
    END IF;
END
$vacuum$"""


@online.in_one_schema
def upgrade() -> None:
    online.add_check("ck_saga_executions_stub", "saga_executions", _STUB)
    for table in _TABLES:
        op.execute(_VACUUM.format(table=table))


@online.in_one_schema
def downgrade() -> None:
    online.drop_check("ck_saga_executions_stub", "saga_executions")
    for table in _TABLES:
        op.execute(_USUAL.format(table=table))
