"""Task heads: pool one vector per text (or per word) and score it.

Shapes: B rows, S texts (one per choice in multiple choice), T tokens, W words at most, D hidden size, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


def pool(hidden: Tensor, attention_mask: Tensor, how: str, words: Tensor | None = None) -> Tensor:
    """hidden: (S, T, D), attention_mask: (S, T) -> (S, D), the first token or the mean of the real ones.

    For `words`, (B, W, D): the state of each word's first sub-word, as BERT tags words (Devlin et al. 2019, section
    5.3); any state at padding.

    Args:
        words: (B, W), the indices of those sub-words among the S * T tokens; -1 for padding.

    Raises:
        ValueError: an unknown `how`, or `words` given without `how="words"` or the reverse.
    """
    if (how == "words") != (words is not None):
        raise ValueError(f"pooling {how!r} {'with' if words is not None else 'without'} places of words")
    if words is not None:
        return hidden.flatten(0, 1)[words.clamp(min=0)]
    if how == "cls":
        return hidden[:, 0]
    if how == "mean":
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    raise ValueError(f"pooling {how!r}: expected cls, mean or words")


class TaskHead(nn.Module):
    """Pool the last hidden states and score them: linear, or dense, tanh, linear.

    Args:
        hidden_size: D.
        outputs: K; 1 for regression and for each choice in multiple choice.
        pooling: cls, mean, or words (scores per word).
        layers: 1 or 2.
        dropout: before each linear, in training.

    Raises:
        ValueError: `layers` is not 1 or 2, or an unknown pooling.
    """

    def __init__(
        self, hidden_size: int, outputs: int, pooling: str = "cls", layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if layers not in (1, 2):
            raise ValueError(f"layers {layers}: expected 1 or 2")
        if pooling not in ("cls", "mean", "words"):
            raise ValueError(f"pooling {pooling!r}: expected cls, mean or words")
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(hidden_size, hidden_size) if layers == 2 else None
        self.output = nn.Linear(hidden_size, outputs)
        for module in (self.dense, self.output):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, hidden: Tensor, attention_mask: Tensor, words: Tensor | None = None) -> Tensor:
        """hidden: (S, T, D), attention_mask: (S, T) -> scores: (S, K).

        With words (B, W): (B, W, K), -inf at padding.
        """
        pooled = pool(hidden, attention_mask, self.pooling, words)
        if self.dense is not None:
            pooled = torch.tanh(self.dense(self.dropout(pooled)))
        scores: Tensor = self.output(self.dropout(pooled))
        return scores if words is None else scores.masked_fill((words < 0).unsqueeze(-1), float("-inf"))

    @property
    def shape(self) -> dict[str, Any]:
        """The constructor's arguments, without the hidden size."""
        layers, outputs = 1 if self.dense is None else 2, self.output.out_features
        return {"pooling": self.pooling, "layers": layers, "outputs": outputs, "dropout": self.dropout.p}

    def state(self) -> dict[str, nn.Parameter]:
        """The stored parameters: `output.weight` and so on."""
        return dict(self.named_parameters())


class TaskHeads(nn.Module):
    """One head per task. A batch holds rows of one task.

    Args:
        heads: by task name; `task` of a batch is the index.
    """

    def __init__(self, heads: Mapping[str, TaskHead]) -> None:
        super().__init__()
        self.tasks = list(heads)
        # A list, since torch allows neither "my.task" nor "type" as the name of a module.
        self.heads = nn.ModuleList(heads.values())

    def forward(self, hidden: Tensor, attention_mask: Tensor, task: int, words: Tensor | None = None) -> Tensor:
        """As `TaskHead`, with the head of this task."""
        scores: Tensor = self.heads[task](hidden, attention_mask, words)
        if not self.training:
            return scores
        # The other heads get a gradient of 0: DDP expects one for every parameter, and the optimizer then does the
        # same in one process as in many.
        others = [p.sum() for number, head in enumerate(self.heads) if number != task for p in head.parameters()]
        return scores + 0.0 * torch.stack(others).sum() if others else scores

    def by_task(self) -> dict[str, TaskHead]:
        return dict(zip(self.tasks, cast("list[TaskHead]", list(self.heads)), strict=True))

    def state(self) -> dict[str, nn.Parameter]:
        """The parameters of all heads: `TASK.output.weight` and so on."""
        return {f"{t}.{name}": p for t, head in self.by_task().items() for name, p in head.named_parameters()}
