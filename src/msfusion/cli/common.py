"""What the commands have in common: options, how mistakes are told and commands stopped, where results are shown."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from msfusion.errors import MsfusionError
from msfusion.extras import extra_of, missing
from msfusion.quoting import sentence, short

if TYPE_CHECKING:
    from rich.console import Console

_BROKEN_PIPE = 128 + 13
"""The exit code of a process that was ended by SIGPIPE: whoever read its output has left."""

AGAIN_SECONDS = 0.05
"""After how long a signal comes again that came where Python lets nothing be raised."""

UNHEARD_SECONDS = 5.0
"""How long a signal may go unheard, until the process is ended at once."""

P = ParamSpec("P")
R = TypeVar("R")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set training.batch_size=32."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table.")]


def told_in_a_sentence(command: Callable[P, R]) -> Callable[P, R]:
    """Tell a user's mistake in one sentence on standard error, exit code 2; bugs keep their traceback.

    A function of the user's that would end the program (`sys.exit()`) is such a mistake.
    """

    @functools.wraps(command)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> R:
        stopping = Stopping()
        try:
            with stopping:
                return command(*arguments, **options)
        except BrokenPipeError:
            with suppress(OSError):  # what is still to be flushed goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_BROKEN_PIPE) from None
        except (MsfusionError, OSError) as error:
            if stopping.heard is not None:  # a worker that was stopped with us, or what could not be finished
                stopping.tell_and_exit()
            _refuse(_sentence_of(error), error)
        except ModuleNotFoundError as error:
            extra = extra_of(error.name)
            if extra in (None, "cli"):  # what the command line itself needs is told where that begins
                raise
            _refuse(missing(extra, "this command", error.name), error)
        except (KeyboardInterrupt, SystemExit, GeneratorExit) as error:
            if stopping.heard is not None:
                stopping.tell_and_exit()
            from msfusion.imports import who_ended

            _refuse(who_ended(error), error)

    return wrapped


class Stopping:
    """Ctrl-C and SIGTERM: the first ends the command in good order, the second at once.

    Where the command was started deaf to one of them (`nohup`, a shell's background job), it stays so.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        self._before: dict[int, Any] = {}
        self._tell_of_lost = sys.unraisablehook

    def __enter__(self) -> Stopping:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._hear)
        self._tell_of_lost, sys.unraisablehook = sys.unraisablehook, self._lost
        return self

    def __exit__(self, *_: object) -> None:
        if self.heard is None:  # else the second may still come, until the process has ended
            for number, before in self._before.items():
                signal.signal(number, before)
            if sys.unraisablehook == self._lost:
                sys.unraisablehook = self._tell_of_lost

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.heard is not None:
            _leave_at_once(number)
        self.heard = number
        raise KeyboardInterrupt

    def _lost(self, lost: sys.UnraisableHookArgs) -> None:
        """Where the signal came in the middle of a callback that Python lets raise nothing, let it come again."""
        if lost.exc_type is not KeyboardInterrupt or self.heard is None:
            self._tell_of_lost(lost)
            return
        number, self.heard = self.heard, None
        again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    def tell_and_exit(self) -> NoReturn:
        """Say that the command was stopped; the exit code is that of a process which the signal ended."""
        typer.echo(
            "msfusion: interrupted; a run goes on from its last checkpoint with the same command (train, compare: with "
            "--resume).",
            err=True,
        )
        raise typer.Exit(128 + (self.heard or signal.SIGINT)) from None


@contextmanager
def stopped_while_it_waits() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process also where it waits in code that is not Python's, as a rank for another.

    What is done about a signal is done when that code returns, which may be in an hour. So a thread is told of signals
    as well; it ends the process at once where nothing has been done after `UNHEARD_SECONDS`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = list[int]()
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(handler := signal.getsignal(number))
    }

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        before[signal.Signals(number)](number, frame)

    told, telling = socket.socketpair()
    telling.setblocking(False)  # as Python wants it
    earlier = signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_leave_where_unheard, args=(told, heard, before), daemon=True).start()
    try:
        for number in before:
            signal.signal(number, hear)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier)
        telling.close()


def _leave_where_unheard(told: socket.socket, heard: list[int], numbers: Collection[int]) -> None:
    """End the process where one of these signals has come, and its handler has not been called a while later."""
    with told:
        came = 0
        while number := told.recv(1):
            if number[0] in numbers:
                came += 1
                time.sleep(UNHEARD_SECONDS)
                if len(heard) < came:
                    _leave_at_once(number[0])


def _leave_at_once(number: int) -> NoReturn:
    """End the process and its workers. Files are whole or temporary at any moment, so nothing else has to be done."""
    if "multiprocessing" in sys.modules:
        with suppress(Exception):
            for worker in sys.modules["multiprocessing"].active_children():
                worker.kill()
    with suppress(OSError):
        shown = b"\x1b[?25h\n" if os.isatty(2) else b""  # a progress bar hides the cursor
        os.write(
            2,
            shown
            + b"msfusion: stopped at once; a run goes on from its last checkpoint with the same command.\n",
        )
    os._exit(128 + number)


def _refuse(text: str, error: BaseException) -> NoReturn:
    told = " ".join(text.split()).rstrip(".")
    typer.echo(f"msfusion: {told}{'' if told.endswith('?') else '.'}", err=True)
    raise typer.Exit(2) from error


def _sentence_of(error: MsfusionError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{short(os.fsdecode(error.filename), 300)}: {error.strerror}"
    return sentence(str(error))


def console_of_user() -> Console:
    """Where results are shown. Names in them are text: brackets are no colours, escapes command no terminal."""
    from msfusion.cli.console import PlainConsole

    console = PlainConsole()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a file or pipe has no width; tables should not be squeezed into 80 columns
    return console


def print_line(console: Console, text: object) -> None:
    """Print a path or a sentence whole, in one line however long, without colours."""
    console.print(f"{text}", highlight=False, soft_wrap=True)
