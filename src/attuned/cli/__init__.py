"""The command line, ``attuned-store``: written against the public interface of attuned_store alone."""

from .running import main

__all__ = ["main"]
