"""A record of the backups that were made, so that their age can be watched."""

from alembic import op

revision = "r6"
down_revision = "r5"
branch_labels = None
depends_on = None

COMMENTS = {
    "finished": "When the backup was whole; infinity says that another tool watches its own backups",
    "bytes": "Size of the backup, null where nobody said it",
    "verified": "Whether it was restored and compared with the store",
}


def upgrade() -> None:
    # A row may be inserted by whatever made the backup, also without a value for any column.
    op.execute("""
        CREATE TABLE quotes.backups (
            finished timestamptz PRIMARY KEY DEFAULT clock_timestamp(),
            bytes    bigint CHECK (bytes >= 0),
            verified boolean NOT NULL DEFAULT false
        )""")
    op.execute("COMMENT ON TABLE quotes.backups IS 'Backups that succeeded, written by whatever makes them'")
    for column, meaning in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN quotes.backups.{column} IS '{meaning}'")


def downgrade() -> None:
    op.execute("DROP TABLE quotes.backups")
