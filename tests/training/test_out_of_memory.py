"""Out of memory: the error names the step, the batch and the settings that take less."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.config.model import BackboneConfig
from fusion.errors import TrainingError
from fusion.model.adapted import AdaptedModel
from fusion.training.callbacks import is_out_of_memory
from tests.bench import Bench, same, trainer_config

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTING = "or backbone.gradient_checkpointing=true"
CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 1 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[AdaptedModel, torch.Tensor], bool]], None]:
    """`fits(check)` makes the model run out of memory if `check(model, input_ids)` is false."""
    forward = AdaptedModel.forward

    def use(check: Callable[[AdaptedModel, torch.Tensor], bool]) -> None:
        def limited(self: AdaptedModel, input_ids: torch.Tensor, *values: Any, **named: Any) -> torch.Tensor:
            if not check(self, input_ids):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return forward(self, input_ids, *values, **named)

        monkeypatch.setattr(AdaptedModel, "forward", limited)

    return use


def failing(bench: Bench, **changes: Any) -> tuple[str, str]:
    """The two lines of the message."""
    with pytest.raises(TrainingError) as caught:
        bench.stage1("films", **changes)
    assert not (bench.folder / "store" / "films").exists()
    first, second = str(caught.value).splitlines()
    return first, second


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        ({"batch_size": 8}, "data.batch_size=4 trainer.accumulate_grad_batches=6"),
        ({"tokens_per_batch": 100}, "data.tokens_per_batch=50 trainer.accumulate_grad_batches=6"),
        ({"batch_size": 1}, "a data.max_length below 16"),
    ],
)
def test_in_training(bench: Bench, fits: Any, data: dict[str, Any], advice: str) -> None:
    fits(lambda *_: False)
    settings = dataclasses.replace(bench.data, **data)
    first, second = failing(bench, data=settings, trainer=trainer_config(max_epochs=1, accumulate_grad_batches=3))
    assert re.match(r"out of memory at step 0, in a batch of \d+ examples x \d+ tokens; no artifact was saved", first)
    assert "Tried to allocate 2 GiB" in first
    assert second.startswith(f"Try {advice}, {CHECKPOINTING}")


def test_in_a_validation(bench: Bench, fits: Any) -> None:
    """Without gradients there is nothing to recompute."""
    fits(lambda model, ids: model.training or len(ids) <= 4)
    first, second = failing(bench, trainer=trainer_config(max_epochs=1))
    assert first.startswith("out of memory in the validation after 8 steps, in a batch of 8 examples x ")
    assert second == "Try data.batch_size=4 trainer.accumulate_grad_batches=2"


def test_with_gradient_checkpointing_the_run_resumes(bench: Bench, fits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    two = trainer_config()
    bench.stage1("films", trainer=two, store=str(bench.folder / "whole"))
    with monkeypatch.context():  # a batch of the second epoch does not fit

        def check(model: AdaptedModel, ids: torch.Tensor) -> bool:
            calls.append(len(ids))
            return model.gradient_checkpointing or len(calls) <= 13  # the first call is for the expected memory

        fits(check)
        first, second = failing(bench, trainer=two)
    assert "at step 10" in first and CHECKPOINTING in second
    saving = BackboneConfig(name_or_path=str(bench.backbone), pooling="mean", gradient_checkpointing=True)
    assert bench.stage1("films", trainer=two, backbone=saving)["epochs"] == 2
    assert same(bench.weights("films"), bench.weights("films", "whole"))


def test_other_errors_are_not_changed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(AdaptedModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        bench.stage1("films")


def test_errors_of_allocators() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError(CPU_ERROR))
    behind = ValueError("compiling failed")
    behind.__cause__ = RuntimeError("CUDA error: out of memory")
    assert is_out_of_memory(behind)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory"))


PROGRAM = """
import dataclasses, resource, sys
from pathlib import Path
from tests.bench import Bench, write_task
from tests.tiny_backbone import save_backbone
from fusion.config.training import TrainerConfig
from fusion.errors import TrainingError
from fusion.training import fit as fit_module

folder, limit, rows, times = Path(sys.argv[1]), *map(int, sys.argv[2:])
bench = Bench(folder / "work", save_backbone(folder / "backbone", hidden_size=256))
bench.tasks["many"] = write_task(folder / "work" / "data", "many", rows=512)
make = fit_module.make_trainer

def limited(*arguments):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit * 2**20, resource.RLIM_INFINITY))
    return make(*arguments)

fit_module.make_trainer = limited
trainer = TrainerConfig(accelerator="cpu", max_epochs=1, accumulate_grad_batches=times, enable_progress_bar=False)
try:
    bench.stage1("many", data=dataclasses.replace(bench.data, batch_size=rows), trainer=trainer)
    print("trained")
except TrainingError as error:
    print(error)
"""


def train_within(folder: Path, megabytes: int, rows: int, times: int) -> str:
    """512 rows of a backbone of width 256, with this much memory beyond what is allocated when training starts."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *map(str, (megabytes, rows, times))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on the address space")
def test_a_real_limit_on_memory(tmp_path: Path) -> None:
    """Under RLIMIT_AS the allocator fails; a batch that is small enough trains under the same limit."""
    first, second = train_within(tmp_path / "1", 80, 512, 1).splitlines()
    assert first.startswith("out of memory at step 0, in a batch of 512 examples x ")
    assert second.startswith("Try data.batch_size=256 trainer.accumulate_grad_batches=2, or ")
    assert train_within(tmp_path / "2", 80, 16, 32) == "trained"
