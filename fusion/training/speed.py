"""Measurement of training time, throughput, memory and energy."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Energy consumed by the CPUs since construction, for all programs, read from Linux's powercap counters (RAPL).

    A counter may overflow at most once. On many machines the counters do not exist or only root can read them.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        # `intel-rapl:0` is a CPU package (also on AMD); `intel-rapl:0:1` is a subzone of it.
        self._zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._before = [_read(zone / "energy_uj") for zone in self._zones]

    def joules(self) -> float | None:
        """Return the energy in joules, or `None` if a counter cannot be read."""
        total = 0
        for zone, before in zip(self._zones, self._before, strict=True):
            now, maximum = _read(zone / "energy_uj"), _read(zone / "max_energy_range_uj")
            if before is None or now is None or (now < before and maximum is None):
                return None
            total += now - before + (maximum or 0) * (now < before)
        return total * 1e-6 if self._zones else None


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class Speed(Callback):
    """Callback that measures a training run from `start` on, in resumed runs plus the time before the checkpoint.

    The time per step includes forward, backward and optimizer step, but not data loading.
    """

    def __init__(self) -> None:
        self._steps: list[float] = []  # seconds
        self._examples = self._tokens = 0
        self._before: tuple[float, float | None] = (0.0, 0.0)  # seconds and joules up to the checkpoint

    def start(self) -> None:
        self._started, self._energy = time.monotonic(), EnergyMeter()

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():  # kernels run asynchronously
            torch.cuda.synchronize()
        self._steps.append(time.monotonic() - self._step_started)
        self._examples += batch.rows.numel()
        self._tokens += batch.input_ids.numel()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"seen": [self._examples, self._tokens], "spent": list(self._elapsed())}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._examples, self._tokens = checkpoint["seen"]
        self._before = checkpoint["spent"]

    def _elapsed(self) -> tuple[float, float | None]:
        """Return the elapsed seconds and the energy in joules (`None` if unknown)."""
        (seconds, joules), used = self._before, self._energy.joules()
        total = None if joules is None or used is None else joules + used
        return seconds + time.monotonic() - self._started, total

    def result(self, world_size: int) -> dict[str, float | None]:
        """Return seconds in total (with validation) and per step (median), examples and tokens (with padding) trained
        per second, peak memory in bytes, and the energy in joules if the machine measures it.
        """
        seconds, joules = self._elapsed()
        return {
            "seconds": seconds,
            "seconds_per_step": statistics.median(self._steps) if self._steps else None,
            "examples_per_second": self._examples * world_size / seconds,
            "tokens_per_second": self._tokens * world_size / seconds,
            "peak_memory_bytes": _peak_memory(),
            **({} if joules is None else {"energy_joules": joules}),
        }


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
