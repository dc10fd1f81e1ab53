"""A configuration as a ready Flower app: a folder that `flwr run` takes, with everything in it that a run needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import msfusion
from msfusion.engines.flower.nodes import Waiting
from msfusion.errors import ConfigError
from msfusion.experiment.agreement import Run, prepared_for_network
from msfusion.experiment.config import Config
from msfusion.experiment.config.keys import flattened
from msfusion.experiment.fingerprint import references_of
from msfusion.experiment.own_data import OwnData
from msfusion.federated.protected import as_run
from msfusion.files import write_folder_with
from msfusion.imports import is_reference, own_files

PACKAGE = "msfusion_app"
"""The package in the app."""

JOB = "job.toml"
"""The configuration, beside the modules of the package."""

SERVER_APP = '''"""The server's side: Flower calls it once, and it carries out the whole run."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from msfusion.experiment.flower.server import server_main

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    server_main(grid, context, Path(__file__).with_name("job.toml"))
'''

CLIENT_APP = '''"""A participant's side: Flower calls it for each message, where the data is."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from msfusion.experiment.flower.client import answer

app = ClientApp()


@app.query()
@app.train()
def respond(message: Message, context: Context) -> Message:
    return answer(message, context, Path(__file__).with_name("job.toml"))
'''

ELSEWHERE = """
## Files that are not in the app

These are looked for from the folder in which `flower-superlink` or `flower-supernode` was started, so each machine
needs them there (or give whole paths in the configuration, and deploy again). A simulation looks for them in the folder
in which the first `flwr run` was said: say it there, with the path of this app for the dot.

"""


def write_app(config: Config, name: str, path: Path) -> None:
    """Write a Flower app of that name for a configuration, into a folder that does not exist or is empty.

    Raises ConfigError where there is something in it already, and for what cannot be run over Flower;
    RunDirectoryError where it cannot be written; what loading the data and tracing the model raise. Nothing is left
    behind then.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is there already: choose another --out")
    _check(config)
    files = {
        "pyproject.toml": _project(config, name),
        "README.md": _readme(config, name),
        f"{PACKAGE}/__init__.py": f'"""A Flower app that `msfusion deploy flower` has written for {JOB}."""\n',
        f"{PACKAGE}/server_app.py": SERVER_APP,
        f"{PACKAGE}/client_app.py": CLIENT_APP,
        f"{PACKAGE}/{JOB}": config.pinned().to_toml(),
    }
    contents = {where: text.encode() for where, text in files.items()} | _code(config)

    def write(folder: Path) -> None:
        for where, content in contents.items():
            (folder / where).parent.mkdir(parents=True, exist_ok=True)
            (folder / where).write_bytes(content)

    write_folder_with(path, write)


def app_name(name: str) -> str:
    """A name as Flower takes it for an app, near to this one."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "job"


def _check(config: Config) -> None:
    """Raises ConfigError for a run that Flower cannot carry."""
    prepared: Run
    if config.data.own is None:
        prepared = prepared_for_network(config.pinned(), None)
    else:
        prepared = OwnData(config.pinned()).run([1] * config.participants.count)
    if as_run(prepared.method).conversation(prepared.initial_state(), 0) is not None:
        raise ConfigError(
            f"participants of {config.method.name} ask the server in the middle of a task, and one message over Flower "
            "takes seconds: use 'msfusion serve' and 'msfusion join'"
        )


def _code(config: Config) -> dict[str, bytes]:
    """The user's own modules of which the run is made; what is installed must be so everywhere."""
    return {
        where: path.read_bytes()
        for reference, setting in references_of(config)
        for where, path in own_files(reference, setting).items()
    }


def _project(config: Config, name: str) -> str:
    import tomli_w

    waiting = Waiting()
    table = {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {
            "name": name,
            "version": "1.0.0",
            "description": f"{config.method.name} by msfusion, over Flower",
            "license": "LicenseRef-Proprietary",
            "dependencies": [f"msfusion[flower]=={msfusion.__version__}"],
        },
        "tool": {
            "hatch": {"build": {"targets": {"wheel": {"packages": [PACKAGE]}}}},
            "flwr": {
                "app": {
                    "publisher": "msfusion",
                    "components": {
                        "serverapp": f"{PACKAGE}.server_app:app",
                        "clientapp": f"{PACKAGE}.client_app:app",
                    },
                    "config": {
                        "out": f"runs/{name}",
                        "patience": waiting.patience,
                        "deadline": waiting.deadline,
                    },
                }
            },
        },
    }
    return tomli_w.dumps(table)


def _readme(config: Config, name: str) -> str:
    template = Template(
        resources.files("msfusion.experiment.flower").joinpath("readme.md").read_text("utf-8")
    )
    count = config.participants.count
    own = config.data.own is not None
    text = template.substitute(
        name=name,
        count=count,
        last=count - 1,
        method=config.method.name,
        rounds=config.rounds,
        data=' data="/data/mine"' if own else "",
    )
    files = [f"- `{key} = {value!r}`" for key, value in _paths(config)]
    return text + (ELSEWHERE + "\n".join(files) + "\n" if files else "")


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    """The settings that name a file or folder of this machine."""
    table: Mapping[str, Any] = flattened(config.to_table())
    for key, value in table.items():
        if not isinstance(value, str) or not value or is_reference(value):
            continue
        named = key == "data.own" or Path(value.removeprefix("transformers:")).expanduser().exists()
        if named and not Path(value).is_absolute():
            yield key, value
