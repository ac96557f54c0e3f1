"""Give constraints and indexes their own names back that a naming convention of an application's has changed.

Until saga_store_0003 a convention such as ck_%(table_name)s_%(constraint_name)s of an application whose Alembic ran the
first revision doubled their names. Where all have their names, the catalog is read, and nothing is locked.
"""

from collections.abc import Sequence

from alembic import op
from saga_store.migrations import online

revision: str = "saga_store_0004"
down_revision: str | None = "saga_store_0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# One that is there under its own name as well, and one on other columns, are somebody else's.
# There are no percent signs here, for on paper Alembic doubles them.
_CONSTRAINTS = """\
DO $names$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT DISTINCT ON (w.name) w.tab, w.name, k.conname AS changed
        FROM (VALUES
            ('saga_executions', 'p', 'pk_saga_executions', 'id'),
            ('saga_executions', 'c', 'ck_saga_executions_status', 'status'),
            ('saga_logs', 'p', 'pk_saga_logs', 'id'),
            ('saga_logs', 'f', 'fk_saga_logs_saga_id', 'saga_id'),
            ('saga_logs', 'c', 'ck_saga_logs_action', 'action'),
            ('saga_logs', 'c', 'ck_saga_logs_status', 'status')
        ) AS w (tab, kind, name, col)
        JOIN pg_constraint k ON k.conrelid = CAST(quote_ident(current_schema()) || '.' || w.tab AS regclass)
            AND k.contype = w.kind AND position(w.name IN k.conname) > 0
        JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attname = w.col AND k.conkey = ARRAY[a.attnum]
        WHERE NOT EXISTS (SELECT FROM pg_constraint o WHERE o.conrelid = k.conrelid AND o.conname = w.name)
        ORDER BY w.name, k.conname
    LOOP
        EXECUTE 'ALTER TABLE ' || quote_ident(current_schema()) || '.' || found.tab
            || ' RENAME CONSTRAINT ' || quote_ident(found.changed) || ' TO ' || found.name;
    END LOOP;
END
$names$"""
_INDEXES = """\
DO $names$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT DISTINCT ON (w.name) w.name, i.relname AS changed
        FROM (VALUES
            ('saga_executions', 'ix_saga_executions_created_at'),
            ('saga_executions', 'ix_saga_executions_recovery'),
            ('saga_logs', 'ix_saga_logs_saga_id'),
            ('saga_logs', 'ix_saga_logs_created_at')
        ) AS w (tab, name)
        JOIN pg_index x ON x.indrelid = CAST(quote_ident(current_schema()) || '.' || w.tab AS regclass)
        JOIN pg_class i ON i.oid = x.indexrelid AND position(w.name IN i.relname) > 0
        WHERE i.relname !~ '_cc(new|old)[0-9]*$' AND to_regclass(quote_ident(current_schema()) || '.' || w.name) IS NULL
        ORDER BY w.name, i.relname
    LOOP
        EXECUTE 'ALTER INDEX ' || quote_ident(current_schema()) || '.' || quote_ident(found.changed)
            || ' RENAME TO ' || found.name;
    END LOOP;
END
$names$"""


@online.in_one_schema
def upgrade() -> None:
    op.execute(_CONSTRAINTS)
    op.execute(_INDEXES)


def downgrade() -> None:
    """Leave the names as they are: they are those that every revision before means, too."""
