"""The command line. What it needs beyond the library (typer, rich, pydantic, tomli-w) is the extra `cli`."""

import atexit
import gc
import sys

NEEDED = ("typer", "rich", "pydantic", "tomli_w")


def start() -> None:
    """The console script `msfusion`. Without its packages it says what to install, exit code 2."""
    atexit.register(gc.freeze)  # or Python looks through all of PyTorch for garbage once more: a second
    try:
        from msfusion.cli.main import app

        app()
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in NEEDED:
            raise
        from msfusion.extras import install

        print(f"msfusion: the command line needs {missing}: {install('cli')}.", file=sys.stderr)
        sys.exit(2)
