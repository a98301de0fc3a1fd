"""Defer SIGINT, SIGTERM and the signals of schedulers until a checkpoint has been written."""

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
    """Once armed, the first signal only sets `pending`; a second one, later than `ECHO` seconds, is handled at once.

    `obey` calls the previous handler: Ctrl-C raises KeyboardInterrupt, SIGTERM raises Terminated, submitit's handler
    requeues the job. A scheduler's signal without a handler ends the run like SIGTERM. The previous handlers are
    restored at the end.
    """

    def __init__(self) -> None:
        self.pending: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            # None: set outside Python. SIG_IGN: the user wants it ignored, as with nohup.
            self._before = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN)}
        return self

    def arm(self) -> None:
        """Defer signals from now on, except those that a rank forwards to the process that started it."""
        for number, handler in self._before.items():
            if not isinstance(handler, Forward):
                signal.signal(number, self._defer)

    def obey(self) -> None:
        """Call the handler of the pending signal, if there is one."""
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

    def _defer(self, number: int, frame: FrameType | None) -> None:
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
