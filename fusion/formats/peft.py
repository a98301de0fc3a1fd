"""peft's format of LoRAs: `adapter_config.json` and `adapter_model.safetensors`, read and written without peft.

A LoRA changes the output of a linear layer with input x by s · (B A x + b), with A (r, D_in), B (D_out, r), usually no b,
and s = lora_alpha / r or, with `use_rslora`, lora_alpha / √r. `rank_pattern` and `alpha_pattern` replace r and lora_alpha
for the layers whose names they match.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fusion.errors import UserError, first_line
from fusion.files import write_atomic
from fusion.text import listed

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
# Initializations that do not change the frozen weights.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "true", "false")
# Settings with which the update is not s · (B A x + b), or the frozen weights are changed.
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "lora_ga_config", "monteclora_config", "kasa_config", "velora_config"),
    *("megatron_config", "loftq_config", "corda_config"),
)


@dataclass(frozen=True)
class Update:
    """The LoRA of one linear layer, see the module."""

    down: Tensor  # A
    up: Tensor  # B
    bias: Tensor | None  # b
    scaling: float  # s

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class PeftLora:
    """A LoRA as peft stores it.

    Attributes:
        base: name of the model that it was trained on, and its revision, if known.
        updates: by the dotted name of the linear layer, in a model that may contain the backbone, such as
            `bert.encoder.layer.0.attention.self.query`.
        others: names of other tensors, such as those of a classification head.
        alpha: `lora_alpha`.
    """

    base: str
    revision: str | None
    updates: dict[str, Update]
    others: list[str]
    alpha: float


def read_lora(folder: Path) -> PeftLora:
    """Read a LoRA from a directory. Raises UserError if it is invalid, of another method, or not of the form above."""
    config = _config(folder)
    where = folder / CONFIG
    method = config.get("peft_type")
    if method is None:
        raise UserError(f"{where} has no peft_type: not an adapter of peft")
    if method != "LORA":
        raise UserError(f"{where}: peft_type is {method}; only LORA can be imported")
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise UserError(
            f"{where}: init_lora_weights is {init}, which changes the frozen weights; convert it with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key in _UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{where}: {key} is not supported, since the update is not a plain LoRA")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias is {config['bias']}, so biases of the backbone were trained; expected none")
    tensors = _tensors(folder)
    others = []
    for name in tensors:
        if not re.search(r"\.lora_[AB]\.(weight|bias)$", name):
            if ".lora_" in name:
                raise UserError(f"{folder / WEIGHTS}: {name} is not supported, since the update is not a plain LoRA")
            others.append(name.removeprefix(_PREFIX))
    layers = sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})
    updates = {name.removeprefix(_PREFIX): _update(config, tensors, name, where) for name in layers}
    if not updates:
        raise UserError(f"{folder / WEIGHTS} has no lora_A and lora_B")
    base, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    return PeftLora(base, revision, updates, sorted(others), float(config.get("lora_alpha", 8)))


def write_lora(folder: Path, lora: PeftLora) -> None:
    """Write a LoRA to a directory that peft can load. Raises UserError if only some layers have a bias."""
    biases = {update.bias is not None for update in lora.updates.values()}
    if len(biases) > 1:
        raise UserError(f"{folder}: some layers have a bias and others do not, which peft cannot represent")
    first = next(iter(lora.updates.values()))
    rank, alpha = first.rank, first.rank * first.scaling
    names = list(lora.updates)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": lora.base,
        "revision": lora.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "lora_bias": biases == {True},
        "target_modules": names,
        "rank_pattern": {_pattern(name): one.rank for name, one in lora.updates.items() if one.rank != rank},
        "alpha_pattern": {
            _pattern(name): _plain(one.scaling * one.rank)
            for name, one in lora.updates.items()
            if not math.isclose(one.scaling * one.rank, alpha)
        },
        "bias": "none",
        "fan_in_fan_out": False,  # peft sets it for Conv1D
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    tensors: dict[str, Tensor] = {}
    for name, update in lora.updates.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = update.down.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.up.contiguous()
        if update.bias is not None:
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = update.bias.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG}; expected the directory of an adapter of peft")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({first_line(error)[:100]})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object")
    if "peft_type" not in config and isinstance(config.get("config"), dict):
        raise UserError(f"{path} is that of an adapter of AdapterHub; only LoRAs of peft can be imported")
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    path, pickled = folder / WEIGHTS, folder / PICKLED
    try:
        if path.is_file():
            return safetensors.torch.load_file(path)
        if pickled.is_file():
            path = pickled
            found: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
            if not all(isinstance(value, Tensor) for value in found.values()):
                raise ValueError("expected tensors")
            return found
    except Exception as error:  # of safetensors or pickle
        raise UserError(f"{path} cannot be read ({first_line(error)[:200]})") from None
    raise UserError(f"{folder}: neither {WEIGHTS} nor {PICKLED} found")


def _update(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, where: Path) -> Update:
    """Return the update of one layer, given its full name in the file."""
    path = name.removeprefix(_PREFIX)
    down, up = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
    if down is None or up is None:
        raise UserError(f"{where.parent}: {path} needs both lora_A.weight and lora_B.weight")
    rank, alpha = (
        _of_layer(config, key, pattern, path)
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise UserError(
            f"{where}: rank {rank:g} of {path}, but its tensors have the shapes {tuple(down.shape)} and {tuple(up.shape)}"
        )
    if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in (down, up)):
        raise UserError(f"{where.parent}: the weights of {path} are not finite floating-point numbers")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Update(down, up, tensors.get(f"{name}.lora_B.bias"), scaling)


def _of_layer(config: Mapping[str, Any], key: str, pattern: str, path: str) -> float:
    """Return `r` or `lora_alpha` of a layer: that of the first pattern that matches the end of its name, if any."""
    patterns = config.get(pattern) or {}
    value = next((value for one, value in patterns.items() if re.match(rf"(.*\.)?({one})$", path)), config.get(key, 8))
    if type(value) not in (int, float) or not value > 0:
        raise UserError(f"{CONFIG}: {key} is {value!r}, expected a positive number")
    return float(value)


def _pattern(name: str) -> str:
    """Return a pattern that matches this layer only."""
    return f"^{re.escape(name)}"


def _plain(value: float) -> float:
    """Return an integer if the value is one, as peft writes it."""
    return round(value) if math.isclose(value, round(value)) else value


def layers_of(lora: PeftLora, known: Mapping[str, str], backbone: str) -> dict[str, str]:
    """Return the slot of each layer of a LoRA, given the slots of the backbone by dotted path.

    The names in the file may have a prefix, that of the backbone in a model with a head. Raises UserError if a layer is
    not one of the backbone's, or if they have different prefixes.
    """
    found, prefixes, unknown = {}, set(), []
    for name in lora.updates:
        ends = [path for path in known if name == path or name.endswith(f".{path}")]
        if not ends:
            unknown.append(name)
            continue
        path = max(ends, key=len)
        found[name] = known[path]
        prefixes.add(name.removesuffix(path))
    if unknown:
        raise UserError(f"{backbone} has no linear layer {listed(unknown)} in its transformer layers")
    if len(prefixes) > 1:
        raise UserError(f"the layers are of different models: {', '.join(sorted(repr(one) for one in prefixes))}")
    return found
