"""The signals that end a program: SIGINT, SIGTERM, and those by which schedulers and terminals announce their end.

Each ends the program in order wherever it is: exit code 130 for SIGINT, else 143, one line, no traceback. Only the
standard library is imported here, since the handlers have to be in place before anything large is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

ECHO = 1.0  # seconds in which the same wish may come twice, by the process group and by whoever started this
RESEND = 0.05  # seconds until a signal whose exception was swallowed is sent again: the callback has returned by then
# SLURM and submitit announce a preemption or the end of the time by USR1 or USR2, a terminal that closes by HUP.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_since = float("-inf")  # when the last signal was taken
_holding = 0
_pending: int | None = None


class Terminated(BaseException):
    """SIGTERM or another of `SIGNALS`, as an exception: the job gets to record that it was interrupted. Exit code 143."""


class Forward:
    """A handler that passes signals on to the process that started this one, which decides for all that it started."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getppid() == self.parent:
            os.kill(self.parent, number)


def end_at_once_until_ready() -> None:
    """Called by the package's `__init__`: if a command of this project is starting, end it at once on a signal.

    There is nothing to clean up yet, and an exception would end in a traceback from the middle of some import.
    """
    if _is_starting():
        _install(_exit)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, a signal raises KeyboardInterrupt or Terminated; the handlers from before come back at the end.

    A signal that is ignored stays ignored, as under nohup, and a handler that somebody else has set stays as well, as
    submitit's. A second signal raises once more, unless it comes within `ECHO` seconds.

    Python swallows an exception that is raised inside a `__del__` or a callback of the garbage collector; a signal that
    comes there is therefore sent once more.
    """
    global _since
    before = _install(raise_it)
    if before:
        _since = float("-inf")
    report = sys.unraisablehook

    def hook(swallowed: sys.UnraisableHookArgs) -> None:
        number = _number_of(swallowed.exc_value)
        if number is None:
            report(swallowed)
        else:
            timer = threading.Timer(RESEND, _send_again, (number,))
            timer.daemon = True
            timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:
            sys.unraisablehook = report
        for number, handler in before.items():
            if signal.getsignal(number) is raise_it:
                signal.signal(number, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, a signal waits: for what must not be left half-done and takes no time."""
    global _holding, _pending
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
        if not _holding and _pending is not None:
            number, _pending = _pending, None
            _throw(number)


def exit_code(work: Callable[[], int]) -> int:
    """Does the work of a whole program, and gives its exit code: 130 or 143 where a signal ended it."""
    try:
        with raised():
            return work()
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Terminated:
        return _say("terminated", 143)


def raise_it(number: int, frame: FrameType | None) -> None:
    """A handler: raises what the signal stands for."""
    global _since, _pending
    now = time.monotonic()
    if now - _since < ECHO:
        return
    _since = now
    if _holding:
        _pending = number
    else:
        _throw(number)


def _throw(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(signal.Signals(number).name)


def _number_of(error: BaseException | None) -> int | None:
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    return signal.Signals[error.args[0]] if isinstance(error, Terminated) else None


def _send_again(number: int) -> None:
    """From another thread: handlers run in the main thread, wherever that is by then."""
    global _since
    if signal.getsignal(number) is raise_it:
        _since = float("-inf")
        os.kill(os.getpid(), number)


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(_say("interrupted", 130) if number == signal.SIGINT else _say("terminated", 143))


def _say(word: str, code: int) -> int:
    with contextlib.suppress(OSError):
        os.write(2, f"{word}\n".encode())
    return code


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Sets the handler where Python's own, or the one for the start, is. Gives what was there before."""
    if threading.current_thread() is not threading.main_thread():  # nobody else may set handlers
        return {}
    replaceable = (signal.SIG_DFL, signal.default_int_handler, _exit)
    before: dict[int, Any] = {n: h for n in SIGNALS if (h := signal.getsignal(n)) in replaceable}
    for number in before:
        signal.signal(number, handler)
    return before


def _is_starting() -> bool:
    """Whether this process is `python -m fusion.NAME`, `python -m pipelines.NAME` or an installed `fusion-NAME`."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":  # so it is called until the module has been found, after its package's __init__
        words = sys.orig_argv
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
        return module.split(".")[0] in ("fusion", "pipelines")
    return os.path.basename(name).startswith("fusion-")
