"""`python -m msfusion` is the console script."""

from msfusion.cli import start

start()
