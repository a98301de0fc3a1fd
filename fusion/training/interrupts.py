"""SIGINT, SIGTERM and the signals of a scheduler, put off until what was earned is on the disk."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from fusion.runs.signals import ECHO, SIGNALS, Forward, Terminated

log = logging.getLogger(__name__)


class Interrupts:
    """While it is armed, a first signal only sets `pending`; a second one, later than `ECHO`, acts at once.

    What a signal does in the end is what it would have done: Ctrl-C raises KeyboardInterrupt, SIGTERM raises
    Terminated, submitit's handler asks for another turn and ends the process. A scheduler's signal that nobody
    handles ends the run like SIGTERM. Handlers that were there before come back at the end.
    """

    def __init__(self) -> None:
        self.pending: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # nobody else may handle signals
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            # None: it was set outside Python. Ignored: the user wants it to be, as nohup does.
            self._before = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN)}
        return self

    def arm(self) -> None:
        """Put signals off from now on.

        A rank that forwards its signals still does so at once: it has nothing to save, and the process that started
        it stops all ranks.
        """
        for number, handler in self._before.items():
            if not isinstance(handler, Forward):
                signal.signal(number, self._put_off)

    def obey(self) -> None:
        """Do what the pending signal asks for, if there is one. Returns where it asks for nothing."""
        if self.pending is None:
            return
        number, self.pending = self.pending, None
        self._act(number, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            self.obey()

    def _put_off(self, number: int, frame: FrameType | None) -> None:
        if self.pending is None:
            self.pending, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            self._act(signal.Signals(number), frame)

    def _act(self, number: signal.Signals, frame: FrameType | None) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)
        else:
            raise Terminated(number.name)
