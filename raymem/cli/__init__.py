"""`raymem`: commands that read, join and exchange stores. Jobs write them."""

from raymem.cli import exchange, read
from raymem.cli.base import command_errors, main

__all__ = ["command_errors", "exchange", "main", "read"]
