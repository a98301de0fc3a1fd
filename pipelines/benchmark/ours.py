"""The worker that runs this project's model: python -m pipelines.benchmark.ours."""

from __future__ import annotations

import copy
import functools
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from fusion.backbones.load import Backbone, load_backbone
from fusion.backbones.slots import SlotAddress
from fusion.config.compositions import CompositionConfig
from fusion.config.task import TaskConfig
from fusion.config.training import CsvConfig, LoggerConfig, OptimConfig, TrainerConfig
from fusion.data.batches import Batch
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import SlotModule
from fusion.model.adapted import AdaptedModel
from fusion.runs.memory import keep_freed_memory
from fusion.runs.run import Run
from fusion.tracking.loggers import build_loggers
from fusion.training.callbacks import Best, ProgressBar
from fusion.training.fit import make_trainer
from fusion.training.module import Objective, TaskModule, adamw
from pipelines.benchmark import cases
from pipelines.benchmark.cases import Case, Setup, fill
from pipelines.benchmark.random_backbone import random_model
from pipelines.benchmark.worker import Model, TokenBatch, Worker, serve, synchronise, timed, token_batch

LABELS = [str(k) for k in range(cases.OUTPUTS)]
TASK = TaskConfig(name="benchmark", text="text", labels=LABELS, metrics=["accuracy"])
OPTIM = OptimConfig(lr=1e-4)
aten = torch.ops.aten
FIRST_OPERAND = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}


class OurModel(Model):
    """An adapted model with this project's training step, outside Lightning's loop, and its inference."""

    def __init__(self, setup: Setup, case: Case, backbone: Backbone) -> None:
        self.case = case
        self.adapted = adapted_model(setup, case, backbone).to(setup.device)
        vocabulary = backbone.model.config.vocab_size
        self.batch = batch_of(token_batch(setup, vocabulary))
        self.padded = batch_of(token_batch(setup, vocabulary, padded=True))
        objective = Objective({"value_penalty": CompositionConfig().value_penalty})
        self.module = TaskModule(self.adapted, [TASK], OPTIM, objective, splits={})
        # A step reads nothing else of Lightning's trainer.
        self.module.trainer = cast(lightning.Trainer, SimpleNamespace(world_size=1))
        if case.method == cases.FULL:
            self.adapted.requires_grad_(True)
            parameters = self.adapted.parameters()
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=OPTIM.rate, fused=True)
        else:
            self.optimizer = adamw(self.adapted, OPTIM)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.adapted.training:  # not called in every step, since it iterates over all modules
            self.adapted.train()
        return self.module.losses(batch)

    def train(self, clip: float | None = None) -> None:
        total = torch.stack(list(self.losses(self.batch).values())).sum()
        self.optimizer.zero_grad()
        total.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.adapted.trainable().values()), clip)
        self.optimizer.step()

    def scores(self, batch: Batch) -> Tensor:
        model = self.merged if self.case.work == cases.INFER else self.adapted.eval()
        return model(batch.input_ids, batch.attention_mask)

    @functools.cached_property
    def merged(self) -> nn.Module:
        """The model with merged weights, computed once as when a model is loaded."""
        return self.adapted.merged()


def adapted_model(setup: Setup, case: Case, backbone: Backbone) -> AdaptedModel:
    """Build the model of a case, with the same weights as the baseline's."""
    slot_modules: dict[str, SlotModule] = {}
    head = TaskHead(backbone.hidden_size, cases.OUTPUTS, pooling="mean")
    if case.bottleneck:
        fill(head.output, setup, "head")
        for stack, depth in backbone.depths.items():
            for layer in range(depth):
                slot = str(SlotAddress(stack, layer, "feedforward"))
                slot_modules[slot] = slot_module(setup, case, layer, backbone.hidden_size)
    return AdaptedModel(backbone, slot_modules, "normed", head)


def slot_module(setup: Setup, case: Case, layer: int, hidden_size: int) -> SlotModule:
    """Build a single adapter, or a fusion of the case's sources."""
    adapters = []
    for source in range(case.sources if case.method == cases.FUSION else 1):
        adapter = BottleneckAdapter(hidden_size, case.bottleneck)
        for name in ("down", "up"):
            fill(adapter.get_submodule(name), setup, f"adapter {source}.{layer}.{name}")
        adapters.append(adapter)
    if case.method == cases.ADAPTER:
        return adapters[0]
    settings = CompositionConfig()
    fusion = AdapterFusion(
        AdapterBank(adapters, list(range(len(adapters))), len(adapters)),
        value_matrix=settings.value_matrix,
        temperature=settings.temperature,
        dropout=settings.dropout,
    )
    for name in ("query", "key", "value"):
        fill(fusion.get_submodule(name), setup, f"fusion {layer}.{name}")
    return fusion


def batch_of(tokens: TokenBatch) -> Batch:
    rows = len(tokens.labels)
    return Batch(
        **tokens._asdict(),
        token_type_ids=None,
        choice_counts=None,
        rows=torch.arange(rows),
        weights=torch.ones(rows, device=tokens.labels.device),
        global_rows=rows,
    )


class Products(TorchDispatchMode):
    """Records the matrix products of a step, and runs them alone as a lower bound. Attention must not be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._made: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FIRST_OPERAND:
            left, right = args[FIRST_OPERAND[func] : FIRST_OPERAND[func] + 2]
            self.calls.append((self._like(left), self._like(right), torch.empty_like(result)))
        return result

    def _like(self, operand: Tensor) -> Tensor:
        # Operands of the same layout share memory.
        layout = (operand.shape, operand.stride(), operand.dtype)
        if layout not in self._made:
            self._made[layout] = torch.empty_strided(*layout[:2], dtype=operand.dtype, device=operand.device).normal_()
        return self._made[layout]

    @torch.inference_mode()
    def run(self) -> None:
        for left, right, out in self.calls:
            torch.matmul(left, right, out=out)


class OurWorker(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._backbones: dict[str, Backbone] = {}  # by dtype

    def prepare(self, setup: dict[str, Any]) -> dict[str, Any]:
        self._backbones.clear()
        return super().prepare(setup)

    def build(self, case: Case) -> OurModel:
        setup = self.setup
        if case.dtype not in self._backbones:
            if setup.model_type:
                backbone = random_model(setup.model_type, setup.settings, case.dtype)
            else:
                backbone = load_backbone(setup.backbone, dtype=case.dtype)
            self._backbones[case.dtype] = backbone
        backbone = copy.deepcopy(self._backbones[case.dtype])  # a model changes its backbone in place
        if case.work == cases.LOWER_BOUND:  # the matrix products of eager attention are separate operations
            backbone.model.set_attn_implementation("eager")
        return OurModel(self.setup, case, backbone)

    def time(self, case: Case, warmup: int, steps: int) -> list[float]:
        setup = self.setup
        if case.work == cases.LOWER_BOUND:
            step = self.in_precision(self.build(case).train)
            with Products() as products:
                step()
            return timed(products.run, warmup, steps, setup.device)
        if case.work not in (cases.LOOP, cases.CLIPPED):
            return super().time(case, warmup, steps)
        # Both clip gradients, as the project's trainer does. The mean is taken over at least one logging interval:
        # steps that are logged take longer, and a median would ignore them.
        trainer = TrainerConfig()
        steps = max(steps, trainer.log_every_n_steps or 1)
        model = cast(OurModel, self.model(replace(case, work=cases.LOOP)))
        if case.work == cases.LOOP:
            return [in_lightning(model, setup, warmup, steps)]
        step = self.in_precision(lambda: model.train(trainer.gradient_clip_val))
        return [statistics.fmean(timed(step, warmup, steps, setup.device))]


def in_lightning(model: OurModel, setup: Setup, warmup: int, steps: int) -> float:
    """Return the mean seconds per step in the project's Trainer, with the CSV logger and the progress bar."""
    batches = [model.batch] * (warmup + steps + 1)  # the start of the last batch ends the last timed step
    loader: DataLoader[Any] = DataLoader(cast(Any, batches), batch_size=None)
    started: list[float] = []

    def record_start(*_: Any) -> None:
        """Record the start of a batch; the time between two starts covers everything that the loop does."""
        synchronise(setup.device)
        started.append(time.perf_counter())

    watch = LambdaCallback(on_train_batch_start=record_start)
    module = TaskModule(model.adapted, [TASK], OPTIM, model.module.objective, splits={})
    settings = TrainerConfig(
        accelerator="gpu" if setup.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if setup.precision == "bf16" else None,
        max_epochs=1,
        enable_checkpointing=False,
    )
    # The progress bar is only drawn on a terminal.
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys.stdout, "isatty", return_value=True):
        run = Run("benchmark", Path(folder), (), {}, "benchmark")
        loggers = build_loggers(LoggerConfig(csv=CsvConfig()), run, name="loop", tags=[])
        make_trainer(settings, [watch, ProgressBar(Best("validation/accuracy", None))], loggers).fit(module, loader)
    return (started[-1] - started[warmup]) / steps


if __name__ == "__main__":
    keep_freed_memory()  # as the training commands do
    serve(OurWorker())
