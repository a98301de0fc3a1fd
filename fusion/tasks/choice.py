"""`kind: choice`: multiple choice. Each choice is encoded as a separate text pair with the text of the example."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.tasks.classification import Classification
from fusion.tasks.task import Task
from fusion.text import shortened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_COLUMNS = "the name of a column that contains lists, or a list of column names"


class Choice(Classification):
    """A classification over the choices of each example: logits (B, most choices), -inf for missing choices."""

    name = "choice"
    metric_names = ("accuracy",)
    keys = ("choices", "blank")
    items = "choices"
    has_classes = False

    def check(self, task: Task, where: str) -> None:
        if task.choices is None:
            raise UserError(f"{where}: kind=choice needs choices ({_COLUMNS})")
        columns = [task.choices] if isinstance(task.choices, str) else task.choices
        if not (isinstance(columns, list) and len(columns) > 0 and all(isinstance(c, str) for c in columns)):
            raise UserError(f"{where}: choices={shortened(task.choices)}: expected {_COLUMNS}")
        if task.blank == "":
            raise UserError(f"{where}: blank is empty: expected the mark to be replaced by a choice, or null")

    def head_outputs(self, task: Task) -> int:
        return 1

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """Return the loss as in classification; label smoothing ignores missing choices, whose logits are -inf."""
        if smoothing == 0:
            return super().loss(logits, labels)
        present = logits > float("-inf")
        losses = -logits.log_softmax(-1)
        uniform = losses.masked_fill(~present, 0.0).sum(-1) / present.sum(-1)
        correct = losses.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return (1 - smoothing) * correct + smoothing * uniform

    def constant_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        """Return `zero_score_loss`, since equal logits of all choices are the only constant."""
        return self.zero_score_loss(task, labels, choice_counts)

    def initial_bias(self, task: Task, labels: NDArray[Any], class_weights: Any) -> None:
        """Return `None`, since a bias is equal for all choices."""

    def zero_score_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        import numpy as np

        assert choice_counts is not None
        return float(np.mean(np.log(choice_counts)))

    def columns(self, task: Task, labels: Tensor, choice_counts: Tensor | None) -> Tensor:
        """Return one column, 1 if a text is the correct choice."""
        import torch

        assert choice_counts is not None
        correct = torch.zeros(int(choice_counts.sum()), dtype=torch.float64)
        correct[choice_counts.cumsum(0) - choice_counts + labels] = 1.0
        return correct.unsqueeze(1)
