"""Signals that terminate a program, with one line and code 130 (SIGINT) or 143. Installed before any large import."""

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

ECHO = 1.0  # seconds within which a repeated signal is ignored; process group and parent may both send it
RESEND = 0.05  # seconds until a signal is resent after Python ignored its exception
# SLURM and submitit announce preemption by USR1 or USR2, a closing terminal sends HUP.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_last = float("-inf")  # when the last signal was handled
_holding = 0
_pending: int | None = None


class Terminated(BaseException):
    """SIGTERM or a similar signal as an exception, so that a job can record the interruption."""


class Forward:
    """A handler that forwards signals to the parent process, which terminates all its children."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getppid() == self.parent:
            os.kill(self.parent, number)


def exit_during_startup() -> None:
    """Exit without a traceback if a signal arrives while a command is still importing."""
    if _is_starting():
        _install(_exit)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise KeyboardInterrupt or Terminated on signals inside the block.

    Does not replace handlers of other packages (submitit) or ignored signals (nohup). A signal within `ECHO` seconds
    of the previous one is ignored. Python ignores exceptions in `__del__` and in garbage collector callbacks; the
    signal is then resent.
    """
    global _last
    before = _install(raise_it)
    if before:
        _last = float("-inf")
    report = sys.unraisablehook

    def hook(swallowed: sys.UnraisableHookArgs) -> None:
        error = swallowed.exc_value
        if isinstance(error, KeyboardInterrupt | Terminated):
            number = signal.Signals[error.args[0]] if isinstance(error, Terminated) else signal.SIGINT
            timer = threading.Timer(RESEND, _send_again, (number,))
            timer.daemon = True
            timer.start()
        else:
            report(swallowed)

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
    """Defer signals inside the block, which must not be interrupted."""
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
    """Run a program and return its exit code: 130 or 143 if a signal terminated it."""
    try:
        with raised():
            return work()
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    except Terminated:
        return _report("terminated", 143)


def raise_it(number: int, frame: FrameType | None) -> None:
    """Signal handler that raises KeyboardInterrupt or Terminated."""
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


def _send_again(number: int) -> None:
    """Resend a signal. Runs in a timer thread; handlers run in the main thread."""
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
    """Replace the default and startup handlers, and return the replaced ones."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        return {}
    replaceable = (signal.SIG_DFL, signal.default_int_handler, _exit)
    before: dict[int, Any] = {n: h for n in SIGNALS if (h := signal.getsignal(n)) in replaceable}
    for number in before:
        signal.signal(number, handler)
    return before


def _is_starting() -> bool:
    """Return whether this process is `python -m fusion.NAME`, `python -m pipelines.NAME` or `fusion-NAME`."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":  # placeholder until Python has located the module
        words = sys.orig_argv
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
        return module.split(".")[0] in ("fusion", "pipelines")
    return os.path.basename(name).startswith("fusion-")
