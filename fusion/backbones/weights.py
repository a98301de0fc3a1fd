"""Whether the weights of a backbone are complete and finite: transformers fills a missing tensor with random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusion.backbones.family import Family
from fusion.backbones.files import FIX
from fusion.errors import UserError

_FLOATS = {"F64", "F32", "F16", "BF16"}
_BUFFERS = ("position_ids", "token_type_ids")  # integers in old checkpoints, which the model computes itself


def check_types(folder: Path) -> None:
    """Refuse safetensors files with integer weights, which would be read as if they were floats.

    Raises:
        UserError: the file and the tensor, or a file that cannot be read.
    """
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error})\n{FIX}") from None
        for name, dtype in types.items():
            if dtype not in _FLOATS and not name.endswith(_BUFFERS):
                raise UserError(
                    f"{path}: {name} is of type {dtype}, expected a float of 16 bits or more: quantized weights are not "
                    "supported\nUse a copy in float32, float16 or bfloat16: backbone.name_or_path=FOLDER"
                )


def check_complete(loading: Mapping[str, Any], family: Family, prefix: str, what: str) -> None:
    """Refuse weights that lack a tensor of the forward pass, or have one that the model does not have.

    Poolers and the heads of pre-training do not count.

    Args:
        loading: the loading info of `from_pretrained`.
        prefix: what the names of a model with a head have before those of the backbone, such as `bert`.

    Raises:
        UserError: names the tensors.
    """
    missing = [name for name in sorted(loading["missing_keys"]) if _is_used(name, family)]
    unexpected = sorted(loading["unexpected_keys"])
    extra = [name for name in unexpected if _is_used(name.removeprefix(f"{prefix}."), family)]
    if missing:
        found = f"; they hold {_listed(unexpected)}" if unexpected else ""
        raise UserError(f"{what}: its weights lack {_listed(missing)}{found}\n{FIX}")
    if extra:
        raise UserError(f"{what}: its weights hold {_listed(extra)}, which the model of config.json lacks\n{FIX}")
    for name, stored, expected in loading["mismatched_keys"]:
        raise UserError(f"{what}: {name} has shape {list(stored)}, and config.json expects {list(expected)}\n{FIX}")


def check_finite(model: PreTrainedModel, what: str) -> None:
    """Refuse weights with NaN or infinite values.

    Raises:
        UserError: names the first tensor.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and not torch.stack(torch.aminmax(parameter)).isfinite().all():
            raise UserError(f"{what}: {name} holds NaN or infinite values\n{FIX}")


@torch.no_grad()
def check_runs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Run the model on a short text: a wrong value in config.json may show only in the forward pass.

    Raises:
        UserError: it fails.
    """
    batch = {name: Tensor(ids).long() for name, ids in tokenizer(["a"]).items()}
    try:
        if not model(**batch).last_hidden_state.isfinite().all():
            raise ValueError("its output is not finite")
    except Exception as error:  # whatever the model's code raises
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: the model does not run ({type(error).__name__}: {text})\n{FIX}") from error


def _is_used(name: str, family: Family) -> bool:
    return name.partition(".")[0] in family.roots


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
