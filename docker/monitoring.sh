#!/bin/sh
# The roles of Grafana and postgres_exporter, which can read and nothing else. The image runs it when it initialises
# the data; on older data run it by hand, as often as you like, also to change a password:
#
#   docker compose exec --user postgres db sh /docker-entrypoint-initdb.d/110-monitoring.sh

set -eu

# Grafana reads the quotes. The schema does not exist yet when the data are initialised: what the owner of the
# database creates later is readable by default.
# The exporter sees PostgreSQL's own figures, and no quote.
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --set owner="$POSTGRES_USER" \
    --set grafana="$GRAFANA_DATABASE_PASSWORD" --set exporter="$EXPORTER_PASSWORD" \
    --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
SET client_min_messages = warning;
SELECT 'CREATE ROLE ' || name FROM unnest(ARRAY['grafana', 'postgres_exporter']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

ALTER ROLE grafana LOGIN CONNECTION LIMIT 6 PASSWORD :'grafana';
ALTER ROLE grafana SET default_transaction_read_only = on;
ALTER ROLE grafana SET statement_timeout = '10s';
ALTER ROLE grafana SET idle_in_transaction_session_timeout = '10s';
ALTER DEFAULT PRIVILEGES FOR ROLE :"owner" GRANT USAGE ON SCHEMAS TO grafana;
ALTER DEFAULT PRIVILEGES FOR ROLE :"owner" GRANT SELECT ON TABLES TO grafana;
SELECT format(command, 'quotes') FROM unnest(ARRAY[
    'GRANT USAGE ON SCHEMA %I TO grafana', 'GRANT SELECT ON ALL TABLES IN SCHEMA %I TO grafana']) AS command
WHERE EXISTS (SELECT FROM pg_namespace WHERE nspname = 'quotes') \gexec

ALTER ROLE postgres_exporter LOGIN CONNECTION LIMIT 4 PASSWORD :'exporter';
ALTER ROLE postgres_exporter SET statement_timeout = '10s';
GRANT pg_monitor TO postgres_exporter;
SQL
