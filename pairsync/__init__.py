"""Keeps two Dovecot servers equal; see README.md. Standard library only."""

__version__ = "1.0"
