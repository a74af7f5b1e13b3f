"""Procedures and functions that mean the same in every session, whatever the database or the role is set to.

They run in sessions of TimescaleDB's scheduler and of administrators too. A procedure that commits cannot have a `SET`
clause, so it sets its session itself. `quotes.nanoseconds` names all that it calls and stays as it is: with a path of
its own it could not be put into plans, and with a parsed body it would stand in the way of updates of the extension.
"""

from alembic import context, op

from app.db.capability import Level

revision = "r7"
down_revision = "r6"
branch_labels = None
depends_on = None

# What the chunks hold is asked after they are locked: in a snapshot of before, quotes that came meanwhile would be
# missed, and dropped. The transaction that is under way keeps its isolation, so another one begins.
SESSION = """
BEGIN
    PERFORM pg_catalog.set_config(wanted.name, wanted.value, false) FROM (VALUES
        ('search_path', '{path}'), ('default_transaction_isolation', 'read committed'),
        ('default_transaction_deferrable', 'off'), ('TimeZone', 'UTC')) AS wanted (name, value);
    COMMIT;
"""
# A list of one name: the functions of the extension are called by theirs alone.
PATH = """
SELECT coalesce((SELECT quote_ident(nspname) FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace
                 WHERE extname = 'timescaledb'), 'pg_catalog')
"""


def _replace(statement: str, beginning: str) -> None:
    statement = statement.replace("CREATE PROCEDURE", "CREATE OR REPLACE PROCEDURE")
    op.execute(statement.replace("\nBEGIN\n", beginning, 1))


def _replace_all(beginning: str) -> None:
    before = context.script.get_revision("r5").module
    level = context.config.attributes["capability"].level
    _replace(before.MEND, beginning)
    if level >= Level.APACHE:
        _replace(before.retention_at(level), beginning)


def upgrade() -> None:
    op.execute("COMMENT ON TABLE quotes.alembic_version IS 'Revision of this schema'")
    op.execute("COMMENT ON COLUMN quotes.alembic_version.version_num IS 'Name of the migration that was last done'")
    path = op.get_bind().exec_driver_sql(PATH).scalar_one()
    _replace_all(SESSION.replace("{path}", path.replace("'", "''")))
    if context.config.attributes["capability"].level >= Level.COMMUNITY:
        op.execute("ALTER FUNCTION quotes.bars_behind SET search_path = pg_catalog")


def downgrade() -> None:
    _replace_all("\nBEGIN\n")
    if context.config.attributes["capability"].level >= Level.COMMUNITY:
        op.execute("ALTER FUNCTION quotes.bars_behind RESET search_path")
