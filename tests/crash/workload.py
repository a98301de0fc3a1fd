"""Commands of the crash test: a small random backbone, three small tasks, and a dozen kinds of training runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

TASKS = ("films", "books", "plays")
NAME = "made"  # artifact of every run

# Paths are relative to OUTPUT/FOLDER/RUN, the working directory of each run.
SHARED = (
    "data.dir=../../work/data",
    "data.cache_dir=cache",
    "data.max_length=16",
    "backbone.name_or_path=../../work/backbone",
    "backbone.pooling=mean",
    "optim.lr=5e-3",
    "optim.patience=null",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "head.dropout=0.3",
    "logger=none",
    "store=store",
)
PROCESSES = {1: ("data.batch_size=8",), 2: ("data.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp")}
EVERY_BATCH = ("checkpoint_minutes=0",)
ADAPTER = ("fusion.stage1", "+task=films", "adapter.dropout=0.2")
FUSION = ("fusion.stage2", "+task=films", "composition.dropout=0.1")
SOURCES = ("sources=[books,plays]",)
OTHER_STORES = ("sources=[../../preparations/books/store/books,../../preparations/plays/store/plays]",)
CACHE = ("backbone.cache=float32",)


@dataclass(frozen=True)
class Kind:
    """One kind of training run.

    Attributes:
        overrides: the module and its overrides.
        copies: preparations whose artifacts are copied to its store.
        reads: preparations whose artifacts are read from their own stores.
    """

    name: str
    overrides: tuple[str, ...]
    processes: int = 1
    copies: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        module, *overrides = self.overrides
        return [module, *SHARED, *PROCESSES[self.processes], f"name={NAME}", *overrides]


def _kind(name: str, *overrides: str, processes: int = 1) -> Kind:
    copies: tuple[str, ...] = ("books", "plays") if SOURCES[0] in overrides else ()
    copies += ("older",) if "overwrite=true" in overrides else ()
    reads = ("books", "plays") if OTHER_STORES[0] in overrides else ()
    return Kind(name, overrides, processes, copies, reads)


# Runs that others require: the sources, and an artifact to overwrite.
PREPARATIONS = {
    "books": _kind("books", "fusion.stage1", "+task=books", "name=books"),
    "plays": _kind("plays", "fusion.stage1", "+task=plays", "name=plays"),
    "older": _kind("older", "fusion.stage1", "+task=films", "seed=7"),
}
_ACCUMULATE = "trainer.accumulate_grad_batches=3"
_HALF_EPOCH = "trainer.val_check_interval=0.5"
_KINDS = (
    _kind("adapter", *ADAPTER, *EVERY_BATCH),
    _kind("fusion in two processes", *FUSION, *SOURCES, *EVERY_BATCH, processes=2),
    _kind("accumulating", *ADAPTER, *EVERY_BATCH, _ACCUMULATE),
    _kind("fusion", *FUSION, *SOURCES, *EVERY_BATCH),
    _kind("adapter in two processes", *ADAPTER, *EVERY_BATCH, processes=2),
    _kind("evaluated often", *ADAPTER, *EVERY_BATCH, "trainer.val_check_interval=0.25"),
    _kind("cached features", *ADAPTER, *EVERY_BATCH, *CACHE, "adapter.layers=last:2"),
    _kind("overwriting", *ADAPTER, *EVERY_BATCH, "overwrite=true"),
    _kind(
        "accumulating, overwriting, in two processes",
        *(*ADAPTER, *EVERY_BATCH, _ACCUMULATE, _HALF_EPOCH, "overwrite=true"),
        processes=2,
    ),
    _kind("a checkpoint per epoch", *ADAPTER),
    _kind("fusion of another store's sources", *FUSION, *OTHER_STORES, *EVERY_BATCH),
    _kind(
        "fusion with cached features",
        *(*FUSION, *SOURCES, *EVERY_BATCH, *CACHE, "composition.layers=last:2", _HALF_EPOCH),
    ),
)
KINDS = {kind.name: kind for kind in _KINDS}


def write_work(folder: Path) -> None:
    """Write the tasks (data and task files) and the backbone."""
    from transformers.utils.logging import disable_progress_bar

    from tests.bench import LABELS, write_task
    from tests.tiny_backbone import save_backbone

    disable_progress_bar()
    tasks = folder / "conf" / "task"
    tasks.mkdir(parents=True)
    for name in TASKS:
        write_task(folder / "data", name)
        task = {"kind": "classification", "text": "text", "labels": LABELS, "metrics": ["accuracy"]}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    save_backbone(folder / "backbone")
