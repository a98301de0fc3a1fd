"""Select a method for a task: train each at equal budget, compare them on examples that selected nothing else.

The validation examples are divided into folds. The first selects the best epoch of each training, the second the method.
The reported scores are those on the test split or, if it has no labels, on a third fold.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config.commands import EvaluateConfig
from fusion.config.data import Fold
from fusion.config.fields import require
from fusion.config.model import SameBackboneConfig
from fusion.config.stages import SelectConfig, Stage1Config, Stage2Config
from fusion.errors import TrainingError, UserError
from fusion.runs.inputs import read_inputs
from fusion.runs.output import RunOutput, find_output
from fusion.runs.run import Run, RunState, record
from fusion.stages.stage1 import check_stage1, run_stage1
from fusion.stages.stage2 import check_stage2, run_stage2
from fusion.store.lookup import names, read_manifest
from fusion.text import listed

if TYPE_CHECKING:
    from fusion.analysis.evaluation import Evaluation

log = logging.getLogger(__name__)

# The command, its check and its training, by settings.
STAGES: dict[type, tuple[str, Callable[[Any, Run], RunState], Callable[[Any, Run], dict[str, Any]]]] = {
    Stage1Config: ("stage1", check_stage1, run_stage1),
    Stage2Config: ("stage2", check_stage2, run_stage2),
}


def output_of(config: SelectConfig, run: Run) -> RunOutput:
    """Look up the artifact of a selection, whose kind is that of the selected method."""
    stored = {config.name} & {*names(Path(config.store))}
    kind = read_manifest(str(config.name), Path(config.store)).kind if stored else "adapter"
    return find_output(config, run, kind, read_inputs(config).hashes)


def check_selection(config: SelectConfig, run: Run) -> RunState:
    """Check the training of each method. Raises UserError as in the two stages."""
    require(
        config.name not in config.sources,
        f"name={config.name}: is one of the sources, which it would replace; expected a different name",
    )
    output = output_of(config, run)
    if output.stored is not None:
        return output.run_state
    for name in config.candidates:
        one = config.candidate(name, 2)
        _, check, _ = STAGES[type(one)]
        check(one, replace(run, config=asdict(one)))
    return output.run_state


def run_selection(config: SelectConfig, run: Run) -> dict[str, Any]:
    """Train each method, store the best one under the output's name, and return the content of result.json.

    Finished trainings are in the store until the end, so an interrupted selection continues.

    Raises:
        TrainingError: if every training failed.
    """
    output = output_of(config, run)
    if output.stored is not None:
        return output.result()
    with output.attempt(run, config.resume, parts=True):
        return _select(config, run, output)


def _select(config: SelectConfig, run: Run, output: RunOutput) -> dict[str, Any]:
    from fusion.reporting.statistics import Predictions, Sample, compare
    from fusion.stages.search import keep
    from fusion.training.predictions import main_metrics, main_score

    tested = _has_labelled_test(config)
    folds = 2 if tested else 3
    every = {name: config.candidate(name, folds) for name in config.candidates}
    found: list[dict[str, Any]] = []
    samples: dict[str, list[Sample]] = {}
    for number, (name, one) in enumerate(every.items(), 1):
        log.info("method %d/%d: %s", number, len(every), name)
        command, _, train = STAGES[type(one)]
        own = replace(run, command=command, directory=run.directory / "methods" / name, config=asdict(one))
        try:
            result = record(own, partial(train, one, own))
        except TrainingError as error:
            log.warning("%s: %s", one.name, error)
            continue
        if not run.rank_zero or "artifact" not in result:
            continue
        held_out = ("test", None) if tested else ("validation", Fold(2, folds))
        selecting, reported = _evaluate(config, str(one.name), [("validation", Fold(1, folds)), held_out])
        selected_by = main_score(selecting.metrics, config.task_list)
        samples[name] = [Sample(0, selected_by, Predictions.of(next(iter(selecting.stored.values()), None)))]
        found.append(
            {
                "method": name,
                "score": selected_by,
                "metrics": reported.metrics,
                "seconds": (result.get("search") or result["speed"])["seconds"],
                "trainable": result["parameters"]["trainable"],
            }
        )
        examples = {"selection": selecting.examples, "report": reported.examples}
    if not run.rank_zero:
        return {}
    if not found:
        raise TrainingError(f"none of the {len(every)} trainings succeeded")
    best, *others = sorted(found, key=lambda one: -one["score"])  # the first of equal ones
    selection: dict[str, Any] = {
        "chosen": best["method"],
        "methods": found,
        "metric": main_metrics({split: config.task_list[0] for split in best["metrics"]})[0].rpartition("/")[2],
        "examples": examples,
        "seconds": sum(one["seconds"] for one in found),
    }
    cost = (
        f"{selection['seconds']:.0f} s, {selection['seconds'] / best['seconds']:.1f} times as long as {best['method']}"
    )
    log.info("selected %s on %d examples; training took %s", best["method"], examples["selection"], cost)
    if others:
        second = others[0]["method"]
        difference = compare(samples[best["method"]], samples[second], selection["metric"])
        interval = [difference.low, difference.high]
        selection["runner_up"] = {"method": second, "difference": difference.mean, "interval": interval}
        if difference.low is not None and not difference.conclusive:
            text = "%s - %s: %+.4f (95 %% interval %+.4f to %+.4f), so another sample of examples may select another method"
            log.info(text, best["method"], second, difference.mean, *interval)
    close = [one["method"] for one in others if one["score"] == best["score"]]
    if close:
        log.info("%s has the same score; the first one in methods is selected", listed(close))
    trained, chosen = [str(one.name) for one in every.values()], str(every[best["method"]].name)
    return keep(config, run, output, chosen, trained, {"selection": selection}, best["metrics"])


def _has_labelled_test(config: SelectConfig) -> bool:
    from fusion.data.rows import load_rows

    assert config.task is not None
    try:
        return load_rows(config.task, config.data, "test").labels is not None
    except UserError:
        return False


def _evaluate(config: SelectConfig, artifact: str, splits: Sequence[tuple[str, Fold | None]]) -> list[Evaluation]:
    """Evaluate an artifact on each split, or on one fold of it."""
    from fusion.analysis.evaluation import evaluate_model
    from fusion.model.inference import load_model

    trust_remote_code, accept_licence = config.backbone.trust_remote_code, config.backbone.accept_licence
    backbone = SameBackboneConfig(trust_remote_code=trust_remote_code, accept_licence=accept_licence)
    use = EvaluateConfig(artifact, config.store, config.data, backbone, config.trainer.accelerator, task=config.task)
    loaded, found = load_model(use, fold=True), []
    for split, fold in splits:
        data = replace(config.data, validation_fold=None if fold is None else str(fold))
        found.append(evaluate_model(loaded, replace(use, split=split, data=data), lambda *_: contextlib.nullcontext()))
        for line in found[-1].lines:
            log.info("%s", line)
    return found
