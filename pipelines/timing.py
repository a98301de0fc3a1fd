"""Interleaved timing of models on the same batches, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError

if TYPE_CHECKING:
    from fusion.backbones.load import Backbone
    from fusion.config.data import DataConfig
    from fusion.config.task import TaskConfig
    from fusion.data.encode import EncodedRows
    from fusion.store.manifest import Manifest

MIN_ROUNDS = 3


def rounds(
    runs: Mapping[str, Callable[[Any], object]],
    batches: Sequence[Any],
    most: int,
    budget: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each function once per round, after a warm-up, and return the seconds by name.

    Every round uses the next batch and starts with the next function. After `budget` seconds and at least `MIN_ROUNDS`
    rounds, no further round starts.
    """
    names = list(runs)
    for run in runs.values():
        run(batches[0])
    start = clock()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(most):
        if number >= MIN_ROUNDS and clock() - start >= budget:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            runs[name](batches[number % len(batches)])
            seconds[name].append(clock() - started)
    return seconds


def validation_rows(
    manifest: Manifest, target: str, data: DataConfig, backbone: Backbone
) -> tuple[TaskConfig, str, EncodedRows]:
    """Return a task of an artifact, the name of its first validation split and the split's encoded examples."""
    from fusion.data.encode import encode
    from fusion.data.rows import load_rows
    from fusion.data.splits import evaluation_splits
    from fusion.store.compatibility import as_trained

    tasks = {task.name: task for task in manifest.tasks}
    if target not in tasks:
        raise UserError(f"{manifest.name} was not trained on {target}, but on {', '.join(map(str, tasks))}")
    task = tasks[target].as_config(manifest.name)
    data = as_trained(manifest, data, target)
    split = evaluation_splits(task, "validation", data)[0]
    rows = load_rows(task, data, split)
    length, causal = manifest.data.max_length, backbone.family.causal
    return task, split, encode(rows, backbone.tokenizer, length, data.cache_dir, causal)
