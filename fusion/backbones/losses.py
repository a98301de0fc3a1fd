"""The losses of transformers, which the project does not use, but which every model imports."""

from __future__ import annotations

import importlib


def import_losses_without_scipy() -> None:
    """Import the losses without scipy.optimize, which only those of object detection need and which takes long."""
    import transformers.utils

    available = transformers.utils.is_scipy_available
    transformers.utils.is_scipy_available = lambda: False
    try:
        importlib.import_module("transformers.loss.loss_utils")
    finally:
        transformers.utils.is_scipy_available = available
