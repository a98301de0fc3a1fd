"""The dtype of frozen weights that suits the hardware."""

from __future__ import annotations

import functools
from pathlib import Path

CPU_FLAGS = Path("/proc/cpuinfo")
MATRIX_UNITS = "amx_bf16"
# Instructions with which a CPU multiplies matrices of a dtype without converting them to float32.
INSTRUCTIONS = {"bfloat16": (MATRIX_UNITS, "avx512_bf16"), "float16": ("amx_fp16", "avx512_fp16")}
CAPABILITY = 8  # of CUDA devices with bfloat16 tensor cores (Ampere and later)


def automatic_dtype(accelerator: str, precision: str | None, required: str | None) -> str:
    """Return the dtype for `backbone.dtype=auto`.

    Args:
        accelerator: see `hardware_dtype`.
        precision: Lightning's precision. With `bf16-mixed`, products are computed in bfloat16 in any case, and weights in
            bfloat16 need not be cast in every step.
        required: dtype that the training method requires, if any.
    """
    if required is not None:
        return required
    if precision is not None and precision.startswith("bf16"):
        return "bfloat16"
    return hardware_dtype(accelerator)


def hardware_dtype(accelerator: str = "auto") -> str:
    """Return bfloat16 if the device has matrix units for it, else float32.

    These are AMX on a CPU, and the tensor cores of CUDA devices since Ampere.

    Args:
        accelerator: `auto` (a GPU if available), `gpu`, `cuda` or `cpu`, as in Lightning's Trainer.
    """
    if accelerator in ("auto", "gpu", "cuda") and gpu():
        import torch

        return "bfloat16" if torch.cuda.get_device_capability()[0] >= CAPABILITY else "float32"
    if accelerator not in ("auto", "cpu"):
        return "float32"
    return "bfloat16" if MATRIX_UNITS in cpu_flags() else "float32"


def multiplies(dtype: str) -> bool:
    """Return whether the hardware multiplies matrices of a dtype about as fast as in float32, or faster.

    If not, `fusion.backbones.float32_products` is several times as fast as torch on the CPU. With a GPU, which does, the
    model is assumed to be on it.
    """
    return dtype not in INSTRUCTIONS or gpu() or not cpu_flags().isdisjoint(INSTRUCTIONS[dtype])


@functools.cache
def gpu() -> bool:
    """Return whether a CUDA device is available. torch is only imported if there may be one."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    import torch

    return torch.cuda.is_available()


def cpu_flags() -> frozenset[str]:
    """Return the names of the CPU's instruction sets, which are only known on Linux."""
    return _flags(CPU_FLAGS)


@functools.cache
def _flags(file: Path) -> frozenset[str]:
    try:
        return frozenset(file.read_text(encoding="utf-8").split())
    except OSError:
        return frozenset()
