"""The receipts of requests with an idempotency key, for as long as the key is kept."""

from alembic import op

revision = "r4"
down_revision = "r3"
branch_labels = None
depends_on = None

COMMENTS = {
    "key": "Key that the client gave",
    "fingerprint": "Hash of all that the request asked for",
    "receipt": "Answer that the request got",
    "created": "When the receipt was kept",
}


def upgrade() -> None:
    # `json` keeps its text byte for byte, where `jsonb` would give back another one.
    op.execute("""
        CREATE TABLE quotes.receipts (
            key         text COLLATE "C" PRIMARY KEY,
            fingerprint bytea NOT NULL,
            receipt     json NOT NULL,
            created     timestamptz NOT NULL DEFAULT now()
        )""")
    op.execute("COMMENT ON TABLE quotes.receipts IS 'Receipts of requests with an idempotency key, until it expires'")
    for column, meaning in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN quotes.receipts.{column} IS '{meaning}'")
    op.execute("CREATE INDEX receipts_created ON quotes.receipts (created)")


def downgrade() -> None:
    op.execute("DROP TABLE quotes.receipts")
