"""opa-quotes-storage: a quote store over TimescaleDB."""

__version__ = "0.1.0"
