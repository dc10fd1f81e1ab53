"""The library without the packages of the command line, and the command line without them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commands import environment

from msfusion.cli import NEEDED

BLOCKED = (*NEEDED, "sklearn", "scipy", "pandas", "transformers", "datasets", "matplotlib", "grpc", "numba")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"

FEDERATION = """
import msfusion
from msfusion.models import ModelSpec, build_model
from msfusion.data import load_data

for name in msfusion.__all__:
    getattr(msfusion, name)
data = load_data(msfusion.DataSpec("digits", participants=2, max_train=40, max_test=20))
model = build_model(ModelSpec("convnet", {"widths": [4, 8]}), data)
federation = msfusion.Federation(model, data, method=msfusion.MSfusion(ratio=0.5, start="fresh"))
print(len(federation.fit(1)), msfusion.check_codec(msfusion.codecs.Scaled()))
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_a_federation_needs_nothing_of_the_command_line() -> None:
    ended = python(FEDERATION)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("1 ")


@pytest.mark.release
@pytest.mark.parametrize("missing", [*NEEDED, None])
def test_the_command_line_says_what_to_install(missing: str | None) -> None:
    present = [name for name in NEEDED if missing is not None and name != missing]
    again = f"[sys.modules.pop(name) for name in {present!r}]\n"
    ended = python(again + "sys.argv = ['msfusion', 'train']; from msfusion.cli import start; start()")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"msfusion: the command line needs {missing or 'typer'}: pip install")
    assert ended.stderr.count("\n") == 1


def test_a_missing_package_of_others_is_no_such_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    import msfusion.cli.main
    from msfusion.cli import start

    def app() -> None:
        raise ModuleNotFoundError("no such package", name="somebody_elses")

    monkeypatch.setattr(msfusion.cli.main, "app", app)
    with pytest.raises(ModuleNotFoundError):
        start()
