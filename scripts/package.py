"""Build the package, and try it as a user gets it: with each extra alone, with all together, and with none.

    python3 scripts/package.py                         build both archives, look into them, and try every extra
    python3 scripts/package.py cli stream              only these (of core, the extras, all, docs, dev)
    python3 scripts/package.py --python python3.13     with another Python
    python3 scripts/package.py --base VENV             with a virtual environment that has PyTorch already

Archives go to dist/, environments to .venv-package/. PyTorch, which is most of what there is to install, is installed
once; each environment begins as a copy of that one made of hard links, which takes a second and no room. In each,
`import msfusion` works, what its extra is for works, and what another extra is for is refused in one sentence that
names it, with exit code 2.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from package_probes import CLI, COMMANDS, PROGRAMS, Probe, job_folder

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".venv-package"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [name for name in PROJECT["optional-dependencies"] if name not in ("all", "dev", "docs")]
KINDS = ["core", *EXTRAS, "all", "docs", "dev"]

ASSETS = (
    "msfusion/default.toml", "msfusion/py.typed", "msfusion/data/digits.safetensors", "msfusion/data/digits.LICENSE",
    "msfusion/experiment/flower/readme.md", "msfusion/experiment/page/assets/page.js",
    "msfusion/experiment/page/assets/plot.umd.min.js", "msfusion/experiment/page/assets/library.LICENSE",
)  # fmt: skip
"""What is no code, and must be in the wheel."""

TESTS_OF_SDIST = ["-m", "not slow", "tests/cli", "tests/data", "tests/examples", "tests/test_lean.py"]
"""A part of the tests, run in the unpacked source archive: those that read files of the repository."""


class Failed(Exception):
    """The package is not as it should be; the message says what is wrong."""


def main() -> int:
    """Build and try; the exit code is 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all of them"
    )
    parser.add_argument("--python", default=sys.executable, help="the Python to try it with")
    parser.add_argument("--base", type=Path, help="a virtual environment that has PyTorch already")
    given = parser.parse_args()
    if unknown := set(given.kinds) - set(KINDS):
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    shutil.rmtree(PLACE / "tried", ignore_errors=True)
    (PLACE / "tried").mkdir(parents=True)
    failures = []
    try:
        wheel, source = build()
        base = given.base or base_environment(given.python)
    except Failed as failed:
        print(f"build: {failed}")
        return 1
    for kind in given.kinds or KINDS:
        began = time.monotonic()
        try:
            told = attempt(kind, base, wheel, source)
        except Failed as failed:
            failures.append(kind)
            told = f"FAILED: {failed}"
        print(f"{kind:12} {time.monotonic() - began:4.0f} s  {told}", flush=True)
        shutil.rmtree(PLACE / "tried" / kind, ignore_errors=True)
    return 1 if failures else 0


def build() -> tuple[Path, Path]:
    """The wheel and the source archive, made anew and looked into: the wheel is built from the source archive."""
    tool = PLACE / "build"
    if not tool.exists():
        run([sys.executable, "-m", "venv", tool])
        run([tool / "bin/python", "-m", "pip", "install", "--quiet", "build", *build_requirements()])
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run([tool / "bin/python", "-m", "build", "--no-isolation", "--outdir", ROOT / "dist", ROOT])
    (wheel,), (source,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    look_into(wheel, source)
    sizes = ", ".join(f"{each.name} ({each.stat().st_size:,} bytes)" for each in (wheel, source))
    print(f"built        {sizes}", flush=True)
    return wheel, source


def build_requirements() -> list[str]:
    """What pyproject.toml wants for building."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted: list[str] = tomllib.loads(text)["build-system"]["requires"]
    return wanted


def look_into(wheel: Path, source: Path) -> None:
    """Raise Failed where an archive lacks something, has too much, or says another version than the package."""
    said = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/msfusion/__init__.py").read_text(), re.M)
    version = said[1] if said else "none"
    names = set(zipfile.ZipFile(wheel).namelist())
    information = f"msfusion-{version}.dist-info"
    licences = {f"{information}/licenses/{each}" for each in PROJECT["license-files"]}
    expect("the wheel lacks", {*ASSETS, *licences, f"{information}/entry_points.txt"} - names)
    expect("in the wheel is", {each for each in names if not each.startswith(("msfusion/", information))})
    code = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    expect("the wheel lacks", code - names)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    with tarfile.open(source) as archive:
        packed = {each.name.partition("/")[2] for each in archive.getmembers() if each.isfile()}
    if listed.returncode == 0:  # no clone: nothing to compare with
        expect("the source archive lacks", set(listed.stdout.splitlines()) - packed)
        expect("git does not know, but packed is", packed - {*listed.stdout.splitlines(), "PKG-INFO"})
    if f"## {version} " not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        raise Failed(f"CHANGELOG.md says nothing of version {version}")


def expect(what: str, names: set[str]) -> None:
    """Raise Failed where there are names."""
    if names:
        raise Failed(f"{what} {', '.join(sorted(names)[:5])}{' and more' if len(names) > 5 else ''}")


def base_environment(python: str) -> Path:
    """A virtual environment with PyTorch alone, of the version in constraints.txt; kept for the next time."""
    tag = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    base = PLACE / f"base-{tag}"
    if not (base / "complete").exists():
        shutil.rmtree(base, ignore_errors=True)
        run([python, "-m", "venv", base])
        torch = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.M)
        run([base / "bin/python", "-m", "pip", "install", "--quiet", torch[0] if torch else "torch"])
        (base / "complete").touch()
    return base


def attempt(kind: str, base: Path, wheel: Path, source: Path) -> str:
    """Install one kind and try it; what was tried, in words. Raises Failed."""
    place = PLACE / "tried" / kind
    environment = place / "venv"
    shutil.copytree(base, environment, symlinks=True, copy_function=linked)
    install(environment, wheel, kind)
    here = job_folder(place / "here")
    run([environment / "bin/python", "-c", "import msfusion; print(msfusion.__version__)"], here)
    if kind in ("docs", "dev"):
        return of_source(kind, environment, source, place)
    done = []
    if kind == "core":
        for extra, probe in PROGRAMS.items():
            refuse(probe, environment, here, extra)
        done.append(f"without extras refused: {', '.join(PROGRAMS)}")
    elif kind in PROGRAMS:
        work(PROGRAMS[kind], environment, here)
        done.append("works in a program")
    if kind not in ("cli", "all"):
        if has_command_line(environment, here):
            done.append("brings the command line with it")
        else:
            refuse(Probe((("msfusion", "--help"),)), environment, here, "cli")
            done.append("the command line is refused")
        if kind == "core":
            return "; ".join(done)
        install(environment, wheel, f"cli,{kind}")
    run([environment / "bin/msfusion", "--help"], here)
    for extra, probe in COMMANDS.items():
        if kind in (extra, "all"):
            work(probe, environment, here)
            done.append(f"commands of {extra} work")
        elif kind == "cli":
            refuse(probe, environment, here, extra)
    if kind == "cli":
        done.append(f"refused: {', '.join(each for each in COMMANDS if each != 'cli')}")
    return "; ".join(done)


def has_command_line(environment: Path, here: Path) -> bool:
    """Whether an extra has brought all that the command line needs: flwr has a command line of its own."""
    looked = subprocess.run(
        [environment / "bin/python", "-c", f"import {CLI}"], cwd=here, env=settings(), capture_output=True
    )
    return looked.returncode == 0


def linked(origin: str, copy: str) -> None:
    """A second name of a file; where there can be none, a copy."""
    try:
        os.link(origin, copy)
    except OSError:
        shutil.copy2(origin, copy)


def of_source(kind: str, environment: Path, source: Path, place: Path) -> str:
    """What is done in the source: build the site, or run tests. In the unpacked source archive, not in the clone."""
    with tarfile.open(source) as archive:
        archive.extractall(place / "source", filter="data")
    (folder,) = (place / "source").iterdir()
    if kind == "docs":
        run([environment / "bin/mkdocs", "build", "--strict", "--quiet"], folder, NO_MKDOCS_2_WARNING="1")
        return f"the site has {len(list((folder / 'site').rglob('*.html')))} pages"
    told = run([environment / "bin/python", "-m", "pytest", "-p", "no:randomly", *TESTS_OF_SDIST], folder)
    return f"in the source archive: {told.strip().splitlines()[-1]}"


def install(environment: Path, wheel: Path, extras: str) -> None:
    """Install the wheel with extras, and see whether all versions go together."""
    python = environment / "bin/python"
    wanted = f"msfusion[{extras}] @ {wheel.as_uri()}" if extras != "core" else str(wheel)
    run([python, "-m", "pip", "install", "--quiet", wanted])
    run([python, "-m", "pip", "check"])


def work(probe: Probe, environment: Path, here: Path) -> None:
    """All commands of a probe end well. Those that it starts in the background have ended well by then."""
    started = [start(command, environment, here) for command in probe.background]
    try:
        for command in probe.commands:
            run(whole(command, environment), here)
        for process in started:
            said, _ = process.communicate(timeout=120)
            if process.returncode != 0:
                raise Failed(f"{' '.join(map(str, process.args))}: exit code {process.returncode}\n{said}")
    finally:
        for process in started:
            process.kill()
            process.wait()


def refuse(probe: Probe, environment: Path, here: Path, extra: str) -> None:
    """Each command of a probe that needs the extra says so in one sentence, with exit code 2."""
    for command in (*probe.background, *probe.commands):
        process = start(command, environment, here, stderr=subprocess.PIPE)
        try:
            _, said = process.communicate(timeout=60)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise Failed(f"{' '.join(command)} does not say what is missing, and does not end") from error
        line = said.strip()
        if process.returncode != 2 or "\n" in line or f"pip install 'msfusion[{extra}]'" not in line:
            raise Failed(f"{' '.join(command)}: exit code {process.returncode}, {line[-500:]}")


def start(
    command: Sequence[str], environment: Path, here: Path, stderr: int = subprocess.STDOUT
) -> subprocess.Popen[str]:
    """A command of the environment, begun."""
    return subprocess.Popen(
        whole(command, environment),
        cwd=here,
        env=settings(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def whole(command: Sequence[str], environment: Path) -> list[str]:
    """A command with the path of its program, which is one of the environment's."""
    return [str(environment / "bin" / command[0]), *command[1:]]


def settings(**more: str) -> dict[str, str]:
    """The environment variables of what is tried: nothing of the clone, nothing of the Hub."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def run(command: Sequence[str | Path], here: Path = ROOT, **more: str) -> str:
    """What a command prints. Raises Failed with its last lines where it does not end well."""
    ended = subprocess.run(
        list(map(str, command)), cwd=here, env=settings(**more), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if ended.returncode != 0:
        last = "\n".join(ended.stdout.splitlines()[-15:])
        raise Failed(f"{' '.join(map(str, command))}: exit code {ended.returncode}\n{last}")
    return ended.stdout


if __name__ == "__main__":
    sys.exit(main())
