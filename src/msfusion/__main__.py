"""`python -m msfusion` is the console script."""

from msfusion.cli.main import main

main()
