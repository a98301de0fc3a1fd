"""Run each kind of command uninterrupted and with kills, and compare the results bitwise."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.errors import UserError
from pipelines.commands import say, typed
from tests.crash.attempts import Attempt, make_attempt
from tests.crash.plan import PHASE, Kill, Plan, Profile
from tests.crash.workload import KINDS, NAME, PREPARATIONS, Kind, write_work

if TYPE_CHECKING:
    from fusion.store.artifacts import Artifact

EQUAL = "equal"
_MARK = ".crash-trial"  # marks a directory created by an earlier crash test


@dataclass
class Death:
    """A planned kill, whether it happened, and where the next attempt resumed."""

    kill: Kill
    happened: bool
    resumed: str | None = None

    def __str__(self) -> str:
        return f"{self.kill} → {self.resumed}" if self.happened else f"({self.kill}: not reached)"


@dataclass
class Outcome:
    """Result of a run with kills: `equal`, or an error message."""

    number: int
    kind: Kind
    deaths: list[Death]
    outcome: str
    seconds: float

    def __str__(self) -> str:
        deaths = "; ".join(map(str, self.deaths))
        return f"{self.number} {self.kind.name}: {deaths}: {self.outcome} ({self.seconds:.0f} s)"


@dataclass
class Trial:
    """All runs of a crash test, in the directory `output`.

    Attributes:
        python: interpreter that runs the commands.
        kinds: names of `KINDS`.
        jobs: number of concurrent runs.
    """

    output: Path
    python: str
    kinds: list[str]
    kills: int = 100
    jobs: int = 2
    seed: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    profiles: dict[str, Profile] = field(default_factory=dict)
    expected: dict[str, Artifact] = field(default_factory=dict)

    def run(self) -> Iterator[Outcome]:
        """Yield the outcome of each run when it ends, until there were `kills` kills.

        Raises:
            UserError: if the directory contains other files, an uninterrupted run failed, or a fault point was never
                reached.
        """
        self._clear()
        write_work(self.output / "work")
        kinds = [KINDS[name] for name in self.kinds]
        needed = sorted({name for kind in kinds for name in (*kind.copies, *kind.reads)})
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                list(pool.map(lambda name: self._undisturbed(PREPARATIONS[name], "preparations"), needed))
                list(pool.map(self._expect, kinds))
                if len(kinds) == len(KINDS):
                    self._check_places()
                yield from self._disturbed(pool, kinds)
            except BaseException:  # a signal, or the caller stopped iterating
                self.stop.set()
                raise

    def _clear(self) -> None:
        if not Path("/proc/self/fd").is_dir():
            raise UserError("crash tests require Linux, since they read open files from /proc")
        mark = self.output / _MARK
        if self.output.exists() and not mark.exists() and any(self.output.iterdir()):
            raise UserError(f"output={self.output}: expected a new or empty directory, or one of an earlier crash test")
        for part in ("work", "preparations", "undisturbed", "runs"):
            shutil.rmtree(self.output / part, ignore_errors=True)
        self.output.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def _disturbed(self, pool: ThreadPoolExecutor, kinds: list[Kind]) -> Iterator[Outcome]:
        plan = Plan(self.profiles, self.seed)
        running: dict[Future[Outcome], int] = {}
        number = happened = 0
        while happened < self.kills or running:
            while len(running) < self.jobs and happened + sum(running.values()) < self.kills:
                kind = kinds[number % len(kinds)]
                kills, number = plan.kills(kind), number + 1
                running[pool.submit(self.run_with_deaths, number, kind, kills)] = len(kills)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
                happened += sum(death.happened for death in future.result().deaths)
                yield future.result()

    def _undisturbed(self, kind: Kind, where: str) -> Attempt:
        own = self._prepare(kind, self.output / where / kind.name) / "attempt-1"
        attempt = make_attempt(self.python, own, kind.command, None, lambda: None, self.stop)
        if attempt.code != 0:
            raise UserError(
                f"an uninterrupted run failed: {typed(kind.command[0], kind.command[1:])}\n"
                f"{attempt.last_line} (output: {own / 'output.txt'})"
            )
        say(f"  {kind.name}, uninterrupted: {attempt.seconds:.1f} s")
        return attempt

    def _expect(self, kind: Kind) -> None:
        from fusion.store.artifacts import load

        attempt = self._undisturbed(kind, "undisturbed")
        self.profiles[kind.name] = attempt.profile
        self.expected[kind.name] = load(NAME, attempt.folder.parent / "store")

    def _prepare(self, kind: Kind, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name in kind.copies:
            artifact = NAME if name == "older" else name
            made = self.output / "preparations" / name / "store" / artifact
            shutil.copytree(made, folder / "store" / artifact)
        return folder

    def _check_places(self) -> None:
        never = [place for place in PHASE if not any(p.visits.get(place) for p in self.profiles.values())]
        if never:
            raise UserError(
                f"fault points that no uninterrupted run reached: {', '.join(never)}\n"
                "If files or methods were renamed, update tests/crash/faults.py"
            )

    def run_with_deaths(self, number: int, kind: Kind, kills: list[Kill]) -> Outcome:
        """Run a command repeatedly until it is not killed. Its directory is removed if the result is identical."""
        started = time.monotonic()
        folder = self._prepare(kind, self.output / "runs" / f"{number:03d}")
        reader = StoreReader(folder / "store", self.expected[kind.name], "older" in kind.copies)
        deaths: list[Death] = []
        for count, kill in enumerate([*kills, None], 1):
            own = folder / f"attempt-{count}"
            attempt = make_attempt(self.python, own, kind.command, kill, reader.problem, self.stop)
            if deaths:
                deaths[-1].resumed = attempt.resumed
            if kill is not None:
                target = attempt.killed or kill.target
                deaths.append(Death(replace(kill, target=target), attempt.killed is not None))
            if attempt.killed is None or attempt.problems:
                break
        if attempt.code != 0:
            problems = attempt.problems or [f"exit code {attempt.code}: {attempt.last_line}"]
        else:
            problems = reader.differences() or attempt.problems
        outcome = f"attempt {count}: {'; '.join(problems)}" if problems else EQUAL
        if outcome == EQUAL:
            shutil.rmtree(folder, ignore_errors=True)
        return Outcome(number, kind, deaths, outcome, time.monotonic() - started)


class StoreReader:
    """Read the artifact of a run concurrently, as another program may do at any time.

    Args:
        overwrites: whether the store contains an older artifact of the same name.
    """

    def __init__(self, store: Path, expected: Artifact, overwrites: bool) -> None:
        self.store, self.expected = store, expected
        self._old = _hashes(self._load()) if overwrites else None

    def _load(self) -> Artifact:
        from fusion.store.artifacts import load

        return load(NAME, self.store)

    def problem(self) -> str | None:
        """Return an error message unless the store contains the complete old or new artifact (or there was no old one)."""
        if self._old is None and not (self.store / NAME).exists():
            return None
        try:
            found = _hashes(self._load())
        except UserError as error:
            return f"the store could not be read: {error}"
        return None if found in (_hashes(self.expected), self._old) else "the store contained an unexpected artifact"

    def differences(self) -> list[str]:
        """Return the differences between the store after the run and the expected one."""
        try:
            found = self._load()
        except UserError as error:
            return [str(error)]
        expected = _hashes(self.expected)
        different = [f"{file} differs" for file, sha256 in _hashes(found).items() if expected[file] != sha256]
        for key in ("metrics", "best_epoch", "epochs"):
            here, there = (a.manifest.content["result"][key] for a in (found, self.expected))
            if here != there:
                different.append(f"{key}: {here}, expected {there}")
        left = [p for part in (".staging", ".runs") for p in (self.store / part).glob("*")]
        return different + [f"{path.relative_to(self.store)} is left over" for path in left]


def _hashes(artifact: Artifact) -> dict[str, object]:
    """Return the SHA-256 hash of each weights file."""
    return {name: file.sha256 for name, file in artifact.manifest.files.items()}


def summary(outcomes: list[Outcome]) -> str:
    """Return the number of kills by fault point, and the number of runs with identical results."""
    deaths = [death for outcome in outcomes for death in outcome.deaths if death.happened]
    places = Counter(death.kill.place for death in deaths)
    equal = sum(outcome.outcome == EQUAL for outcome in outcomes)
    lines = [f"{count:>5}  {place}" for place, count in places.most_common()]
    lines.append(f"{len(deaths)} kills in {len(outcomes)} runs; {equal} runs bitwise identical to an uninterrupted run")
    return "\n".join(lines)


def write_results(path: Path, outcomes: list[Outcome]) -> None:
    """Write all outcomes as JSON."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.number)
    content = [vars(outcome) | {"command": outcome.kind.command} for outcome in ordered]
    path.write_text(json.dumps(content, default=vars, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
