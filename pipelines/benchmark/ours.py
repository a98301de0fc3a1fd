"""The worker that runs this project's model: python -m pipelines.benchmark.ours.

Shapes: B rows, T tokens, D hidden size, K outputs, N sources, R bottleneck size.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fusion.backbones.load import Backbone, load_backbone
from fusion.config.compositions import CompositionConfig
from fusion.config.logger import CsvConfig, LoggerConfig
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.data.batches import Batch
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import SlotModule
from fusion.model.adapted import AdaptedModel
from fusion.runs.memory import keep_freed_memory
from fusion.tracking.tracking import build_loggers
from fusion.training.fit import make_trainer
from fusion.training.module import TaskModule, adamw
from pipelines.benchmark import floor, weights
from pipelines.benchmark.cases import ADAPTER, CLIPPED, FLOOR, FULL, FUSION, INFER, LOOP, Case, Setup
from pipelines.benchmark.measure import TokenBatch, synchronise, timed, token_batch
from pipelines.benchmark.serving import Worker, serve

TASK = TaskConfig(
    name="benchmark", text="text", labels=[str(k) for k in range(weights.OUTPUTS)], metrics=["accuracy"]
)
OPTIM = OptimConfig()


class OurModel:
    """An adapted model, the project's own training step without its loop, and its inference."""

    def __init__(self, setup: Setup, case: Case, backbone: Backbone) -> None:
        self.setup, self.case = setup, case
        self.adapted = adapted_model(setup, case, backbone).to(setup.device)
        vocabulary = backbone.model.config.vocab_size
        shape = (vocabulary, setup.batch_size, setup.tokens, weights.OUTPUTS, setup.seed)
        self.batch = batch_of(token_batch(*shape, device=setup.device))
        self.padded = batch_of(token_batch(*shape, device=setup.device, padded=True))
        penalty = {"value_penalty": CompositionConfig().value_penalty}
        self.module = TaskModule(self.adapted, [TASK], OPTIM, penalty, splits={})
        # All that a step asks Lightning's trainer for.
        self.module.trainer = cast(lightning.Trainer, SimpleNamespace(world_size=1))
        self.optimizer = self._optimizer()
        self._merged: nn.Module | None = None

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.case.method == FULL:
            self.adapted.requires_grad_(True)
            return torch.optim.AdamW(self.adapted.parameters(), lr=OPTIM.lr, fused=True)
        return adamw(self.adapted, OPTIM)

    def train(self, clip: float | None = None) -> None:
        if not self.adapted.training:  # walking through all modules is no part of a step
            self.adapted.train()
        total = torch.stack(list(self.module.losses(self.batch).values())).sum()
        self.optimizer.zero_grad()
        total.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.adapted.trainable().values()), clip)
        self.optimizer.step()

    @torch.inference_mode()
    def infer(self) -> Tensor:
        return self._inference_model()(self.batch.input_ids, self.batch.attention_mask)

    def check(self) -> dict[str, Any]:
        self.adapted.train()
        losses = {name: value.item() for name, value in self.module.losses(self.padded).items()}
        found = {"loss": losses["task"], "penalty": losses.get("value_penalty", 0.0)}
        model = self._inference_model() if self.case.work == INFER else self.adapted.eval()
        with torch.inference_mode():
            logits: Tensor = model(self.padded.input_ids, self.padded.attention_mask)
        return found | {"logits": logits.tolist()}

    def _inference_model(self) -> nn.Module:
        """With its weights folded, which is done once, when a model is loaded, and not for every batch."""
        if self._merged is None:
            self._merged = self.adapted.merged()
        return self._merged


def adapted_model(setup: Setup, case: Case, backbone: Backbone) -> AdaptedModel:
    """The model of a case, with the weights that the rival gets too."""
    slot_modules: dict[str, SlotModule] = {}
    head = TaskHead(backbone.hidden_size, weights.OUTPUTS, pooling="mean")
    if case.bottleneck:
        stored = weights.Weights(setup.weights, case.bottleneck)
        head.output.load_state_dict(stored.module("head"))
        for layer in range(backbone.layers):
            slot_modules[f"{layer}.feedforward"] = slot_module(case, stored, layer, backbone.hidden_size)
    return AdaptedModel(backbone, slot_modules, "normed", head)


def slot_module(case: Case, stored: weights.Weights, layer: int, hidden_size: int) -> SlotModule:
    """One adapter, or a fusion of the first N."""
    adapters = []
    for source in range(case.sources if case.method == FUSION else 1):
        adapter = BottleneckAdapter(hidden_size, case.bottleneck)
        for name in ("down", "up"):
            adapter.get_submodule(name).load_state_dict(stored.module(f"adapters.{source}.{layer}.{name}"))
        adapters.append(adapter)
    if case.method == ADAPTER:
        return adapters[0]
    settings = CompositionConfig()
    fused = AdapterFusion(
        AdapterBank(adapters, list(range(len(adapters))), len(adapters)),
        value_matrix=settings.value_matrix,
        temperature=settings.temperature,
        dropout=settings.dropout,
    )
    for name in ("query", "key"):
        fused.get_submodule(name).load_state_dict(stored.module(f"fusion.{layer}.{name}"))
    fused.get_submodule("value").load_state_dict(stored.module(f"fusion.{layer}.value", ("weight",)))
    return fused


def batch_of(tokens: TokenBatch) -> Batch:
    rows = len(tokens.labels)
    return Batch(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        token_type_ids=None,
        labels=tokens.labels,
        choice_counts=None,
        rows=torch.arange(rows),
        weights=torch.ones(rows, device=tokens.labels.device),
        global_rows=rows,
    )


class OurWorker(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._backbone: Backbone | None = None
        self._loops: dict[Case, OurModel] = {}
        self.commands |= {"weights": self.make_weights}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = super().prepare(request)
        self._loops.clear()
        self._backbone = load_backbone(Setup(**request["setup"]).backbone)
        config = self._backbone.model.config
        sizes = {
            "layers": self._backbone.layers,
            "hidden_size": self._backbone.hidden_size,
            "intermediate_size": config.intermediate_size,
            "heads": config.num_attention_heads,
            "vocabulary": config.vocab_size,
        }
        return answer | {"sizes": sizes}

    def make_weights(self, request: dict[str, Any]) -> dict[str, Any]:
        setup, backbone = self._setup(), self.backbone()
        weights.make(
            setup.weights,
            backbone.layers,
            backbone.hidden_size,
            request["bottleneck"],
            request["sources"],
            setup.seed,
        )
        return {}

    def backbone(self) -> Backbone:
        """A copy, since a model changes its backbone in place."""
        assert self._backbone is not None
        return copy.deepcopy(self._backbone)

    def build(self, setup: Setup, case: Case) -> OurModel:
        return OurModel(setup, case, self.backbone())

    def other_work(self, setup: Setup, case: Case, warmup: int, steps: int) -> list[float]:
        if case.work == FLOOR:
            return self._floor(setup, case, warmup, steps)
        return self._loop(setup, case, warmup, steps)

    def _floor(self, setup: Setup, case: Case, warmup: int, steps: int) -> list[float]:
        backbone = self._backbone
        assert backbone is not None
        config = backbone.model.config
        products = floor.training_step(
            floor.Sizes(
                rows=setup.batch_size,
                tokens=setup.tokens,
                hidden_size=backbone.hidden_size,
                intermediate_size=config.intermediate_size,
                heads=config.num_attention_heads,
                layers=backbone.layers,
                outputs=weights.OUTPUTS,
            ),
            bottleneck=case.bottleneck,
            sources=case.sources if case.method == FUSION else None,
        )
        dtype = torch.float32 if setup.precision == "float32" else torch.bfloat16
        return timed(floor.runner(products, setup.device, dtype), warmup, steps, setup.device)

    def _loop(self, setup: Setup, case: Case, warmup: int, steps: int) -> list[float]:
        """Seconds a step in Lightning's loop, or of the same steps of the same model without it.

        Both clip gradients, as the project's trainer does. It is the mean over at least as many steps as lie
        between two lines of the log, since those steps are the dear ones: a median would leave them out.
        """
        steps = max(steps, TrainerConfig().log_every_n_steps or 1)
        key = replace(case, work=LOOP)
        if key not in self._loops:
            self._loops[key] = self.build(setup, case)
        model = self._loops[key]
        clip = TrainerConfig().gradient_clip_val
        if case.work == CLIPPED:
            seconds = timed(self.in_precision(lambda: model.train(clip)), warmup, steps, setup.device)
            return [statistics.fmean(seconds)]
        return [in_lightning(model, setup, warmup, steps)]


class Stopwatch(lightning.Callback):
    """When each batch began: from one to the next lies all that the loop does."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.begun: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        synchronise(self._device)
        self.begun.append(time.perf_counter())


def in_lightning(model: OurModel, setup: Setup, warmup: int, steps: int) -> float:
    """Mean seconds a step in the project's own Trainer, with the CSV logger."""
    batches = [model.batch] * (warmup + steps + 1)  # the last one's beginning ends the last timed one
    loader: DataLoader[Any] = DataLoader(cast(Any, batches), batch_size=None)
    watch = Stopwatch(setup.device)
    module = TaskModule(model.adapted, [TASK], OPTIM, model.module.loss_weights, splits={})
    with tempfile.TemporaryDirectory(dir=setup.weights) as folder:
        loggers = build_loggers(
            LoggerConfig(csv=CsvConfig()),
            directory=Path(folder),
            name="loop",
            group="benchmark",
            job_type="benchmark",
            tags=[],
            config_values={},
        )
        settings = TrainerConfig(
            accelerator="gpu" if setup.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if setup.precision == "bf16" else None,
            max_epochs=1,
            enable_checkpointing=False,
        )
        trainer = make_trainer(settings, [watch], loggers)
        trainer.fit(module, loader)
    return (watch.begun[-1] - watch.begun[warmup]) / steps


if __name__ == "__main__":
    keep_freed_memory()  # as a training does
    serve(OurWorker())
