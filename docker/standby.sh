#!/bin/sh
# A streaming standby: copies the primary once, then follows it. To copy it anew, delete its volume.

set -eu

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    # An attempt that was cut short leaves no PG_VERSION where it counts, as the copy is made beside it.
    rm -rf "$PGDATA.new"
    mkdir -p "$(dirname "$PGDATA")"
    until pg_basebackup --pgdata "$PGDATA.new" --write-recovery-conf --checkpoint=fast --wal-method=stream \
        --dbname "host=$PRIMARY_HOST user=replicator password=$REPLICATION_PASSWORD application_name=$(hostname)"; do
        rm -rf "$PGDATA.new"
        echo "The primary does not let itself be copied yet; trying again." >&2
        sleep 5
    done
    mkdir -p "$PGDATA" && rmdir "$PGDATA"
    mv "$PGDATA.new" "$PGDATA"
    chmod 700 "$PGDATA"
fi
exec postgres -c config_file=/etc/postgresql/postgresql.conf
