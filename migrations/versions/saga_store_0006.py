"""Let sagas be archived: columns for stubs and holds, and saga_archives, the ledger.

Columns that may be NULL and have no default change the catalog only, whatever the size of the table; but they need the
table for themselves for that moment.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from saga_store.migrations import online

revision: str = "saga_store_0006"
down_revision: str | None = "saga_store_0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# A stub without the column would pass for a finished saga that carried nothing. Whoever makes stubs writes to the
# ledger, too, so its lock keeps them out, and nobody else.
_REFUSE_STUBS = """\
DO $stubs$
BEGIN
    LOCK TABLE saga_archives IN SHARE MODE;
    IF EXISTS (SELECT FROM saga_executions WHERE archived_at IS NOT NULL) THEN
        RAISE EXCEPTION USING
            MESSAGE = 'saga_executions holds stubs of archived sagas, which the revision before does not know',
            HINT = 'Restore them, or let them be forgotten: saga-store restore --archive URI, saga-store forget.';
    END IF;
END
$stubs$"""


@online.in_one_schema
def upgrade() -> None:
    op.create_table(
        "saga_archives",
        sa.Column("id", sa.Uuid(), nullable=False, comment="The archiver's id for the archive"),
        sa.Column("uri", sa.Text(), nullable=True, comment="Where its object is; NULL: sagas were removed without one"),
        sa.Column(
            "state",
            sa.String(32),
            nullable=False,
            comment="WRITING, VERIFIED: its sagas may become stubs, REMOVED: they have; FAILED",
        ),
        sa.Column("archived_by", sa.String(255), nullable=False, comment="Who archived"),
        sa.Column(
            "begun_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was registered, by the database's clock",
        ),
        sa.Column(
            "archived_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When it was verified; its stubs have the same time, and those of no other archive",
        ),
        sa.Column(
            "removed_at", sa.DateTime(timezone=True), nullable=True, comment="When the last of its sagas became a stub"
        ),
        sa.Column("sha256", sa.String(64), nullable=True, comment="Of its object"),
        sa.Column(
            "sagas", sa.BigInteger(), server_default=sa.text("0"), nullable=False, comment="How many sagas it holds"
        ),
        sa.Column(
            "entries",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="How many entries they have together",
        ),
        sa.Column(
            "bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False, comment="How big its object is"
        ),
        sa.Column(
            "removed",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="How many of its sagas have become stubs by it",
        ),
        sa.Column("watermark", sa.Text(), nullable=True, comment="Where its walk ended; NULL: at the end"),
        sa.Column("error", sa.Text(), nullable=True, comment="Why it failed"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_saga_archives")),
        sa.UniqueConstraint("archived_at", name=op.f("uq_saga_archives_archived_at")),
        sa.CheckConstraint(
            "state IN ('WRITING', 'VERIFIED', 'REMOVED', 'FAILED')", name=op.f("ck_saga_archives_state")
        ),
        comment="The ledger of archives: what was let go, where its record is, and who let it go (saga-store)",
    )
    op.add_column(
        "saga_executions",
        sa.Column(
            "archived_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="This is a stub, and its record is in the archive of that time; NULL: the saga is here",
        ),
    )
    op.add_column(
        "saga_executions",
        sa.Column(
            "retain_until",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="It is held: kept until then, whatever a policy says; infinity: until it is released",
        ),
    )


@online.in_one_schema
def downgrade() -> None:
    op.execute(_REFUSE_STUBS)
    op.drop_column("saga_executions", "retain_until")
    op.drop_column("saga_executions", "archived_at")
    op.drop_table("saga_archives")
