"""The receipts of requests with an idempotency key, for as long as the key is kept."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # `json` keeps its text byte for byte, where `jsonb` would give back another one.
    op.execute("""
        CREATE TABLE quotes.receipts (
            key         text COLLATE "C" PRIMARY KEY,
            fingerprint bytea NOT NULL,
            receipt     json NOT NULL,
            created     timestamptz NOT NULL DEFAULT now()
        )""")
    op.execute("CREATE INDEX receipts_created ON quotes.receipts (created)")


def downgrade() -> None:
    op.execute("DROP TABLE quotes.receipts")
