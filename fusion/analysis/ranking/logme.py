"""LogME: how well a linear model could explain the labels by the states that a source gives, without fitting one.

You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning": the logarithm of the
evidence p(y | F) = ∫ p(w) p(y | F, w) dw a row, of a Bayesian linear regression with w ~ N(0, I / α) and
y ~ N(F w, I / β), at the α and β that make it largest. Of several classes the mean over their one-hot columns.

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


def logme(states: States, task: TaskConfig) -> float:
    """The log evidence a row: larger is better. NaN where all rows have one label, which says nothing."""
    targets = kind_of(task).columns(task, states.labels, states.choice_counts)
    columns = [y for y in targets.T if y.unique().numel() > 1]  # a label may be in no row
    features = states.pooled.double()
    u, s, _ = torch.linalg.svd(features, full_matrices=False)
    if not columns:
        return math.nan
    return math.fsum(_evidence(features, u, s, y) for y in columns) / len(columns)


def _evidence(features: Tensor, u: Tensor, s: Tensor, y: Tensor) -> float:
    """The log evidence a row at its best α and β, found by the fixed-point iteration of the paper (algorithm 1).

    features: (B, D) = u · diag(s) · vᵀ; u: (B, K), s: (K,), y: (B,).
    """
    rows, width = features.shape
    sigma = s.square()
    z = u.T @ y
    rest = float((y - u @ z).square().sum())  # what no w explains
    alpha = beta = 1.0
    for _ in range(_STEPS):
        scale = alpha / beta
        gamma = float((sigma / (sigma + scale)).sum())
        weight = float((sigma * z.square() / (sigma + scale).square()).sum())  # |m|²
        error = float((z.square() * (scale / (sigma + scale)).square()).sum()) + rest  # |F m - y|²
        before = scale
        alpha, beta = _positive(gamma / _positive(weight)), _positive((rows - gamma) / _positive(error))
        if abs(alpha / beta - before) <= 1e-6 * before:
            break
    scale = alpha / beta
    weight = float((sigma * z.square() / (sigma + scale).square()).sum())
    error = float((z.square() * (scale / (sigma + scale)).square()).sum()) + rest
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


def _positive(value: float) -> float:
    """Away from 0, where states that are all alike, or that leave no error, would take it."""
    return max(value, 1e-12)
