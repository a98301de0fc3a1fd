"""Time stored artifacts against their bare backbone, in turn: `python -m pipelines.compare.inference artifacts=[a,b]`.

Every round takes one batch and runs it through the bare backbone and each model; a ratio is that of two times
of one round, so that what the machine does besides falls on both. The frozen tensors are in memory once.
"""

from __future__ import annotations

import copy
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.files import write_json
from fusion.runs.run import describe
from pipelines.commands import run_workflow, say
from pipelines.compare.config import tasks

WARMUPS = 1
SMALLEST_ROUNDS = 3
MOST_ROUNDS = 40


@dataclass
class TimingConfig:
    target: str = "???"
    artifacts: list[str] = field(default_factory=list)
    store: str = "outputs/store"
    result: str = "inference.json"
    batches: int = 4  # of the target's validation rows, from the longest to the shortest
    seconds: float = 60.0  # all of it, as far as that goes
    accelerator: str = "auto"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.batches < 1 or self.seconds <= 0:
            raise UserError(f"batches={self.batches} seconds={self.seconds:g}: expected more than 0 of both")


def rounds(
    runs: dict[str, Callable[[Any], object]],
    batches: list[Any],
    until: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each round: a round is one batch, a run after the other, each time another one first.

    Args:
        until: no round starts after this time of the clock, once there are SMALLEST_ROUNDS.
    """
    names = list(runs)
    for batch in batches[:WARMUPS]:
        for name in names:
            runs[name](batch)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(MOST_ROUNDS):
        if number >= SMALLEST_ROUNDS and clock() >= until:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            runs[name](batches[number % len(batches)])
            seconds[name].append(clock() - started)
    return seconds


def ratios(seconds: list[float], bare: list[float]) -> dict[str, float]:
    """The median of the rounds' ratios, its quartiles, and the median seconds of a batch."""
    each = sorted(mine / its for mine, its in zip(seconds, bare, strict=True))
    low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return {
        "ratio": statistics.median(each),
        "low": low,
        "high": high,
        "seconds": statistics.median(seconds),
    }


def share_tensors(model: Any, known: dict[tuple[Any, ...], list[Any]]) -> None:
    """Let equal parameters of several models be one tensor: 35 copies of a backbone need not be in memory."""
    import torch

    for parameter in model.parameters():
        if parameter.numel() < 4096:
            continue
        tensor = parameter.data
        alike = known.setdefault((tuple(tensor.shape), tensor.dtype, float(tensor.double().sum())), [])
        for other in alike:
            if torch.equal(other, tensor):
                parameter.data = other
                break
        else:
            alike.append(tensor)


def measure(config: TimingConfig) -> dict[str, Any]:
    """What the result file holds: the bare backbone's seconds, and for each artifact its ratio or its error.

    Raises:
        UserError: no artifact, or the target's rows cannot be read.
    """
    import torch

    from fusion.backbones.load import load_backbone
    from fusion.config.model import SameBackboneConfig
    from fusion.data.batches import Batch
    from fusion.data.encode import encode
    from fusion.data.loaders import evaluation_loader
    from fusion.data.rows import load_rows
    from fusion.data.splits import evaluation_splits
    from fusion.model.build import backbone_of, stored_model
    from fusion.model.inference import device_of
    from fusion.runs.memory import keep_freed_memory
    from fusion.store.artifacts import load
    from fusion.store.lookup import read_manifest

    if not config.artifacts:
        raise UserError("artifacts is empty: expected names in the store, such as artifacts=[cb-head]")
    keep_freed_memory()
    started = time.perf_counter()
    store, device = Path(config.store), device_of(config.accelerator)
    first = read_manifest(config.artifacts[0], store)
    name, revision = backbone_of(first, SameBackboneConfig())
    backbone = load_backbone(name, revision)
    known: dict[tuple[Any, ...], list[Any]] = {}
    bare: torch.nn.Module = backbone.model.eval()
    bare.to(device)
    share_tensors(bare, known)

    def run_bare(batch: Batch) -> object:
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        output = bare(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types)
        return output.last_hidden_state[:, 0].cpu()

    def run_with(model: Any) -> Callable[[Batch], object]:
        # Of several heads the target's own scores its rows.
        heads = list(getattr(model.head, "tasks", ()))
        more = {"task": heads.index(config.target)} if config.target in heads else {}
        return lambda batch: model(
            batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.choice_counts, **more
        ).cpu()

    data, task = data_of(first.run.config, config.cache_dir), task_of(config.target)
    split = evaluation_splits(task, "validation", data)[0]
    rows = encode(
        load_rows(task, data, split),
        backbone.tokenizer,
        data.max_length or first.data.max_length,
        data.cache_dir,
    )
    loader = evaluation_loader(rows, data.batch_size, tokens_per_batch=data.tokens_per_batch)
    every = [batch.to(device) for batch in loader]
    count = min(config.batches, len(every))
    batches = [every[number * len(every) // count] for number in range(count)]
    runs: dict[str, Callable[[Any], object]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for artifact in config.artifacts:
        try:
            stored = load(artifact, store)
            model = stored_model(stored, store, replace(backbone, model=copy.deepcopy(backbone.model)))
            model = model.to(device).eval()
            share_tensors(model, known)
            with torch.inference_mode():
                run_with(model)(batches[0])
        except Exception as error:  # one artifact that does not run must not cost the others their figures
            if not isinstance(error, UserError):
                logging.exception("%s", artifact)
            entries[artifact] = {"error": describe(error)}
        else:
            runs[artifact] = run_with(model)
            entries[artifact] = {"hash": stored.manifest.hash}
    with torch.inference_mode():
        seconds = rounds({"": run_bare, **runs}, batches, until=started + config.seconds)
    for artifact in runs:
        entries[artifact] |= ratios(seconds[artifact], seconds[""])
    return {
        "backbone": name,
        "split": split,
        "rows": [len(batch.rows) for batch in batches],
        "tokens": [int(batch.input_ids.shape[1]) for batch in batches],
        "device": str(device),
        "threads": torch.get_num_threads(),
        "rounds": len(seconds[""]),
        "bare_seconds": statistics.median(seconds[""]),
        "artifacts": entries,
    }


def data_of(run_config: dict[str, Any], cache_dir: str | None) -> Any:
    """The data settings that an artifact was trained with, from the flat config of its manifest."""
    from fusion.config.data import DataConfig, LimitConfig, SplitConfig

    flat = {key.removeprefix("data."): value for key, value in run_config.items() if key.startswith("data.")}
    limits = {key.removeprefix("limit."): flat.pop(key) for key in list(flat) if key.startswith("limit.")}
    made = {key.removeprefix("split."): flat.pop(key) for key in list(flat) if key.startswith("split.")}
    return DataConfig(limit=LimitConfig(**limits), split=SplitConfig(**made), cache_dir=cache_dir, **flat)


def task_of(name: str) -> Any:
    """The task of a task file.

    Raises:
        UserError: there is none of that name.
    """
    from omegaconf import OmegaConf

    from fusion.config.task import TaskConfig

    files = tasks()
    if name not in files:
        raise UserError(f"target={name}: expected one of {', '.join(files)}")
    task = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(TaskConfig), OmegaConf.load(files[name]), {"name": name})
    )
    assert isinstance(task, TaskConfig)
    return task


def work(config: TimingConfig) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    measured = measure(config)
    write_json(Path(config.result), measured)
    timed = [entry["ratio"] for entry in measured["artifacts"].values() if "ratio" in entry]
    say(
        f"timed {len(timed)} of {len(measured['artifacts'])}, {measured['rounds']} rounds; the bare backbone takes "
        f"{measured['bare_seconds'] * 1000:.0f} ms per batch"
    )


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(TimingConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
