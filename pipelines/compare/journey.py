"""The comparison itself: sources, then row after row, then inference in turn. What fails is said and left out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.runs.run import describe
from fusion.store.layout import is_name
from fusion.store.lookup import names, read_manifest
from fusion.store.manifest import Manifest
from pipelines.commands import Outcome, attempt, say, typed
from pipelines.compare.config import Settings, key_of, tasks
from pipelines.compare.plan import (
    SOURCE_RATE,
    Member,
    Training,
    recorded_words,
    row_training,
    seed_suffix,
    source_name,
    source_trainings,
)
from pipelines.compare.rows import GROUPS, Row
from pipelines.compare.scores import RowResult, row_result

TIMING = "pipelines.compare.inference"
REFUSED = 2
# Words that name another row's artifact: they change with that row's best rate, and this row with them.
DERIVED = ("sources", "composition.fusion")

JOB = re.compile(r"^job \d+ \(.*?\): ")  # how the refusal of a sweep begins: with the first job that is wrong


@dataclass(frozen=True)
class Failure:
    """What did not come about and why, in one line.

    id: of a row or a source. what: all of it ("row", "source"), or the part that its line in the table lacks.
    """

    id: str
    what: str
    reason: str


@dataclass
class Compared:
    """All that a comparison gives.

    inference: the bare backbone's part of the timing and how it was done; empty where there is none.
    notes: what a reader must know beside the table.
    """

    rows: list[RowResult] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    inference: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    source_commands: list[str] = field(default_factory=list)  # what made each source, as its manifest says


class Journey:
    """One comparison, step by step."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sources = settings.config.sources
        self.store = settings.store
        self.compared = Compared()
        self.dropped_are_there = False

    def run(self) -> Compared:
        """Train what is missing, time it, and give what there is then.

        Raises:
            SystemExit: interrupted (130, 143), or the first command was refused (2), and so would all others be.
        """
        rows = self.settings.rows
        asked = self.settings.config.methods
        extra = [row.id for row in rows if asked and row.id not in asked]
        if extra:
            say(f"methods: {', '.join(extra)} as well, which others of them are made from")
        if self.settings.need_sources:
            self.get_sources()
        for number, row in enumerate(rows, 1):
            say(f"\n[{number}/{len(rows)}] {row.id}: {row.title}")
            try:
                self.get_row(row)
            except (
                UserError,
                KeyError,
            ) as error:  # a manifest that lacks what the table shows is one row's fault
                self.fail(row.id, "row", describe(error))
        self.compared.rows.sort(key=lambda result: GROUPS.index(result.group))
        self.compared.source_commands = self.source_commands()
        if self.compared.rows:
            say("\ninference")
            self.time_inference()
        return self.compared

    def fail(self, id: str, what: str, reason: str) -> None:
        failure = Failure(id, what, one_line(reason))
        self.compared.failures.append(failure)
        say(f"FAILED {failure.id}, {failure.what}: {failure.reason}")

    # --- sources --------------------------------------------------------------------------------------

    def check_sources(self) -> None:
        """Refuse, before anything runs, a source that is neither stored nor a task.

        Raises:
            UserError: names it, and what there is.
        """
        known = tasks()
        for source in self.sources if self.settings.need_sources else []:
            if not self.has_source(source) and source not in known:
                raise UserError(
                    f"sources: {source} is neither an adapter in {self.store} "
                    f"({', '.join(names(self.store)) or 'empty'}) nor a task to train one on; an adapter of another "
                    f"store counts once its folder is copied there.\nTasks: {', '.join(known)}"
                )

    def get_sources(self) -> None:
        """Train the sources that are not there."""
        there = [source for source in self.sources if self.has_source(source)]
        lacking = [source for source in self.sources if source not in there]
        say(f"\nsources: {', '.join(self.sources)}")
        if there:
            say(f"in the store already: {', '.join(there)}")
        for source in there:
            self.note_other_settings(source)
        self.train_sources(source_trainings(self.settings, lacking))

    def get_dropped(self) -> list[str]:
        """The names of the sources with AdapterDrop; those that are not there are trained.

        Raises:
            UserError: one of them could not be had.
        """
        half = self.half()
        needed = self.source_tasks()
        dropped = [source_name(task, half) for task in needed]
        if not self.dropped_are_there:
            self.dropped_are_there = True
            lacking = [task for task in needed if not self.has_source(source_name(task, half))]
            self.train_sources(source_trainings(self.settings, lacking, drop=half))
        return self.available(dropped)

    def train_sources(self, trainings: Sequence[Training]) -> None:
        for training in trainings:
            reasons, outcome = self.train(training)
            for name, reason in reasons.items():
                self.fail(name, "source", reason)
            if outcome.code == REFUSED and not names(self.store):
                raise SystemExit(REFUSED)

    def has_source(self, source: str) -> bool:
        return is_name(source) and source in names(self.store)

    def available(self, sources: list[str]) -> list[str]:
        missing = [source for source in sources if not self.has_source(source)]
        if missing:
            raise UserError(f"made from {', '.join(missing)}, which could not be trained")
        return sources

    def source_tasks(self) -> list[str]:
        """The sources' tasks: what the manifest says, or the name of what is not stored."""
        found = [
            str(read_manifest(source, self.store).task.name) if self.has_source(source) else source
            for source in self.sources
        ]
        return list(dict.fromkeys(found))

    def source_commands(self) -> list[str]:
        sources = list(self.sources) if self.settings.need_sources else []
        if self.dropped_are_there:
            sources += [source_name(task, 0) for task in self.source_tasks()]
        made = [read_manifest(source, self.store).run for source in sources if self.has_source(source)]
        return [typed("fusion.stage1", [w.replace("\\", "") for w in run.overrides]) for run in made]

    def half(self) -> int:
        """Half of the backbone's layers."""
        stored = [source for source in self.sources if self.has_source(source)] or self.available(
            self.sources
        )
        return int(read_manifest(stored[0], self.store).backbone.layers) // 2

    def note_other_settings(self, source: str) -> None:
        """A stored source is taken as it is; a reader is told where it was made with something else."""
        manifest, config = read_manifest(source, self.store), self.settings.config
        asked = {"trainer.max_epochs": config.source_epochs, "optim.lr": SOURCE_RATE}
        if manifest.task.name != self.settings.target or self.settings.word("data.limit.train") is None:
            asked["data.limit.train"] = config.source_rows
        made = manifest.run.config
        others = [f"{key}={made.get(key)}" for key, value in asked.items() if made.get(key) != value]
        if others:
            self.compared.notes.append(f"Source {source} is taken as it was: {', '.join(others)}.")

    # --- rows -----------------------------------------------------------------------------------------

    def get_row(self, row: Row) -> None:
        """Train a row where it is not stored already, and read what it gave.

        Raises:
            UserError: what it is made from is not there.
        """
        training = row_training(self.settings, row, self.filled(row))
        reasons: dict[str, str] = {}
        if self.is_current(training):
            say(f"nothing to train: stored already as {', '.join(m.name for m in training.members)}")
        else:
            again = ("overwrite=true",) if self.is_stale(row, training) else ()
            reasons, _ = self.train(replace(training, overrides=(*training.overrides, *again)))
        result = row_result(row, training, self.store, self.settings.target, without=reasons.keys())
        if result is None:
            self.fail(row.id, "row", next(iter(reasons.values()), "its command stored nothing"))
            return
        self.compared.rows.append(result)
        for member in training.members:
            if member.name in reasons:
                self.fail(row.id, f"rate {member.rate:g}, seed {member.seed}", reasons[member.name])

    def filled(self, row: Row) -> dict[str, str]:
        """What stands in the row's words in place of those in braces.

        Raises:
            UserError: it could not be had.
        """
        values = {}
        for blank in row.blanks:
            if blank == "half":
                values[blank] = str(self.half())
            elif blank == "keep":
                values[blank] = str(max(1, min(2, len(self.sources) - 1)))
            elif blank == "sources":
                values[blank] = ",".join(self.available(self.sources))
            elif blank == "dropped":
                values[blank] = ",".join(self.get_dropped())
            elif blank == "tasks":
                values[blank] = ",".join(dict.fromkeys([*self.source_tasks(), self.settings.target]))
            else:
                values[blank] = self.best_of(blank)
        return values

    def best_of(self, id: str) -> str:
        """What a row's best artifact is called, for every seed."""
        for result in self.compared.rows:
            if result.id == id:
                rate = "" if result.rate is None else f"-lr-{result.rate}"
                return f"{self.settings.target}-{id}{rate}{seed_suffix(self.settings)}"
        raise UserError(f"made from {id}, which failed")

    def is_current(self, training: Training) -> bool:
        """Whether all its artifacts are stored, by these very words and from the sources as they are now."""
        for member in training.members:
            manifest = self.stored(member)
            if manifest is None or self.sources_changed(manifest):
                return False
            if recorded_words(manifest.run.overrides) != member.words:
                return False
        return True

    def is_stale(self, row: Row, training: Training) -> bool:
        """Whether one of its artifacts was made from something that has become another since."""
        for member in training.members:
            manifest = self.stored(member)
            if manifest is None:
                continue
            others = recorded_words(manifest.run.overrides) ^ member.words
            renamed = bool(row.needs and others) and all(key_of(word) in DERIVED for word in others)
            if renamed or self.sources_changed(manifest):
                return True
        return False

    def stored(self, member: Member) -> Manifest | None:
        return read_manifest(member.name, self.store) if member.name in names(self.store) else None

    def sources_changed(self, manifest: Manifest) -> bool:
        stored = names(self.store)
        return any(
            source.name in stored and read_manifest(source.name, self.store).hash != source.hash
            for source in manifest.sources
        )

    def train(self, training: Training) -> tuple[dict[str, str], Outcome]:
        """Run a sweep; gives how it ended, and why for each of its artifacts that did not come about."""
        before = stamps(training.folder)
        outcome = attempt(training.module, list(training.overrides))
        new = [file for file, stamp in stamps(training.folder).items() if before.get(file) != stamp]
        told = [json.loads(file.read_text(encoding="utf-8")) for file in new]
        statuses = {str(status["name"]): status for status in told}
        reasons = {}
        for member in training.members:
            status = statuses.get(member.name)
            if status is None and outcome.code != 0:
                reasons[member.name] = last_words(outcome)
            elif status is not None and status["status"] != "done":
                reasons[member.name] = str(status["error"] or status["status"])
        if not reasons:
            say(f"done in {outcome.seconds:.0f} s")
        return reasons, outcome

    # --- inference ------------------------------------------------------------------------------------

    def time_inference(self) -> None:
        """Time the best artifact of every row, in a process of its own; kept until an artifact changes."""
        file = self.settings.output / "inference.json"
        by_artifact = {result.artifacts[0]: result for result in self.compared.rows}
        hashes = {name: read_manifest(name, self.store).hash for name in by_artifact}
        timed = self.timed_before(file, hashes)
        if timed is not None:
            say("nothing to time: the artifacts are those of an earlier run")
        else:
            file.unlink(missing_ok=True)
            outcome = attempt(TIMING, self.timing_words(list(by_artifact), file))
            if outcome.code != 0 or not file.is_file():
                self.fail("inference", "all rows", last_words(outcome))
                return
            timed = json.loads(file.read_text(encoding="utf-8"))
        assert timed is not None
        self.compared.inference = {key: value for key, value in timed.items() if key != "artifacts"}
        for name, result in by_artifact.items():
            if "error" in timed["artifacts"][name]:
                self.fail(result.id, "inference", timed["artifacts"][name]["error"])
            else:
                result.inference = timed["artifacts"][name]

    def timed_before(self, file: Path, hashes: dict[str, str]) -> dict[str, Any] | None:
        if not file.is_file():
            return None
        timed: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = timed["artifacts"]
        same = {name: entry.get("hash") for name, entry in entries.items()} == hashes
        return timed if same and not any("error" in entry for entry in entries.values()) else None

    def timing_words(self, artifacts: list[str], file: Path) -> list[str]:
        words = [
            f"target={self.settings.target}",
            f"artifacts=[{','.join(artifacts)}]",
            f"store={self.store}",
            f"result={file}",
        ]
        for own, key in (("accelerator", "trainer.accelerator"), ("cache_dir", "data.cache_dir")):
            if (value := self.settings.word(key)) is not None:
                words.append(f"{own}={value}")
        return words


def stamps(folder: Path) -> dict[Path, int]:
    """The status files of a sweep's jobs, each with what changes when it is written anew."""
    return {file: file.stat().st_mtime_ns for file in sorted(folder.glob("*/status.json"))}


def last_words(outcome: Outcome) -> str:
    """What a command that told nothing in a status file said at its end."""
    said = [line for line in outcome.errors if line.strip()]
    if not said:
        return f"ended with exit code {outcome.code} and said nothing"
    if outcome.code != REFUSED:
        return said[-1]
    starts = [number for number, line in enumerate(said) if JOB.match(line)]
    return " ".join(said[starts[-1] :] if starts else said[-2:])


def one_line(text: str, longest: int = 400) -> str:
    """A reason for the list of failures."""
    text = JOB.sub("", " ".join(text.split()))
    return text if len(text) <= longest else text[: longest - 1] + "…"
