"""The region at the foot of a terminal that is drawn anew and anew, while everything else goes above it.

Nothing is drawn by a thread: whoever has news asks for it, and a process that is forked from this one (a worker of
the data loader) finds no lock that is held for ever. The region is not there before the first part comes, and it
is wiped away with the last.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

from fusion.terminal.screen import console_of, is_terminal, writable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

INTERVAL = 0.1  # seconds between two drawings
PROGRESS = "FUSION_PROGRESS"  # environment: 0 draws nothing, in this process and in those that it starts

_shown: Display | None = None


def display() -> Display | None:
    """The one of this process; None where nobody looks at its stderr."""
    if _shown is not None:
        return _shown if _shown.is_own() else None
    wanted = os.environ.get(PROGRESS) != "0"
    return Display(sys.stderr) if wanted and is_terminal(sys.stderr) else None


def close() -> None:
    """Wipes away whatever is still drawn: however a run ends, the terminal is as it was."""
    if _shown is not None and _shown.is_own():
        _shown.clear()


class Display:
    """
    Args:
        stream: the terminal. While something is shown, what is written to it, and to a stdout that is a terminal
            too, goes above the region, line by line; so do log handlers that hold those streams already.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console = console_of(stream)
        self._parts: list[RenderableType] = []
        self._live: Live | None = None
        self._drawn = 0.0
        self._process = os.getpid()
        self._before: tuple[TextIO, TextIO] | None = None
        self._above: list[Above] = []

    def is_own(self) -> bool:
        """False in a process that was forked from the one that draws."""
        return os.getpid() == self._process

    def add(self, part: RenderableType) -> None:
        """Shows a part below those that are there."""
        global _shown
        _shown = self
        self._parts.append(part)
        self._start()
        self.refresh(now=True)

    def remove(self, part: RenderableType) -> None:
        """Takes a part away; one that is not there is nothing to complain about."""
        self._parts = [one for one in self._parts if one is not part]
        if self._parts:
            self.refresh(now=True)
        else:
            self.clear()

    def clear(self) -> None:
        """Takes everything away."""
        global _shown
        self._parts = []
        self._stop()
        if _shown is self:
            _shown = None

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Leaves the terminal to somebody else, such as another process, and draws again after it."""
        self._stop()
        try:
            yield
        finally:
            if self._parts:
                self._start()
                self.refresh(now=True)

    def refresh(self, now: bool = False) -> None:
        """Draws what there is, unless it was drawn a moment ago."""
        from rich.console import Group

        moment = time.monotonic()
        if self._live is None or not self.is_own() or (moment - self._drawn < INTERVAL and not now):
            return
        self._drawn = moment
        try:
            self._live.update(Group(*self._parts), refresh=True)
        except OSError:  # the terminal is gone, which is no reason to stop
            self._live = None

    def write_above(self, lines: list[str]) -> None:
        """Whole lines, as long as they are: a path that is longer than the terminal is wide can still be copied."""
        from rich.text import Text

        text = writable("\n".join(lines), self._stream)
        self._console.print(Text.from_ansi(text), soft_wrap=True)

    @property
    def draws(self) -> bool:
        return self._live is not None and self.is_own()

    def _start(self) -> None:
        from rich.console import Group
        from rich.live import Live

        if self._live is not None:
            return
        self._live = Live(
            Group(*self._parts),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._before = sys.stdout, sys.stderr
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            if is_terminal(stream):
                above = Above(stream, self)
                self._above.append(above)
                setattr(sys, name, above)
                _hand_over(stream, cast(TextIO, above))
        with contextlib.suppress(OSError):
            self._live.start()

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()
        if self._before is not None:
            for above in self._above:
                if sys.stdout is above:
                    sys.stdout = above.stream
                if sys.stderr is above:
                    sys.stderr = above.stream
                _hand_over(cast(TextIO, above), above.stream)
                above.let_go()
            self._above, self._before = [], None


class Above:
    """A stream of the terminal on which the region is drawn. Once it is not drawn any more, the stream itself."""

    def __init__(self, stream: TextIO, shown: Display) -> None:
        self.stream = stream
        self._shown = shown
        self._held = ""

    def write(self, text: str) -> int:
        if not self._shown.draws:
            return self.stream.write(text)
        *lines, rest = (self._held + text).split("\n")
        self._held = _last(rest)
        if lines:
            self._shown.write_above([_last(line.rstrip("\r")) for line in lines])
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def let_go(self) -> None:
        """Writes the line that was begun and not ended."""
        held, self._held = self._held, ""
        if held:
            with contextlib.suppress(OSError):
                self.stream.write(held)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _last(line: str) -> str:
    """What is to be seen of a line that goes back to its beginning, as other people's bars do."""
    return line.rpartition("\r")[2]


def _hand_over(old: TextIO, new: TextIO) -> None:
    """Every log handler that writes to the one stream writes to the other."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                with contextlib.suppress(AttributeError):  # one that asks for sys.stderr each time
                    handler.setStream(new)
