"""The bars: a sweep's, a training's, and one over rows. On anything but a terminal there is none."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fusion.terminal.display import Display, display
from fusion.text import one_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.progress import ProgressColumn

SWEEP = "FUSION_SWEEP_BAR"  # environment of a job's own processes: how the sweep stands, "3 8 2 0"
WINDOW = 50  # batches over which a rate is taken

_sweep: SweepBar | None = None


class Bar:
    """A bar of rich's, of which a narrow terminal shows less.

    Args:
        total: of the work; None: not known.
        levels: widths, widest first, with the columns that fit from there on: "bar:20", "left", else a format of
            the task's fields.
    """

    def __init__(self, total: float | None, levels: dict[int, tuple[str, ...]], **fields: Any) -> None:
        from rich.progress import Progress

        self._levels = {width: [_column(text) for text in texts] for width, texts in levels.items()}
        self._progress = Progress(auto_refresh=False)
        self._task = self._progress.add_task("", total=total, **fields)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = [columns for width, columns in self._levels.items() if width <= options.max_width]
        self._progress.columns = tuple(fitting[0] if fitting else list(self._levels.values())[-1])
        yield self._progress.make_tasks_table(self._progress.tasks)

    def set(self, **values: Any) -> None:
        """`completed=`, `total=` and the fields."""
        self._progress.update(self._task, **values)


def _column(text: str) -> ProgressColumn:
    from rich.progress import BarColumn, Task, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Left(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            return super().render(task) + Text(" left")

    if text == "left":
        return Left(table_column=Column(no_wrap=True))
    if text.startswith("bar:"):
        return BarColumn(bar_width=int(text.removeprefix("bar:")))
    return TextColumn(text, markup=False)


def _field(name: str) -> str:
    return "{task.fields[" + name + "]}"


class SweepBar:
    """Which job of how many it is, and how those before it ended."""

    def __init__(self, jobs: int, shown: Display, number: int = 0, done: int = 0, failed: int = 0) -> None:
        self._jobs, self._shown = jobs, shown
        self.number, self.done, self.failed = number, done, failed
        text = _field("text")
        self._bar = Bar(jobs, {60: ("sweep", "bar:20", text), 0: (text,)}, text="")
        self._set()
        shown.add(self._bar)

    def begins(self) -> None:
        """The next job."""
        self.number += 1
        self._set()

    def ends(self, failed: bool) -> None:
        """The job that began."""
        self.done, self.failed = self.done + (not failed), self.failed + failed
        self._set()

    def close(self) -> None:
        self._shown.remove(self._bar)

    def as_text(self) -> str:
        return f"{self.number} {self._jobs} {self.done} {self.failed}"

    def _set(self) -> None:
        said = f"job {max(1, self.number)} of {self._jobs}, {self.done} done, {self.failed} failed"
        self._bar.set(completed=self.done + self.failed, text=said)
        self._shown.refresh(now=True)


def begin_sweep(jobs: int) -> None:
    """Shows a sweep's bar from now on, where somebody looks on."""
    global _sweep
    if (shown := display()) is not None:
        _sweep = SweepBar(jobs, shown)


def sweep_bar() -> SweepBar | None:
    """The one of this process's sweep."""
    return _sweep


def end_sweep() -> None:
    global _sweep
    if _sweep is not None:
        _sweep.close()
    _sweep = None


@contextlib.contextmanager
def handed_over() -> Iterator[None]:
    """Leaves the terminal to the processes of a job; they are told how the sweep stands."""
    shown = display()
    if shown is None:
        yield
        return
    if _sweep is not None:
        os.environ[SWEEP] = _sweep.as_text()
    try:
        with shown.hidden():
            yield
    finally:
        os.environ.pop(SWEEP, None)


class TrainingBar:
    """Of one training: what, which epoch, the score so far, how fast, how long still.

    Args:
        total: batches of the whole training, those of its evaluations too.
        epochs: how many there will be at most.
    """

    def __init__(self, name: str, total: int, epochs: int, shown: Display) -> None:
        self._shown, self._epochs = shown, epochs
        self._rate = Rate()
        name_, epoch, score, best, speed = map(_field, ("name", "epoch", "score", "best", "speed"))
        levels: dict[int, tuple[str, ...]] = {
            110: (name_, "bar:20", epoch, score, best, speed, "left"),
            88: (name_, "bar:10", epoch, score, speed, "left"),
            60: (name_, epoch, score, "left"),
            30: (epoch, "left"),
            0: (epoch,),
        }
        fields = {"name": _short(name), "epoch": f"epoch 1/{epochs}", "score": "", "best": "", "speed": ""}
        self._above: SweepBar | None = None
        if (said := os.environ.get(SWEEP)) is not None:  # a rank of a sweep's job
            number, jobs, done, failed = map(int, said.split())
            self._above = SweepBar(jobs, shown, number, done, failed)
        self._bar = Bar(total, levels, **fields)
        shown.add(self._bar)

    def trains(self, completed: int, epoch: int, tokens: int, seconds: float) -> None:
        """A batch was trained on; `tokens` of all processes, `completed` of `total`."""
        self._rate.add(tokens, seconds)
        self._bar.set(completed=completed, epoch=f"epoch {epoch}/{self._epochs}", speed=self._rate.shown())
        self._shown.refresh()

    def evaluates(self, completed: int) -> None:
        """A batch was scored."""
        self._bar.set(completed=completed)
        self._shown.refresh()

    def scores(self, metric: str, value: float, best: float) -> None:
        """The score of the last evaluation, and the best one so far."""
        self._bar.set(score=f"{metric} {value:.4f}", best=f"(best {best:.4f})")
        self._shown.refresh(now=True)

    def close(self) -> None:
        self._shown.remove(self._bar)
        if self._above is not None:
            self._above.close()


class RowsBar:
    """Of rows that go through a model once: how many, how fast, how long still."""

    def __init__(self, name: str, rows: int, shown: Display) -> None:
        self._shown, self._rows, self._done = shown, rows, 0
        self._rate, self._last = Rate(), time.monotonic()
        name_, done, speed = map(_field, ("name", "done", "speed"))
        levels: dict[int, tuple[str, ...]] = {
            76: (name_, "bar:20", done, speed, "left"),
            50: (name_, done, "left"),
            0: (done, "left"),
        }
        self._bar = Bar(rows, levels, name=_short(name), done=f"0/{rows} rows", speed="")
        shown.add(self._bar)

    def advance(self, rows: int, tokens: int) -> None:
        """A batch went through."""
        now = time.monotonic()
        self._rate.add(tokens, now - self._last)
        self._last, self._done = now, self._done + rows
        self._bar.set(
            completed=self._done, done=f"{self._done:,}/{self._rows:,} rows", speed=self._rate.shown()
        )
        self._shown.refresh()

    def close(self) -> None:
        self._shown.remove(self._bar)


@contextlib.contextmanager
def rows_bar(name: str, rows: int) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over rows while the work inside lasts: what is to be told of each batch; None where nobody looks on."""
    shown = display()
    if shown is None:
        yield None
        return
    bar = RowsBar(name, rows, shown)
    try:
        yield bar.advance
    finally:
        bar.close()


def training_bar(name: str, total: int, epochs: int) -> TrainingBar | None:
    """A bar over a training; None where nobody looks on."""
    shown = display()
    return None if shown is None else TrainingBar(name, total, epochs, shown)


class Rate:
    """Tokens a second over the last batches."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def add(self, tokens: int, seconds: float) -> None:
        self._seen.append((tokens, seconds))

    def shown(self) -> str:
        seconds = sum(seconds for _, seconds in self._seen)
        return f"{sum(tokens for tokens, _ in self._seen) / seconds:,.0f} tokens/s" if seconds > 0 else ""


def _short(name: str, longest: int = 32) -> str:
    name = one_line(name).encode("ascii", "backslashreplace").decode()  # a file's name may be anything
    return name if len(name) <= longest else f"{name[: longest - 3]}..."
