"""LogME: how well a linear model of pooled states could explain the labels, without fitting one.

You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning": the log evidence per row,
p(y | F) = ∫ p(w) p(y | F, w) dw, of a Bayesian linear regression with w ~ N(0, I / α) and y ~ N(F w, I / β), at the α and β
that maximize it. For classes, the mean over their one-hot columns.

Shapes: B rows, D hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusion.analysis.probe import States
from fusion.config.task import TaskConfig
from fusion.tasks.table import kind_of

_STEPS = 100
_SMALLEST = 1e-12  # of a denominator, for constant states or states without error


def logme_score(states: States, task: TaskConfig) -> float:
    """The log evidence per row, higher is better. NaN if all labels are equal."""
    targets = kind_of(task).columns(task, states.labels, states.choice_counts)
    columns = [y for y in targets.T if y.unique().numel() > 1]  # a label may be absent
    features = states.pooled.double()
    u, s, _ = torch.linalg.svd(features, full_matrices=False)
    if not columns:
        return math.nan
    return math.fsum(_evidence(features, u, s, y) for y in columns) / len(columns)


def _evidence(features: Tensor, u: Tensor, s: Tensor, y: Tensor) -> float:
    """The log evidence per row at the best α and β, by the fixed-point iteration of the paper (algorithm 1).

    features: (B, D) = u · diag(s) · vᵀ; u: (B, K), s: (K,), y: (B,).
    """
    rows, width = features.shape
    sigma = s.square()
    z = u.T @ y
    residual = float((y - u @ z).square().sum())  # that no w explains

    def norms(scale: float) -> tuple[float, float]:
        """|m|² and |F m - y|² for α / β."""
        weight = float((sigma * z.square() / (sigma + scale).square()).sum())
        error = float((z.square() * (scale / (sigma + scale)).square()).sum()) + residual
        return weight, error

    alpha = beta = 1.0
    for _ in range(_STEPS):
        scale = alpha / beta
        gamma = float((sigma / (sigma + scale)).sum())
        weight, error = norms(scale)
        alpha = max(gamma / max(weight, _SMALLEST), _SMALLEST)
        beta = max((rows - gamma) / max(error, _SMALLEST), _SMALLEST)
        if abs(alpha / beta - scale) <= 1e-6 * scale:
            break
    weight, error = norms(alpha / beta)
    determinant = float((alpha + beta * sigma).log().sum()) + (width - len(s)) * math.log(alpha)
    evidence = (
        width * math.log(alpha)
        + rows * math.log(beta)
        - beta * error
        - alpha * weight
        - determinant
        - rows * math.log(2 * math.pi)
    )
    return evidence / (2 * rows)
