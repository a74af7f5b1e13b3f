"""The database: connections, capability level, schema migrations and the embedded server."""
