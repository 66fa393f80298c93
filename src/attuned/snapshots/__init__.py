"""Snapshots, which are backups: their format, and files in a directory."""
