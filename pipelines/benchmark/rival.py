"""The worker that runs AdapterHub's `adapters` on the same weights: python -m pipelines.benchmark.rival.

It runs in the rival's own environment and imports nothing of ours but this package's plain parts.

Shapes: B rows, T tokens, D hidden size, K outputs, N sources, R bottleneck size.
"""

from __future__ import annotations

import copy
from typing import Any

import adapters
import torch
import transformers
from adapters.composition import Fuse
from adapters.methods.modeling import BertFusion
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from pipelines.benchmark import rival_epoch, weights
from pipelines.benchmark.cases import ADAPTER, FULL, FUSION, Case, Setup
from pipelines.benchmark.measure import TokenBatch, token_batch
from pipelines.benchmark.serving import Worker, serve


class RivalModel:
    """The rival's model of a case and the training step that its AdapterTrainer makes."""

    def __init__(self, setup: Setup, case: Case, pretrained: Any) -> None:
        self.case = case
        self.model = pretrained
        hidden_size = self.model.config.hidden_size
        self.head = nn.Linear(hidden_size, weights.OUTPUTS)
        if case.bottleneck:
            stored = weights.Weights(setup.weights, case.bottleneck)
            self.head.load_state_dict(stored.module("head"))
            add_adapters(self.model, case, stored)
        else:
            self.model.requires_grad_(case.method == FULL)
        if not case.dropout:
            # A setting of 0.0 becomes 0.1 in its fusion layers, so the modules themselves are set.
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.model.to(setup.device)
        self.head.to(setup.device)
        shape = (self.model.config.vocab_size, setup.batch_size, setup.tokens, weights.OUTPUTS, setup.seed)
        self.batch = token_batch(*shape, device=setup.device)
        self.padded = token_batch(*shape, device=setup.device, padded=True)
        training = [p for p in [*self.model.parameters(), *self.head.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.AdamW(training, lr=1e-4, weight_decay=0.0, fused=True)

    def scores(self, batch: TokenBatch) -> Tensor:
        """(B, K): the mean of the real tokens, then a linear layer, as our head."""
        hidden = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))

    def loss(self, batch: TokenBatch) -> Tensor:
        return F.cross_entropy(self.scores(batch).float(), batch.labels)

    def train(self) -> None:
        if not self.model.training:  # walking through all modules is no part of a step
            self.model.train()
        self.loss(self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.case.method == FUSION:
            # Its trainer's callback does this when a step has ended, so that the gradient of the
            # penalty waits in the value matrices for the next step.
            self.model.get_fusion_regularization_loss().backward()

    @torch.inference_mode()
    def infer(self) -> Tensor:
        if self.model.training:
            self.model.eval()
        return self.scores(self.batch)

    def check(self) -> dict[str, Any]:
        self.model.train()
        loss = self.loss(self.padded).item()
        fused = self.case.method == FUSION
        penalty = self.model.get_fusion_regularization_loss().item() if fused else 0.0
        self.model.eval()
        with torch.inference_mode():
            logits = self.scores(self.padded)
        return {"logits": logits.tolist(), "loss": loss, "penalty": penalty}


def add_adapters(model: Any, case: Case, stored: weights.Weights) -> None:
    """Our weights in its modules, one adapter active or all of them fused; the rest is frozen."""
    names = [f"source{n}" for n in range(case.sources if case.method == FUSION else 1)]
    adapters.init(model)
    hidden_size = model.config.hidden_size
    # Pfeiffer's placement: reads LN(h + a), and the residual is h.
    settings = adapters.SeqBnConfig(reduction_factor=hidden_size / case.bottleneck, non_linearity="relu")
    for source, name in enumerate(names):
        model.add_adapter(name, config=settings)
        for layer, places in model.get_adapter(name).items():
            (adapter,) = places.values()
            place = f"adapters.{source}.{layer}"
            adapter.adapter_down[0].load_state_dict(stored.module(f"{place}.down"))
            adapter.adapter_up.load_state_dict(stored.module(f"{place}.up"))
    if case.method == ADAPTER:
        model.train_adapter(names[0])
        return
    model.add_adapter_fusion(Fuse(*names), adapters.AdapterFusionConfig.load("dynamic"))
    model.train_adapter_fusion(Fuse(*names))
    fusions = [module for module in model.modules() if isinstance(module, BertFusion)]
    assert len(fusions) == model.config.num_hidden_layers
    for layer, fusion in enumerate(fusions):
        for name in ("query", "key"):
            fusion.get_submodule(name).load_state_dict(stored.module(f"fusion.{layer}.{name}"))
        fusion.value.load_state_dict(stored.module(f"fusion.{layer}.value", ("weight",)))


class RivalWorker(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._pretrained: dict[bool, nn.Module] = {}
        self.commands |= {"epoch": self.epoch}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        self._pretrained.clear()
        answer = super().prepare(request)
        return answer | {"adapters": adapters.__version__, "transformers": transformers.__version__}

    def build(self, setup: Setup, case: Case) -> RivalModel:
        if case.dropout not in self._pretrained:
            off = {} if case.dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = AutoConfig.from_pretrained(setup.backbone, **off)
            # Its default attention, which is torch's fused one; the pooler would be work for nothing.
            self._pretrained[case.dropout] = AutoModel.from_pretrained(
                setup.backbone, config=config, dtype=torch.float32, add_pooling_layer=False
            )
        return RivalModel(setup, case, copy.deepcopy(self._pretrained[case.dropout]))

    def epoch(self, request: dict[str, Any]) -> dict[str, Any]:
        return rival_epoch.run(self._setup(), request)


if __name__ == "__main__":
    serve(RivalWorker())
