"""`python -m kadapt_cli`."""

from kadapt_cli.cli import main

main()
