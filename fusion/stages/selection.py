"""Select a method for a task: train each at equal budget, compare them on examples that selected nothing else.

The validation examples are divided into folds. The first selects the best epoch of each training, the second the method.
The reported scores are those on the test split or, if it has no labels, on a third fold.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fusion.config.commands import EvaluateConfig
from fusion.config.data import Fold
from fusion.config.fields import require
from fusion.config.stages import SelectConfig, Stage1Config
from fusion.errors import TrainingError, UserError
from fusion.runs.inputs import read_inputs
from fusion.runs.output import RunOutput, find_output
from fusion.runs.run import Run, RunState, record
from fusion.stages.stage1 import check_stage1, run_stage1
from fusion.stages.stage2 import check_stage2, run_stage2
from fusion.store.lookup import names, read_manifest
from fusion.text import listed

log = logging.getLogger(__name__)


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
        own = replace(run, config=asdict(one))
        check_stage1(one, own) if isinstance(one, Stage1Config) else check_stage2(one, own)
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
    from fusion.stages.search import keep
    from fusion.training.predictions import main_metrics, main_score

    tested = _has_labelled_test(config)
    folds = 2 if tested else 3
    every = {name: config.candidate(name, folds) for name in config.candidates}
    found: list[dict[str, Any]] = []
    for number, (name, one) in enumerate(every.items(), 1):
        log.info("method %d/%d: %s", number, len(every), name)
        stage = "stage1" if isinstance(one, Stage1Config) else "stage2"
        own = replace(run, command=stage, directory=run.directory / "methods" / name, config=asdict(one))

        def work(one: Any = one, own: Run = own) -> dict[str, Any]:
            return run_stage1(one, own) if isinstance(one, Stage1Config) else run_stage2(one, own)

        try:
            result = record(own, work)
        except TrainingError as error:
            log.warning("%s: %s", one.name, error)
            continue
        if not run.rank_zero or "artifact" not in result:
            continue
        selecting = _metrics(config, str(one.name), "validation", str(Fold(1, folds)))
        reported = _metrics(config, str(one.name), *(("test",) if tested else ("validation", str(Fold(2, folds)))))
        found.append(
            {
                "method": name,
                "score": main_score(selecting[0], config.task_list),
                "metrics": reported[0],
                "seconds": (result.get("search") or result["speed"])["seconds"],
                "trainable": result["parameters"]["trainable"],
            }
        )
        examples = {"selection": selecting[1], "report": reported[1]}
    if not run.rank_zero:
        return {}
    if not found:
        raise TrainingError(f"none of the {len(every)} trainings succeeded")
    best = max(found, key=lambda one: one["score"])  # the first of equal ones
    selection = {
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
    close = [one["method"] for one in found if one is not best and one["score"] == best["score"]]
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


def _metrics(
    config: SelectConfig, artifact: str, split: str, fold: str | None = None
) -> tuple[dict[str, dict[str, float]], int]:
    """Return the metrics by split, and the number of examples."""
    from fusion.analysis.evaluation import evaluate_artifact

    data = replace(config.data, validation_fold=fold)
    use = EvaluateConfig(artifact, config.store, data, task=config.task, split=split)
    use.backbone.trust_remote_code = config.backbone.trust_remote_code
    found = evaluate_artifact(use, lambda *_: contextlib.nullcontext())
    for line in found.lines:
        log.info("%s", line)
    return found.metrics, found.examples
