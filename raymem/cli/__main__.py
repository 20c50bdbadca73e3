"""`python -m raymem.cli`."""

from raymem.cli import main

main()
