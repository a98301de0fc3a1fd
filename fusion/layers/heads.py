"""Task heads: pool one vector per text (or per word) and map it to logits.

Shapes: B examples, S texts (one per choice in multiple choice), T tokens, W max words, D hidden size, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


def pool(hidden: Tensor, attention_mask: Tensor, how: str, words: Tensor | None = None) -> Tensor:
    """Pool the hidden states (S, T, D) to (S, D): of the first token (`cls`), of the last token that is not padding, with
    padding on either side (`last`), or the mean over all tokens that are not padding (`mean`).

    With `words`, return (B, W, D): the state of each word's first subword, as in BERT (Devlin et al. 2019, §5.3), and
    an arbitrary state at padding. Raises ValueError if `how` is unknown, or only one of `how="words"` and `words` is
    set.

    Args:
        attention_mask: (S, T).
        words: (B, W), the indices of the first subwords among the S * T tokens, -1 at padding.
    """
    if (how == "words") != (words is not None):
        raise ValueError(f"pooling {how!r} {'with' if words is not None else 'without'} word indices")
    if words is not None:
        return hidden.flatten(0, 1)[words.clamp(min=0)]
    if how == "cls":
        return hidden[:, 0]
    if how == "last":
        last = (attention_mask * torch.arange(1, attention_mask.shape[1] + 1, device=hidden.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    if how == "mean":
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    raise ValueError(f"pooling {how!r}: expected cls, last, mean or words")


class TaskHead(nn.Module):
    """Head that pools the last hidden states and maps them to logits with one linear layer, or dense, tanh, linear.

    Raises ValueError if `layers` is not 1 or 2, or the pooling is unknown.

    Args:
        hidden_size: D.
        outputs: K; 1 for regression and for each choice in multiple choice.
        pooling: cls, last, mean, or words (logits per word).
        dropout: dropout probability before each linear layer.
    """

    def __init__(
        self, hidden_size: int, outputs: int, pooling: str = "cls", layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if layers not in (1, 2):
            raise ValueError(f"layers {layers}: expected 1 or 2")
        if pooling not in ("cls", "last", "mean", "words"):
            raise ValueError(f"pooling {pooling!r}: expected cls, last, mean or words")
        self.pooling = pooling
        # In the training of a regression, standard deviation and mean of the training labels: the logits are the output
        # of the last layer times `scale`, plus `shift`.
        self.scale, self.shift = 1.0, 0.0
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(hidden_size, hidden_size) if layers == 2 else None
        self.output = nn.Linear(hidden_size, outputs)
        for module in (self.dense, self.output):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, hidden: Tensor, attention_mask: Tensor, words: Tensor | None = None) -> Tensor:
        """hidden: (S, T, D), attention_mask: (S, T) -> logits: (S, K).

        With words (B, W), the logits are (B, W, K), -inf at padding.
        """
        pooled = pool(hidden.to(self.output.weight.dtype), attention_mask, self.pooling, words)
        if self.dense is not None:
            pooled = torch.tanh(self.dense(self.dropout(pooled)))
        logits: Tensor = self.output(self.dropout(pooled))
        if (self.scale, self.shift) != (1.0, 0.0):
            logits = logits * self.scale + self.shift
        return logits if words is None else logits.masked_fill((words < 0).unsqueeze(-1), float("-inf"))

    @property
    def shape(self) -> dict[str, Any]:
        """Constructor arguments, except for the hidden size."""
        layers, outputs = 1 if self.dense is None else 2, self.output.out_features
        return {"pooling": self.pooling, "layers": layers, "outputs": outputs, "dropout": self.dropout.p}

    def state(self) -> dict[str, nn.Parameter]:
        """Return the parameters that stored weights are copied to, such as `output.weight`."""
        return dict(self.named_parameters())

    def stored_state(self) -> dict[str, Tensor]:
        """Return the tensors of an equivalent head without `scale` and `shift`, under the names of `state`."""
        found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self.named_parameters()}
        if (self.scale, self.shift) != (1.0, 0.0):
            found["output.weight"] = found["output.weight"] * self.scale
            found["output.bias"] = found["output.bias"] * self.scale + self.shift
        return found


class TaskHeads(nn.Module):
    """Heads by task name, in the order of the task indices. A batch contains examples of one task."""

    def __init__(self, heads: Mapping[str, TaskHead]) -> None:
        super().__init__()
        self.tasks = list(heads)
        # A list, since torch does not allow "my.task" or "type" as the name of a module.
        self.heads = nn.ModuleList(heads.values())

    def forward(self, hidden: Tensor, attention_mask: Tensor, task: int, words: Tensor | None = None) -> Tensor:
        """Same as `TaskHead.forward`, with the head at index `task`."""
        logits: Tensor = self.heads[task](hidden, attention_mask, words)
        if not self.training:
            return logits
        # The other heads get zero gradients: DDP expects a gradient for every parameter, and optimizer steps are then
        # the same with one process and with DDP.
        others = [p.sum() for index, head in enumerate(self.heads) if index != task for p in head.parameters()]
        return logits + 0.0 * torch.stack(others).sum() if others else logits

    def by_task(self) -> dict[str, TaskHead]:
        return dict(zip(self.tasks, cast("list[TaskHead]", list(self.heads)), strict=True))

    def state(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all heads, such as `TASK.output.weight`."""
        return {f"{t}.{name}": p for t, head in self.by_task().items() for name, p in head.named_parameters()}

    def stored_state(self) -> dict[str, Tensor]:
        """Return the tensors of all heads, see `TaskHead.stored_state`."""
        return {f"{t}.{name}": p for t, head in self.by_task().items() for name, p in head.stored_state().items()}
