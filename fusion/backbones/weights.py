"""Whether the weights of a backbone are all there: a tensor that is missing would be random numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from fusion.backbones.families import Family
from fusion.backbones.files import FIX, weight_files
from fusion.errors import UserError

_FLOATS = {"F64", "F32", "F16", "BF16"}
_BUFFERS = (
    "position_ids",
    "token_type_ids",
)  # of old checkpoints: whole numbers that the model computes by itself


def check_headers(folder: Path, family: Family, config: PretrainedConfig, complete: bool = True) -> None:
    """Refuse weights by their files' headers alone: truncated, of a type that is no float, or of other sizes.

    A model is built, and its tables made, before its weights are compared: what is expensive there is compared here.

    Args:
        complete: whether missing files are refused; a cache may lack some yet.

    Raises:
        UserError: names the file and the tensor.
    """
    tensors = _headers(folder, complete)
    if not tensors:
        return
    for name, (path, dtype, _) in tensors.items():
        if dtype not in _FLOATS and not name.endswith(_BUFFERS):
            raise UserError(
                f"{path}: {name} is of type {dtype}, expected a float of 16 bits or more: quantized weights are not "
                "supported\nUse a copy in float32, float16 or bfloat16: backbone.name_or_path=FOLDER"
            )
    found = {int(match[1]) for name in tensors if (match := _layer(family).search(name))}
    layers = config.num_hidden_layers
    if found and max(found) + 1 != layers:
        raise UserError(
            f"{folder}: config.json has num_hidden_layers={layers}, and the weights have {max(found) + 1} layers\n{FIX}"
        )

    tables = {"word": config.vocab_size, "position": config.max_position_embeddings}
    for stored, (path, _, shape) in tensors.items():
        for table, size in tables.items():
            if stored.endswith(f"embeddings.{table}_embeddings.weight") and shape[:1] != (size,):
                _refuse_shape(path, stored, shape, (size, *shape[1:]))


def check_shapes(folder: Path, family: Family, config: PretrainedConfig) -> None:
    """Refuse weights whose shapes are not those of the config, as far as the files' headers have them.

    Raises:
        UserError: names the first tensor, its shape and the expected one.
    """
    tensors = _headers(folder, complete=False)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False, **family.model_options)
    prefix = f"{model.base_model_prefix}."
    for stored, (path, _, shape) in tensors.items():
        name = stored.removeprefix(prefix)
        expected = dict(model.named_parameters()).get(name)
        if expected is not None and tuple(expected.shape) != shape:
            _refuse_shape(path, stored, shape, expected.shape)


def _refuse_shape(path: Path, name: str, shape: Sequence[int], expected: Sequence[int]) -> NoReturn:
    raise UserError(
        f"{path}: {name} has shape {list(shape)}, and config.json asks for {list(expected)}\n{FIX}"
    )


def check_complete(loading: Mapping[str, Any], family: Family, prefix: str, what: str) -> None:
    """Refuse weights that lack a tensor of the forward pass, or have one there that the model does not have.

    Poolers and the heads of pre-training are not part of it.

    Args:
        loading: what transformers reports of its loading.
        prefix: what the names of a model with a head have before those of the backbone, such as `bert`.

    Raises:
        UserError: names the tensors.
    """
    missing = sorted(name for name in loading["missing_keys"] if _root(name) in family.roots)
    unexpected = sorted(loading["unexpected_keys"])
    for name in missing[:1]:
        foreign = [other for other in unexpected if other.endswith(f".{name}")]
        if foreign:
            before = foreign[0].removesuffix(name)
            raise UserError(
                f"{what}: its tensors are named {foreign[0]} where {name} was expected ({len(missing)} tensors are "
                f"missing)\nRemove the prefix {before!r} from the names, or use another copy: backbone.name_or_path=FOLDER"
            )
        raise UserError(f"{what}: its weights lack {_listed(missing)}\n{FIX}")
    extra = [name for name in unexpected if _root(name.removeprefix(f"{prefix}.")) in family.roots]
    if extra:
        raise UserError(
            f"{what}: its weights hold {_listed(extra)}, which the model of config.json lacks\n{FIX}"
        )
    if loading["mismatched_keys"] or loading.get("error_msgs"):
        raise UserError(f"{what}: its weights do not have the shapes of config.json\n{FIX}")


def check_finite(model: PreTrainedModel, what: str) -> None:
    """Refuse weights with NaN or infinite values.

    Raises:
        UserError: names the first tensor.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and not torch.stack(torch.aminmax(parameter)).isfinite().all():
            raise UserError(f"{what}: {name} holds NaN or infinite values\n{FIX}")


def _headers(folder: Path, complete: bool) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """File, type and shape of each tensor in the safetensors files of a folder; empty where there are none."""
    try:
        files = weight_files(folder)
    except UserError:
        if complete:
            raise
        return {}
    tensors: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for path in files:
        if path.suffix != ".safetensors":
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    tensors[name] = path, part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error})\n{FIX}") from None
    return tensors


def _layer(family: Family) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.){re.escape(family.layers)}\.(\d{{1,6}})\.")


def _root(name: str) -> str:
    return name.partition(".")[0]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
