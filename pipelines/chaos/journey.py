"""Undisturbed runs first, then the same ones with deaths in between, and whether both end with the same bits."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.errors import UserError
from pipelines.chaos.attempts import Attempt, course_of, last_words, make_attempt
from pipelines.chaos.config import ChaosConfig
from pipelines.chaos.plan import PLACES, Chain, Course, Kill, Plan
from pipelines.chaos.victims import Starter
from pipelines.chaos.work import KINDS, NAME, PREPARATIONS, Kind, write_work
from pipelines.commands import say, typed

if TYPE_CHECKING:
    from fusion.store.artifacts import Artifact

EQUAL = "equal"
_OTHER = "another artifact than the old and the new one was read"
_MARK = ".chaos"  # in a folder that is chaos's own


@dataclass
class Death:
    """A kill that was meant, whether it came, and where the next attempt went on; None: there was none."""

    kill: Kill
    came: bool
    resumed: str | None = None


@dataclass
class Outcome:
    """How a run with deaths ended: `equal`, `DIFFERENT: …` or `failed: …`."""

    chain: Chain
    outcome: str
    deaths: list[Death]
    seconds: float


@dataclass
class Journey:
    """All of it, in the folder `config.output`."""

    config: ChaosConfig
    starter: Starter
    stop: threading.Event = field(default_factory=threading.Event)
    courses: dict[str, Course] = field(default_factory=dict)
    expected: dict[str, Artifact] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.config.output).absolute()

    @property
    def kinds(self) -> dict[str, Kind]:
        return {name: KINDS[name] for name in self.config.kinds or KINDS}

    def run(self) -> Iterator[Outcome]:
        """Each run with its deaths, as it is done, until there were enough of them.

        Raises:
            UserError: the folder is somebody else's, an undisturbed run failed, or a place was never reached.
        """
        self._clear()
        write_work(self.folder / "work")
        kinds = self.kinds
        needed = sorted({name for kind in kinds.values() for name in (*kind.needs, *kind.beside)})
        say(
            f"{len(kinds)} kinds of runs, undisturbed"
            + (f"; what they need: {', '.join(needed)}" if needed else "")
        )
        with ThreadPoolExecutor(self.config.jobs) as pool:
            try:
                for _ in pool.map(self._prepare, needed):
                    pass
                for name, course, artifact in pool.map(self._undisturbed, kinds.values()):
                    self.courses[name], self.expected[name] = course, artifact
                if not self.config.kinds:
                    self._check_places()
                yield from self._disturbed(pool)
            except BaseException:  # a Ctrl-C, or whoever reads this has had enough
                self.stop.set()
                raise

    def _clear(self) -> None:
        """Takes the folder: a new journey starts afresh, where an earlier one was."""
        if not Path("/proc/self/fd").is_dir():
            raise UserError("chaos finds out which file is written from /proc: it needs Linux")
        mark = self.folder / _MARK
        if self.folder.exists() and not mark.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"output={self.config.output}: something else is there, and what chaos makes takes its place; "
                "expected an empty folder, a new one, or one of an earlier chaos"
            )
        for part in ("work", "preparations", "undisturbed", "runs"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def _disturbed(self, pool: ThreadPoolExecutor) -> Iterator[Outcome]:
        chains = Plan(self.kinds, self.courses, self.config.seed).chains()
        running: dict[Future[Outcome], int] = {}
        came = 0
        while came < self.config.kills or running:
            while len(running) < self.config.jobs and came + sum(running.values()) < self.config.kills:
                chain = next(chains)
                running[pool.submit(self._chain, chain)] = len(chain.kills)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
                outcome = future.result()
                came += sum(death.came for death in outcome.deaths)
                yield outcome

    def _prepare(self, name: str) -> None:
        self._whole(PREPARATIONS[name], "preparations")

    def _undisturbed(self, kind: Kind) -> tuple[str, Course, Artifact]:
        from fusion.store.artifacts import load

        folder, attempt = self._whole(kind, "undisturbed")
        return kind.name, course_of(folder, 1, attempt.seconds), load(NAME, folder / "store")

    def _whole(self, kind: Kind, where: str) -> tuple[Path, Attempt]:
        folder = self.folder / where / kind.name
        self._furnish(kind, folder)
        command = kind.command(self.config.backbone)
        attempt = make_attempt(self.starter, folder, 1, command, None, lambda: None, self.stop)
        if attempt.code != 0:
            raise UserError(
                f"an undisturbed run failed: {typed(command[0], command[1:])}\n"
                f"{last_words(folder, 1)} (all it said: {folder / 'output-1.txt'})"
            )
        say(f"  {kind.name}: {attempt.seconds:.1f} s")
        return folder, attempt

    def _furnish(self, kind: Kind, folder: Path) -> None:
        folder.mkdir(parents=True)
        for need in kind.needs:
            name = NAME if need == "older" else need
            shutil.copytree(self.folder / "preparations" / need / "store" / name, folder / "store" / name)

    def _check_places(self) -> None:
        reached = {
            place for course in self.courses.values() for counts in course.visits.values() for place in counts
        }
        never = [place for place in PLACES[:-2] if place not in reached]
        if never:
            raise UserError(
                f"no undisturbed run came by: {', '.join(never)}.\n"
                "Files or methods have other names now: mend pipelines/chaos/fate.py"
            )

    def _chain(self, chain: Chain) -> Outcome:
        """One run with its deaths: the same command again and again until it ends by itself."""
        started = time.monotonic()
        folder = self.folder / "runs" / f"{chain.number:03d}"
        self._furnish(chain.kind, folder)
        command = chain.kind.command(self.config.backbone)
        look = self._looker(chain.kind, folder)
        deaths: list[Death] = []
        outcome = None
        for number, kill in enumerate([*chain.kills, None], 1):
            attempt = make_attempt(self.starter, folder, number, command, kill, look, self.stop)
            if deaths:
                deaths[-1].resumed = attempt.went_on
            if kill is not None:
                came = attempt.struck is not None
                deaths.append(Death(replace(kill, whom=attempt.struck or kill.whom), came))
            ended = attempt.struck is None and attempt.code == 0
            if attempt.problems and not (
                ended and attempt.problems == [_OTHER]
            ):  # that one is told in detail
                outcome = f"failed: {'; '.join(attempt.problems)} (attempt {number})"
            elif attempt.struck is None and not ended:
                outcome = f"failed: attempt {number} ended with {attempt.code}: {last_words(folder, number)}"
            if outcome is not None or attempt.struck is None:
                break
        outcome = outcome or self._compare(chain.kind, folder)
        if outcome == EQUAL:
            shutil.rmtree(folder, ignore_errors=True)
        return Outcome(chain, outcome, deaths, time.monotonic() - started)

    def _looker(self, kind: Kind, folder: Path) -> Callable[[], str | None]:
        """Reads the artifact as somebody else would, at any time: it is whole, the old or the new one, or not there."""
        from fusion.store.artifacts import load

        store = folder / "store"
        new = _sums(self.expected[kind.name])
        old = _sums(load(NAME, store)) if kind.overwrites else None

        def look() -> str | None:
            try:
                found = _sums(load(NAME, store))
            except UserError as error:
                if old is None and str(error).startswith(f"no artifact '{NAME}'"):
                    return None
                return f"the store was read and said: {error}"
            return None if found in (new, old) else _OTHER

        return look

    def _compare(self, kind: Kind, folder: Path) -> str:
        from fusion.store.artifacts import load

        expected = self.expected[kind.name]
        try:
            found = load(NAME, folder / "store")
        except UserError as error:
            return f"failed: {error}"
        different = [file for file, sums in _sums(expected).items() if _sums(found)[file] != sums]
        for key in ("metrics", "best_epoch", "epochs"):
            here, there = (artifact.manifest.content["result"][key] for artifact in (found, expected))
            if here != there:
                different.append(f"{key} {here}, not {there}")
        if different:
            return f"DIFFERENT: {'; '.join(different)}"
        left = [
            str(path.relative_to(folder))
            for part in ("store/.staging", "store/.runs")
            for path in sorted((folder / part).glob("*"))
        ]
        return f"failed: left over: {', '.join(left)}" if left else EQUAL


def _sums(artifact: Artifact) -> dict[str, object]:
    """The hash of each file of weights: equal ones have equal bytes."""
    return {name: file.sha256 for name, file in artifact.manifest.files.items()}
