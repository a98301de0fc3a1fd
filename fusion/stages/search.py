"""`search=true`: train with a small grid of learning rates and seeds, and keep the best artifact."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

from fusion.config.stages import StageConfig
from fusion.errors import TrainingError
from fusion.runs.output import RunOutput, result_of
from fusion.runs.run import Run, record
from fusion.store.artifacts import load, save
from fusion.store.lookup import names, read_folder, read_manifest
from fusion.store.writing import remove
from fusion.training.predictions import main_score

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=StageConfig)


def candidates_of(config: Config) -> list[Config]:
    """Return the settings of each training: one for each learning rate and seed."""
    return [
        replace(
            config,
            search=False,
            search_rates=None,
            search_seeds=1,
            name=f"{config.name}-lr-{rate:g}-seed-{seed}",
            optim=replace(config.optim, lr=rate),
            seed=seed,
        )
        for rate in config.rates_to_search
        for seed in range(config.seed, config.seed + config.search_seeds)
    ]


def search(
    config: Config,
    run: Run,
    output: RunOutput,
    output_of: Callable[[Config, Run], RunOutput],
    train: Callable[[Config, Run, RunOutput], dict[str, Any]],
) -> dict[str, Any]:
    """Train each candidate, store the best one under the output's name, and return the content of result.json.

    The learning rate with the highest mean of the main metric over the seeds is selected, then the seed with the highest
    metric. Finished candidates are in the store until the end, so an interrupted search continues.

    Raises:
        TrainingError: if every candidate failed or diverged.
    """
    scores: dict[float, dict[int, float]] = {}
    results: dict[tuple[float, int], tuple[Config, dict[str, Any]]] = {}
    every = candidates_of(config)
    for number, one in enumerate(every, 1):
        log.info("search %d/%d: optim.lr=%g seed=%d", number, len(every), one.optim.rate, one.seed)
        own = replace(run, directory=run.directory / "search" / str(one.name), config=dataclasses.asdict(one))
        place = output_of(one, own)

        def work(one: Config = one, own: Run = own, place: RunOutput = place) -> dict[str, Any]:
            if place.stored is not None:
                return place.result()
            with place.attempt(own, config.resume):
                return train(one, own, place)

        try:
            result = record(own, work)
        except TrainingError as error:
            log.warning("%s: %s", one.name, error)
            continue
        if run.rank_zero and not result.get("diverged"):
            scores.setdefault(one.optim.rate, {})[one.seed] = main_score(result["metrics"], config.task_list)
            results[one.optim.rate, one.seed] = one, result
    if not run.rank_zero:
        return {}
    if not scores:
        raise TrainingError(f"none of the {len(every)} trainings of the search succeeded; lower search_rates")
    rate = max(scores, key=lambda rate: fmean(scores[rate].values()))
    seed = max(scores[rate], key=lambda seed: scores[rate][seed])
    chosen, result = results[rate, seed]
    found = {
        "rates": [{"lr": lr, "seeds": list(of), "scores": list(of.values())} for lr, of in scores.items()],
        "chosen": {"lr": rate, "seed": seed},
        "trainings": len(every),
        "seconds": sum(one["speed"]["seconds"] for _, one in results.values()),
    }
    log.info("search: selected optim.lr=%g seed=%d on the validation split", rate, seed)
    if config.trainer.fast_dev_run:
        return result | {"name": config.name, "search": found}
    return keep(config, run, output, str(chosen.name), [str(one.name) for one in every], {"search": found})


def keep(
    config: StageConfig,
    run: Run,
    output: RunOutput,
    chosen: str,
    trained: Sequence[str],
    found: dict[str, Any],
    metrics: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Save one of the trained artifacts under the name of the output with `found` in its result, remove all of them.

    Returns the content of result.json. `metrics` replace those on the validation examples that selected the epoch.
    """
    artifact = load(chosen, output.store)
    stored = artifact.manifest
    measured = stored.content["metrics"] if metrics is None else metrics
    manifest = stored.changed(
        name=output.name,
        metrics=measured,
        result=stored.content["result"] | {"name": output.name, "metrics": measured, **found},
        run=stored.content["run"]
        | {
            "identity": output.identity,
            "config": output.config,
            "overrides": list(run.overrides),
            "directory": str(run.directory),
        },
    )
    if output.name in names(output.store) and read_manifest(output.name, output.store).kind != stored.kind:
        remove(output.name, output.store, force=True)  # `save` replaces the same kind only
    path = save(output.store, manifest, artifact.weights, artifact.head, config.overwrite)
    log.info("stored %s", path)
    for name in {*trained} & {*names(output.store)}:
        remove(name, output.store)
    return result_of(read_folder(path), path)
