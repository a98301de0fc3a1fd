"""The picture of the scale suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LOOKS = {"ours": ("tab:blue", "o", "this project"), "rival": ("tab:red", "s", "adapters 1.3.0")}
PANELS = (
    ("train_seconds", "seconds a training step", 1.0),
    ("infer_seconds", "seconds an inference batch", 1.0),
    ("peak_bytes", "peak of a step above loading, MiB", 2.0**20),
)


def against_sources(points: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Time and memory against N, one line for each of the two; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 3.6), layout="constrained")
    for axis, (key, label, unit) in zip(axes, PANELS, strict=True):
        for who, (colour, marker, name) in LOOKS.items():
            line = sorted((p["sources"], p[key] / unit) for p in points if p["who"] == who)
            if line:
                axis.plot(*zip(*line, strict=True), color=colour, marker=marker, label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("source adapters")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"AdapterFusion, {title}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
