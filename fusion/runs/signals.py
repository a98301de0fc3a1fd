"""Signals that end a program: SIGINT, SIGTERM, and those that schedulers and terminals send before they end it.

Each ends the program with exit code 130 (SIGINT) or 143 (the others) and one line, without a traceback. Only the
standard library is imported here: the handlers must be installed before anything large is imported.
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

ECHO = 1.0  # seconds in which a signal may arrive twice, from the process group and from the parent
RESEND = 0.05  # seconds until a signal whose exception was swallowed is sent again
# SLURM and submitit announce preemption by USR1 or USR2, a closing terminal sends HUP.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_last = float("-inf")  # when the last signal was handled
_holding = 0
_pending: int | None = None


class Terminated(BaseException):
    """SIGTERM or another of `SIGNALS` as an exception, so that a job can record that it was interrupted."""


class Forward:
    """A handler that passes signals on to the parent process, which stops all its children."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getppid() == self.parent:
            os.kill(self.parent, number)


def exit_during_startup() -> None:
    """Let a command that is still importing exit at once on a signal, without a traceback."""
    if _is_starting():
        _install(_exit)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, a signal raises KeyboardInterrupt or Terminated; the previous handlers are restored at the end.

    Ignored signals (nohup) stay ignored, and other handlers (submitit's) stay in place. A second signal raises again
    unless it follows within `ECHO` seconds. Python swallows exceptions raised in `__del__` and in callbacks of the
    garbage collector; a signal that arrives there is sent again.
    """
    global _last
    before = _install(raise_it)
    if before:
        _last = float("-inf")
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
    """Inside, signals are deferred: for short work that must not be left half-done."""
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
    """Run a whole program and return its exit code: 130 or 143 if a signal ended it."""
    try:
        with raised():
            return work()
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    except Terminated:
        return _report("terminated", 143)


def raise_it(number: int, frame: FrameType | None) -> None:
    """A handler that raises the exception of a signal."""
    global _last, _pending
    now = time.monotonic()
    if now - _last < ECHO:
        return
    _last = now
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
    """Called in another thread; handlers run in the main thread."""
    global _last
    if signal.getsignal(number) is raise_it:
        _last = float("-inf")
        os.kill(os.getpid(), number)


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(_report("interrupted", 130) if number == signal.SIGINT else _report("terminated", 143))


def _report(word: str, code: int) -> int:
    with contextlib.suppress(OSError):
        os.write(2, f"{word}\n".encode())
    return code


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Replace Python's default handlers and the one of the startup. Returns those that were replaced."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        return {}
    replaceable = (signal.SIG_DFL, signal.default_int_handler, _exit)
    before: dict[int, Any] = {n: h for n in SIGNALS if (h := signal.getsignal(n)) in replaceable}
    for number in before:
        signal.signal(number, handler)
    return before


def _is_starting() -> bool:
    """Whether this process is `python -m fusion.NAME`, `python -m pipelines.NAME` or an installed `fusion-NAME`."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":  # Python's placeholder until it has found the module, after its package's __init__
        words = sys.orig_argv
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
        return module.split(".")[0] in ("fusion", "pipelines")
    return os.path.basename(name).startswith("fusion-")
