"""Many shares in little text, for a page that carries them: one byte each, in base64."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

STEPS = 255  # a share of 1 in a byte


def pack(shares: NDArray[np.floating]) -> str:
    """Shares in 0 to 1, of any shape, row after row."""
    return base64.b64encode((shares.clip(0, 1) * STEPS).round().astype(np.uint8).tobytes()).decode()


def unpack(packed: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
    """What `pack` was given, to within half a step.

    Raises:
        ValueError: it is no base64, or of another shape.
    """
    values: NDArray[np.floating] = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(shape) / STEPS
    return values
