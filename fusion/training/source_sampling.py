"""Sources that are active in a training batch: source dropout, and cross-fitting of the target's own adapters.

Shapes: B examples, S texts of a batch, N sources, n training examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion.data.batches import Batch

_STREAM = 1  # of random numbers, so that the draws are independent of those of robust AdapterDrop


@dataclass(frozen=True)
class SourceSampling:
    """How the sources of each training batch are sampled. In validation, all sources are active.

    Attributes:
        sources: N.
        dropout: probability that a source is inactive in a batch.
        dropped: indices of the sources that `dropout` applies to.
        folds: (n,), the fold of each training example. The own adapters of an example are then those that were trained
            on the other folds. If `None`, they are the sources themselves.
    """

    sources: int
    dropout: float = 0.0
    dropped: Sequence[int] = ()
    folds: NDArray[np.int64] | None = None

    def sources_on(self, seed: int, epoch: int, batch_index: int, device: torch.device) -> Tensor | None:
        """Return the mask of active sources, (N,) bool, or `None` without dropout. At least one source is active.

        The draw depends on its arguments only, so it is equal in all processes and in a resumed run.
        """
        if not self.dropout:
            return None
        draw = np.random.RandomState([seed, epoch, batch_index, _STREAM])
        on = np.ones(self.sources, bool)
        on[list(self.dropped)] = draw.random_sample(len(self.dropped)) >= self.dropout
        if not on.any():
            on[draw.randint(self.sources)] = True
        return torch.from_numpy(on).to(device)

    def folds_of(self, batch: Batch) -> Tensor | None:
        """Return the fold of each text (S,), or `None` without cross-fitting."""
        if self.folds is None:
            return None
        folds = torch.from_numpy(self.folds)[batch.rows.cpu()].to(batch.rows.device)
        return folds if batch.choice_counts is None else folds.repeat_interleave(batch.choice_counts)
