"""Inference time of artifacts relative to the backbone without adapters, interleaved on the same validation batches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from fusion.errors import UserError
from fusion.runs.run import describe
from pipelines.timing import rounds, validation_rows

BATCHES = 4  # from the longest to the shortest examples
MAX_ROUNDS = 40
SECONDS = 60.0  # time budget of all artifacts together; each is timed for at least three rounds


def ratios(seconds: Sequence[float], bare: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles over rounds of the time relative to `bare`, and the median seconds per batch."""
    each = [own / other for own, other in zip(seconds, bare, strict=True)]
    low, middle, high = quantiles(each, n=4, method="inclusive")
    return {"ratio": middle, "low": low, "high": high, "seconds": median(seconds)}


def measure(
    target: str, artifacts: Sequence[str], store: Path, accelerator: str = "auto", cache_dir: str | None = None
) -> dict[str, Any]:
    """Measure the backbone's seconds per batch and the ratio of each artifact; return the content of inference.json."""
    import torch

    from fusion.backbones.forward import last_hidden_states
    from fusion.config.data import DataConfig, LimitConfig
    from fusion.config.model import SameBackboneConfig
    from fusion.data.batches import Batch
    from fusion.data.loaders import evaluation_loader
    from fusion.model.build import backbone_of, stored_model
    from fusion.model.inference import device_of, forward
    from fusion.runs.memory import keep_freed_memory
    from fusion.store.artifacts import load
    from fusion.store.lookup import read_manifest

    keep_freed_memory()
    device = device_of(accelerator)
    first = read_manifest(artifacts[0], store)
    backbone_in = functools.cache(lambda dtype: backbone_of(first, SameBackboneConfig(dtype=dtype)))
    backbone = backbone_in(first.backbone.dtype)
    bare = backbone.copy().model.eval().to(device)
    run = first.run.config
    limit = LimitConfig(validation=run.get("data.limit.validation"))
    data = DataConfig(dir=run.get("data.dir"), limit=limit, cache_dir=cache_dir)
    _, split, rows = validation_rows(first, target, data, backbone)
    loader = evaluation_loader(rows, run["data.batch_size"], tokens_per_batch=run.get("data.tokens_per_batch"))
    every = [batch.to(device) for batch in loader]
    count = min(BATCHES, len(every))
    batches = [every[number * len(every) // count] for number in range(count)]

    def run_bare(batch: Batch) -> object:
        inputs = batch.input_ids, batch.attention_mask, batch.token_type_ids
        return last_hidden_states(bare, backbone.family, *inputs)[:, 0].cpu()

    def runner(model: Any) -> Callable[[Batch], object]:
        heads = list(getattr(model.head, "tasks", ()))  # a multi-task model has one head per task
        task = heads.index(target) if target in heads else 0
        return lambda batch: forward(model, replace(batch, task=task)).cpu()

    entries: dict[str, dict[str, Any]] = {}
    seconds: list[list[float]] = []
    for artifact in artifacts:
        try:
            stored = load(artifact, store)
            model = stored_model(stored, store, backbone_in(stored.manifest.backbone.dtype).copy(), fold=True)
            runs = {"bare": run_bare, "model": runner(model.to(device).eval())}
            with torch.inference_mode():
                timed = rounds(runs, batches, MAX_ROUNDS, SECONDS / len(artifacts))
        except Exception as error:  # continue with the other artifacts
            if not isinstance(error, UserError):
                logging.exception("%s", artifact)
            entries[artifact] = {"error": describe(error)}
        else:
            seconds.append(timed["bare"])
            entries[artifact] = {"hash": stored.manifest.hash, **ratios(timed["model"], timed["bare"])}
    return {
        "backbone": backbone.name_or_path,
        "split": split,
        "rows": [len(batch.rows) for batch in batches],
        "tokens": [int(batch.input_ids.shape[1]) for batch in batches],
        "device": str(device),
        "threads": torch.get_num_threads(),
        "rounds": min(map(len, seconds), default=0),
        "bare_seconds": median([one for own in seconds for one in own] or [0.0]),
        "artifacts": entries,
    }
