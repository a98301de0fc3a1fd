"""The worker that runs AdapterHub's `adapters` on the same weights: python -m pipelines.benchmark.baseline.

It runs in its own environment and imports only `cases` and `worker` from this project.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters.composition import Fuse
from adapters.methods.modeling import BertFusion
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, TrainingArguments

from pipelines.benchmark.cases import ADAPTER, FULL, FUSION, OUTPUTS, Case, Setup, fill
from pipelines.benchmark.worker import Model, TokenBatch, Worker, serve, token_batch


class BaselineModel(Model):
    """The baseline's model of a case, with the training step of its `AdapterTrainer`."""

    def __init__(self, setup: Setup, case: Case, pretrained: Any) -> None:
        self.case = case
        self.model = pretrained
        self.head = nn.Linear(self.model.config.hidden_size, OUTPUTS)
        if case.bottleneck:
            fill(self.head, setup, "head")
            add_adapters(self.model, setup, case)
            self.model.to(getattr(torch, case.dtype))  # adapters are created in float32
        else:
            self.model.requires_grad_(case.method == FULL)
        if not case.dropout:
            # The fusion layers replace a configured dropout of 0.0 by 0.1, so the modules are changed instead.
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.model.to(setup.device)
        self.head.to(setup.device)
        vocabulary = self.model.config.vocab_size
        self.batch = token_batch(setup, vocabulary)
        self.padded = token_batch(setup, vocabulary, padded=True)
        training = [p for p in [*self.model.parameters(), *self.head.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.AdamW(training, lr=1e-4, weight_decay=0.0, fused=True)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the logits, (B, K): mean over non-padding tokens and a linear layer, as in this project's head."""
        decoder = {"decoder_input_ids": batch.input_ids} if self.model.config.is_encoder_decoder else {}
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **decoder)
        hidden = output.last_hidden_state
        mask = batch.attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).to(self.head.weight.dtype))

    def task_loss(self, batch: TokenBatch) -> Tensor:
        if not self.model.training:  # not called in every step, since it iterates over all modules
            self.model.train()
        return F.cross_entropy(self.forward(batch).float(), batch.labels)

    def train(self) -> None:
        self.task_loss(self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.case.method == FUSION:
            # A callback of `AdapterTrainer` does this after a step, so that the value matrices have the gradient of
            # the penalty in the next one.
            self.model.get_fusion_regularization_loss().backward()

    def losses(self, batch: TokenBatch) -> dict[str, Tensor]:
        losses = {"task": self.task_loss(batch)}
        if self.case.method == FUSION:
            losses["value_penalty"] = self.model.get_fusion_regularization_loss()
        return losses

    def scores(self, batch: TokenBatch) -> Tensor:
        if self.model.training:
            self.model.eval()
        return self.forward(batch)


def add_adapters(model: Any, setup: Setup, case: Case) -> None:
    """Add adapters with this project's weights, activate one or fuse all, and freeze everything else."""
    names = [f"source{n}" for n in range(case.sources if case.method == FUSION else 1)]
    adapters.init(model)
    # Pfeiffer adapters: the input is LN(h + a), the residual is h.
    factor = model.config.hidden_size / case.bottleneck
    settings = adapters.SeqBnConfig(reduction_factor=factor, non_linearity="relu")
    for source, name in enumerate(names):
        model.add_adapter(name, config=settings)
        for layer, places in {} if setup.model_type else model.get_adapter(name).items():
            (adapter,) = places.values()
            fill(adapter.adapter_down[0], setup, f"adapter {source}.{layer}.down")
            fill(adapter.adapter_up, setup, f"adapter {source}.{layer}.up")
    if case.method == ADAPTER:
        model.train_adapter(names[0])
        return
    model.add_adapter_fusion(Fuse(*names), adapters.AdapterFusionConfig.load("dynamic"))
    model.train_adapter_fusion(Fuse(*names))
    if setup.model_type:
        return
    fusions = [module for module in model.modules() if isinstance(module, BertFusion)]
    assert len(fusions) == model.config.num_hidden_layers
    for layer, fusion in enumerate(fusions):
        for name in ("query", "key", "value"):
            fill(fusion.get_submodule(name), setup, f"fusion {layer}.{name}")


class BaselineWorker(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._pretrained: dict[tuple[bool, str], nn.Module] = {}

    def prepare(self, setup: dict[str, Any]) -> dict[str, Any]:
        versions = {"adapters": adapters.__version__, "transformers": transformers.__version__}
        self._pretrained.clear()
        return super().prepare(setup) | versions

    def build(self, case: Case) -> BaselineModel:
        setup = self.setup
        if (key := (case.dropout, case.dtype)) not in self._pretrained and setup.model_type:
            config = AutoConfig.for_model(setup.model_type, **setup.settings)
            config.use_cache = False
            self._pretrained[key] = AutoModel.from_config(config, trust_remote_code=False).to(
                getattr(torch, case.dtype)
            )
        elif key not in self._pretrained:
            off = {} if case.dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = AutoConfig.from_pretrained(self.setup.backbone, **off)
            # With its default attention (SDPA). The pooler is not used.
            self._pretrained[key] = AutoModel.from_pretrained(
                self.setup.backbone, config=config, dtype=getattr(torch, case.dtype), add_pooling_layer=False
            )
        return BaselineModel(self.setup, case, copy.deepcopy(self._pretrained[key]))

    def epoch(self, rows: str, sources: int, rate: float, max_length: int, output: str) -> float:
        """Train for an epoch and evaluate, as the baseline's example script does. Returns the elapsed time in seconds.

        `rows` is a JSON file with the texts and labels of both splits. With `sources=0`, a single adapter is trained.
        """
        setup = self.setup
        splits = json.loads(Path(rows).read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(setup.backbone)
        torch.manual_seed(setup.seed)
        model = adapters.AutoAdapterModel.from_pretrained(setup.backbone, dtype=torch.float32)
        model.add_classification_head("task", num_labels=len(set(splits["train"]["labels"])))
        names = [f"source{n}" for n in range(sources)] or ["task"]
        for name in names:
            model.add_adapter(name, config=adapters.SeqBnConfig())
        if sources:
            model.add_adapter_fusion(Fuse(*names), "dynamic")
            model.train_adapter_fusion(Fuse(*names))
        else:
            model.train_adapter("task")
        model.active_head = "task"
        trainer = adapters.AdapterTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=output,
                per_device_train_batch_size=setup.batch_size,
                per_device_eval_batch_size=setup.batch_size,
                learning_rate=rate,
                num_train_epochs=1,
                eval_strategy="epoch",
                report_to=[],
                use_cpu=setup.device == "cpu",
                seed=setup.seed,
            ),
            train_dataset=padded(splits["train"], tokenizer, max_length),
            eval_dataset=padded(splits["validation"], tokenizer, max_length),
        )
        return float(trainer.train().metrics["train_runtime"])


def padded(split: dict[str, Any], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    columns = [list(column) for column in zip(*split["texts"], strict=True)]
    encoded = tokenizer(*columns, padding="max_length", max_length=max_length, truncation=True)
    return [
        {key: values[row] for key, values in encoded.items()} | {"labels": label}
        for row, label in enumerate(split["labels"])
    ]


if __name__ == "__main__":
    serve(BaselineWorker())
