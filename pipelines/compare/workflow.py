"""Run a comparison: train the sources and each method, and time inference. Failures do not stop the other methods."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fusion.errors import UserError
from fusion.files import read_json, write_json
from fusion.runs.run import describe
from fusion.runs.sweep import Sweep
from fusion.store.lookup import names, read_manifest
from fusion.store.manifest import Manifest
from fusion.text import key_of, shortened
from pipelines.commands import Outcome, attempt, say, typed
from pipelines.compare import inference, trainings
from pipelines.compare.config import Comparison
from pipelines.compare.rows import IDS, Row
from pipelines.compare.trainings import SOURCE_RATE, RowResult, Training

CONFIG_ERROR = 2  # exit code
JOB = re.compile(r"^job \d+ \(.*?\): ")  # prefix of the error of an invalid job of a sweep


class Workflow:
    """A comparison and its results."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.store = comparison, comparison.store
        self.sources = comparison.config.sources
        self.dropped: list[str] = []  # sources trained with AdapterDrop
        self.rows: list[RowResult] = []
        self.failures: list[dict[str, str]] = []  # id (of a method or source), what (failed) and reason
        self.inference: dict[str, Any] = {}  # timings of the backbone, and how they were measured
        self.notes: list[str] = []
        self.source_commands: list[str] = []  # from the manifests of the sources

    def run(self) -> None:
        """Run the training commands, which skip existing artifacts, and collect the scores.

        Raises SystemExit if interrupted (130, 143), or if the settings of the first command are invalid (2).
        """
        rows, selected = self.comparison.rows, self.comparison.config.methods
        extra = [row.id for row in rows if selected and row.id not in selected]
        if extra:
            say(f"methods: added {', '.join(extra)}, which the selected methods depend on")
        if self.comparison.need_sources:
            say(f"\nsources: {', '.join(self.sources)}")
            stored = self.stored(self.sources)
            if stored:
                say(f"already stored: {', '.join(stored)}")
            self.note_other_settings(stored)
            self.train_sources([source for source in self.sources if source not in stored])
        for number, row in enumerate(rows, 1):
            say(f"\n[{number}/{len(rows)}] {row.id}: {row.title}")
            try:
                self.run_row(row)
            except (UserError, KeyError) as error:  # a damaged or incomplete manifest
                self.fail(row.id, "row", describe(error))
        sources = [*(self.sources if self.comparison.need_sources else []), *self.dropped]
        self.source_commands = [
            typed("fusion.stage1", [word.replace("\\", "") for word in self.manifest(source).run.overrides])
            for source in self.stored(sources)
        ]

    def fail(self, id: str, what: str, reason: str) -> None:
        reason = shortened(JOB.sub("", " ".join(reason.split())), 400)
        self.failures.append({"id": id, "what": what, "reason": reason})
        say("FAILED {id} ({what}): {reason}".format_map(self.failures[-1]))

    def stored(self, artifacts: Sequence[str]) -> list[str]:
        there = names(self.store)
        return [name for name in artifacts if name in there]

    def manifest(self, name: str) -> Manifest:
        return read_manifest(name, self.store)

    def train_sources(self, tasks: Sequence[str], drop: int | None = None) -> None:
        for training in trainings.source_trainings(self.comparison, tasks, drop):
            reasons, code = self.train(training)
            for name, reason in reasons.items():
                self.fail(name, "source", reason)
            if code == CONFIG_ERROR and not names(self.store):
                raise SystemExit(CONFIG_ERROR)

    def dropped_sources(self) -> list[str]:
        """Return the names of the sources with AdapterDrop, after training missing ones."""
        tasks, half = self.source_tasks(), self.half()
        self.dropped = [f"{task}-dropped" for task in tasks]
        self.train_sources([task for task in tasks if not self.stored([f"{task}-dropped"])], drop=half)
        return self.available(self.dropped)

    def available(self, sources: list[str]) -> list[str]:
        if missing := set(sources) - set(self.stored(sources)):
            raise UserError(f"depends on {', '.join(sorted(missing))}, which could not be trained")
        return sources

    def source_tasks(self) -> list[str]:
        """Return the tasks of the sources. A source that is not stored is named after its task."""
        stored = self.stored(self.sources)
        found = [str(self.manifest(name).task.name) if name in stored else name for name in self.sources]
        return list(dict.fromkeys(found))

    def half(self) -> int:
        stored = self.stored(self.sources) or self.available(self.sources)
        return self.manifest(stored[0]).backbone.layers // 2

    def note_other_settings(self, stored: Sequence[str]) -> None:
        """Add a note for each stored source that was trained with different settings."""
        config = self.comparison.config
        for source in stored:
            manifest = self.manifest(source)
            expected = {"trainer.max_epochs": config.source_epochs, "optim.lr": SOURCE_RATE}
            limited = self.comparison.word("data.limit.train") is not None
            if manifest.task.name != self.comparison.target or not limited:
                expected["data.limit.train"] = config.source_rows
            trained = manifest.run.config
            others = [f"{key}={trained.get(key)}" for key in expected if trained.get(key) != expected[key]]
            if others:
                self.notes.append(f"Source {source} already existed, with different settings: {', '.join(others)}.")

    def run_row(self, row: Row) -> None:
        """Train a method and read its results. Raises UserError if an artifact that it depends on is missing."""
        values = self.values(row)
        if "composition.cross_fit" in map(key_of, row.words.split()):
            self.train_folds()
        training = trainings.row_training(self.comparison, row, values)
        again = ("overwrite=true",) if self.is_stale(training, [values[id] for id in row.needs]) else ()
        reasons, _ = self.train(replace(training, overrides=(*training.overrides, *again)))
        result = trainings.row_result(row, training, self.store, self.comparison.target, without=reasons.keys())
        if result is None:
            self.fail(row.id, "row", next(iter(reasons.values()), "the command did not save an artifact"))
            return
        self.rows.append(result)
        for rate, artifacts in training.artifacts.items():
            for seed, name in zip(self.comparison.config.seeds, artifacts, strict=True):
                if name in reasons:
                    self.fail(row.id, f"rate {rate:g}, seed {seed}", reasons[name])

    def values(self, row: Row) -> dict[str, str]:
        """Return the values of the method's placeholders. Raises UserError if an artifact is missing."""
        available = {
            "half": lambda: str(self.half()),
            "keep": lambda: str(max(1, min(2, len(self.sources) - 1))),
            "sources": lambda: ",".join(self.available(self.sources)),
            "others": lambda: ",".join(self.other_sources()),
            "dropped": lambda: ",".join(self.dropped_sources()),
            "tasks": lambda: ",".join(dict.fromkeys([*self.source_tasks(), self.comparison.target])),
        }
        return {name: self.best_of(name) if name in IDS else available[name]() for name in row.placeholders}

    def other_sources(self) -> list[str]:
        """Return the sources that were not trained on the target."""
        target = self.comparison.target
        found = [name for name in self.available(self.sources) if self.manifest(name).task_names != [target]]
        if not found:
            raise UserError(f"all sources were trained on {target}; add others to sources=")
        return found

    def train_folds(self) -> None:
        """Train the single adapter without each fold of the examples."""
        rate = next(result.rate for result in self.rows if result.id == "pfeiffer")
        training = trainings.fold_training(self.comparison, rate)
        reasons, _ = self.train(training)
        if reasons:
            raise UserError(f"depends on {next(iter(reasons))}: {next(iter(reasons.values()))}")

    def best_of(self, id: str) -> str:
        """Return the artifact name of a method with its best learning rate, for all seeds."""
        rates = [result.rate for result in self.rows if result.id == id]
        if not rates:
            raise UserError(f"depends on {id}, which failed")
        return trainings.artifact_name(self.comparison, id, rates[0])

    def is_stale(self, training: Training, needed: Sequence[str]) -> bool:
        """Return whether a stored artifact does not depend on `needed`, or on sources that have changed since."""
        stored = names(self.store)
        for manifest in map(self.manifest, self.stored(training.names)):
            used = re.split(r"[][,= ]", " ".join(manifest.run.overrides).replace("\\", ""))
            sources = [source for source in manifest.sources if source.name in stored]
            changed = any(self.manifest(source.name).hash != source.hash for source in sources)
            if changed or not set(needed) <= set(used):
                return True
        return False

    def train(self, training: Training) -> tuple[dict[str, str], int]:
        """Run a sweep. Returns the reasons of failed artifacts by name, and the exit code."""
        sweep = Sweep.start(training.folder)
        outcome = attempt(training.module, list(training.overrides))
        jobs = {job.status.get("name"): job for job in sweep.jobs()}
        reasons = {}
        for name in training.names:
            job = jobs.get(name)
            if job is None and outcome.code != 0:
                reasons[name] = reason_of(outcome)
            elif job is not None and job.state != "done":
                reasons[name] = str(job.status.get("error") or job.state)
        if not reasons:
            say(f"done in {outcome.seconds:.0f} s")
        return reasons, outcome.code

    def time_inference(self) -> None:
        """Time the best artifact of each method, unless times for the same artifacts are already stored."""
        say("\ninference")
        file = self.comparison.output / "inference.json"
        by_artifact = {result.artifacts[0]: result for result in self.rows}
        hashes = {name: self.manifest(name).hash for name in by_artifact}
        timed = read_json(file)
        if {name: entry.get("hash") for name, entry in timed.get("artifacts", {}).items()} == hashes:
            say("already timed")
        else:
            file.unlink(missing_ok=True)
            accelerator, cache = map(self.comparison.word, ("trainer.accelerator", "data.cache_dir"))
            try:
                timed = inference.measure(
                    self.comparison.target, list(by_artifact), self.store, accelerator or "auto", cache
                )
            except Exception as error:  # the scores are still reported
                self.fail("inference", "all rows", describe(error))
                return
            write_json(file, timed)
            say(
                f"at least {timed['rounds']} rounds per method; backbone without adapters: "
                f"{timed['bare_seconds'] * 1000:.0f} ms per batch"
            )
        self.inference = {key: value for key, value in timed.items() if key != "artifacts"}
        for name, result in by_artifact.items():
            if "error" in timed["artifacts"][name]:
                self.fail(result.id, "inference", timed["artifacts"][name]["error"])
            else:
                result.inference = timed["artifacts"][name]


def reason_of(outcome: Outcome) -> str:
    """Return why a command failed without a status file: its last line on stderr, or its configuration error."""
    lines = [line for line in outcome.errors if line.strip()]
    if not lines:
        return f"exit code {outcome.code} without an error message"
    if outcome.code != CONFIG_ERROR:
        return lines[-1]
    jobs = [number for number, line in enumerate(lines) if JOB.match(line)]
    return " ".join(lines[jobs[-1] :] if jobs else lines[-2:])
