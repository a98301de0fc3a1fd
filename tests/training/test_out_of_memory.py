"""Too little memory: the step, the batch and what fits are said, and what is said to fit does."""

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
from fusion.config.training import TrainerConfig
from fusion.errors import TrainingError
from fusion.model.adapted import AdaptedModel
from fusion.training import out_of_memory
from fusion.training.out_of_memory import is_out_of_memory
from tests.bench import Bench, same

ROOT = Path(__file__).resolve().parents[2]
AsLongAs = Callable[[AdaptedModel, torch.Tensor], bool]
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 1 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[AsLongAs], list[int]]:
    """`room_for(check)` makes the model raise where check(model, input_ids) is false; gives the sequences it was asked for."""
    forward = AdaptedModel.forward

    def use(check: AsLongAs) -> list[int]:
        tried: list[int] = []

        def limited(self: AdaptedModel, input_ids: torch.Tensor, *values: Any, **named: Any) -> torch.Tensor:
            tried.append(len(input_ids))
            if not check(self, input_ids):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return forward(self, input_ids, *values, **named)

        monkeypatch.setattr(AdaptedModel, "forward", limited)
        return tried

    return use


def failing(bench: Bench, **changes: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        bench.stage1("films", **changes)
    assert not (bench.folder / "store" / "films").exists()
    said = str(caught.value)
    assert len(said.splitlines()) == 2
    return said


def trainer(**settings: Any) -> TrainerConfig:
    return TrainerConfig(accelerator="cpu", max_epochs=1, enable_progress_bar=False, **settings)


def batches(bench: Bench, **settings: Any) -> Any:
    return dataclasses.replace(bench.data, **settings)


@pytest.mark.parametrize(
    ("room", "size", "accumulate", "fits"),
    [(3, 8, 1, (2, 4)), (4, 8, 3, (4, 6)), (7, 12, 1, (6, 2)), (1, 5, 1, (1, 5))],
)
def test_the_largest_part_of_a_batch_that_fits(
    bench: Bench,
    room_for: Callable[[AsLongAs], list[int]],
    room: int,
    size: int,
    accumulate: int,
    fits: tuple[int, int],
) -> None:
    tried = room_for(lambda _, ids: len(ids) <= room)
    asked = trainer(accumulate_grad_batches=accumulate)
    said = failing(bench, data=batches(bench, batch_size=size), trainer=asked)
    first, second = said.splitlines()
    assert re.fullmatch(
        rf"out of memory at step 0, in a batch of {size} rows of up to \d+ tokens \(data\.batch_size={size} "
        rf"trainer\.accumulate_grad_batches={accumulate}\); nothing is stored\.",
        first,
    )
    rows, times = fits
    override = f"data.batch_size={rows} trainer.accumulate_grad_batches={times}"
    assert second == f"{override} fits, takes as much a step, and begins anew"
    assert tried[0] == size and tried[1:] == [*sorted(tried[1:-1], reverse=True), size]  # that one recomputed
    bench.stage1(
        "films", data=batches(bench, batch_size=rows), trainer=trainer(accumulate_grad_batches=times)
    )


def test_gradient_checkpointing_goes_on_where_the_run_was(
    bench: Bench, room_for: Callable[[AsLongAs], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    two = TrainerConfig(accelerator="cpu", max_epochs=2, enable_progress_bar=False)
    bench.stage1("films", trainer=two, store=str(bench.folder / "whole"))
    with monkeypatch.context():
        # The second epoch meets a batch that does not fit.
        room_for(lambda model, ids: model.gradient_checkpointing or begun.append(0) or len(begun) <= 12)  # type: ignore[func-returns-value]
        said = failing(bench, trainer=two)
    assert "at step 10" in said
    assert said.endswith(
        "backbone.gradient_checkpointing=true fits, takes longer, and goes on where this run was"
    )
    saving = BackboneConfig(name_or_path=str(bench.backbone), pooling="mean", gradient_checkpointing=True)
    assert bench.stage1("films", trainer=two, backbone=saving)["epochs"] == 2
    assert same(bench.weights("films"), bench.weights("films", "whole"))


def test_not_even_one_row(bench: Bench, room_for: Callable[[AsLongAs], list[int]]) -> None:
    room_for(lambda *_: False)
    assert re.search(r"\nNot even one row of \d+ tokens fits: lower data\.max_length=16$", failing(bench))


def test_both_together(bench: Bench, room_for: Callable[[AsLongAs], list[int]]) -> None:
    room_for(lambda model, ids: model.gradient_checkpointing and len(ids) <= 2)
    override = "backbone.gradient_checkpointing=true data.batch_size=2 trainer.accumulate_grad_batches=4"
    assert failing(bench).splitlines()[1] == f"{override} fits, takes as much a step, and begins anew"


def test_batches_by_tokens(bench: Bench, room_for: Callable[[AsLongAs], list[int]]) -> None:
    room_for(lambda _, ids: ids.numel() <= 30)
    said = failing(bench, data=batches(bench, tokens_per_batch=100))
    assert "(data.tokens_per_batch=100 trainer.accumulate_grad_batches=1)" in said
    assert said.splitlines()[1].startswith("data.tokens_per_batch=25 trainer.accumulate_grad_batches=4 fits")
    bench.stage1("films", data=batches(bench, tokens_per_batch=25))


def test_in_an_evaluation(bench: Bench, room_for: Callable[[AsLongAs], list[int]]) -> None:
    """Without gradients there is nothing to compute again; the advice is tried without them, too."""
    room_for(lambda model, ids: model.training or len(ids) <= 4)
    first, second = failing(bench).splitlines()
    assert first.startswith("out of memory in the evaluation after 8 steps, in a batch of 8 rows")
    assert (
        second
        == "data.batch_size=4 trainer.accumulate_grad_batches=2 fits, takes as much a step, and begins anew"
    )


def test_a_trial_that_takes_too_long_or_fails_still_says_something(
    bench: Bench, room_for: Callable[[AsLongAs], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = room_for(lambda _, ids: len(ids) <= 3)
    monkeypatch.setattr(out_of_memory, "SECONDS", -1.0)
    assert "\nLower data.batch_size and raise trainer.accumulate_grad_batches" in failing(bench)
    assert len(tried) == 1


def test_other_errors_stay_what_they_are(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(AdaptedModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        bench.stage1("films")


def test_an_error_that_may_mean_it_counts_where_less_gets_through(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = AdaptedModel.forward
    room = 4

    def limited(self: AdaptedModel, input_ids: torch.Tensor, *values: Any, **named: Any) -> torch.Tensor:
        if len(input_ids) > room:
            raise RuntimeError("could not create a primitive")
        return forward(self, input_ids, *values, **named)

    monkeypatch.setattr(AdaptedModel, "forward", limited)
    assert "data.batch_size=4 trainer.accumulate_grad_batches=2 fits" in failing(bench)
    room = 0
    with pytest.raises(RuntimeError, match="could not create a primitive"):
        bench.stage1("films")


def test_what_allocators_say() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError(CPU_SAYS))
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
    """512 rows of a backbone of width 256, with so much memory beyond what is taken when the training begins."""
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
    """Under RLIMIT_AS the allocator fails for real; what the message says then trains under the same limit."""
    first, second = train_within(tmp_path / "1", 80, 512, 1).splitlines()
    assert first.startswith("out of memory at step 0, in a batch of 512 rows of up to ")
    fits = re.match(r"data\.batch_size=(\d+) trainer\.accumulate_grad_batches=(\d+) fits", second)
    assert fits is not None, second
    rows, times = int(fits[1]), int(fits[2])
    assert rows * times == 512
    assert train_within(tmp_path / "2", 80, rows, times) == "trained"
