"""Import LoRAs of peft into a store, and export stored LoRAs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fusion.backbones.families import FAMILIES
from fusion.backbones.load import Backbone
from fusion.config.methods import MethodConfig
from fusion.config.model import BackboneConfig
from fusion.errors import UserError
from fusion.formats.peft import PeftLora, Update, layers_of, read_lora, write_lora
from fusion.model.build import configured_backbone, describe_backbone
from fusion.runs.provenance import versions
from fusion.store.artifacts import load, save
from fusion.store.layout import check_name
from fusion.store.manifest import Manifest
from fusion.store.writing import check_free
from fusion.text import listed

FORMATS = ("peft",)
_MAX_LENGTH = 512  # of an imported LoRA, which has no examples


def import_lora(
    folder: Path, name: str, store: Path, config: BackboneConfig | None, overwrite: bool = False
) -> Iterator[str]:
    """Store a LoRA of peft as a source of stage 2, and yield lines about it.

    The artifact has neither a task nor a head. Nothing is stored if the LoRA does not fit the backbone.

    Args:
        config: the backbone; if `None`, the one that the LoRA was trained on, by its name.

    Raises:
        UserError: if the LoRA is invalid or of another kind, does not fit, or the name is taken.
    """
    check_name(name)
    check_free(name, "lora", store, overwrite)
    lora = read_lora(folder)
    if config is None:
        if not lora.base:
            raise UserError(f"{folder} does not name its backbone; expected backbone=NAME")
        config = BackboneConfig(name_or_path=lora.base, revision=lora.revision)
    backbone = configured_backbone(config, None)
    if lora.base and lora.base != config.name_or_path:
        yield f"warning: the LoRA was trained on {lora.base}, but is imported for {config.name_or_path}"
    slots = layers_of(lora, backbone.family.linear_slots(backbone.depths), config.name_or_path)
    for layer, slot in slots.items():
        _check_shapes(backbone, layer, slot, lora.updates[layer])
    if lora.others:
        yield f"not imported: {listed(lora.others)}"
    manifest = _manifest(folder, name, config, backbone, lora, slots)
    path = save(store, manifest, _weights(backbone, lora, slots), {}, overwrite)
    yield f"stored {path}: LoRA at {len(slots)} linear layers of {config.name_or_path}"


def export_lora(name: str, store: Path, folder: Path) -> Iterator[str]:
    """Write a stored LoRA in peft's format, and yield lines about it. Raises UserError if it is no LoRA.

    The names of the layers are those in the bare backbone (`transformers.AutoModel`) or, for an imported LoRA, those that
    it had.
    """
    artifact = load(name, store)
    manifest = artifact.manifest
    if manifest.lora is None:
        raise UserError(
            f"{manifest.name} ({manifest.kind}) is not a LoRA with a description of its layers; nothing to export"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; expected a new directory")
    prefix = str(manifest.content["result"].get("imported", {}).get("prefix", ""))
    modules = {
        slot: path for path, slot in FAMILIES[manifest.backbone.family].linear_slots(manifest.backbone.depths).items()
    }
    updates = {}
    for slot, one in manifest.lora.items():
        path = modules[slot]
        down, up = (artifact.weights[f"{path}.lora_{matrix}.weight"] for matrix in "AB")
        updates[f"{prefix}{path}"] = Update(down, up, artifact.weights.get(f"{path}.lora_B.bias"), one.scaling)
    alpha = next(iter(updates.values())).rank * next(iter(updates.values())).scaling
    write_lora(folder, PeftLora(manifest.backbone.name_or_path, manifest.backbone.revision, updates, [], alpha))
    yield f"written {folder}: LoRA at {len(updates)} linear layers, for peft.PeftModel.from_pretrained(backbone, {str(folder)!r})"
    if manifest.heads:
        yield "not exported: the head, which peft's format does not have"


def _check_shapes(backbone: Backbone, layer: str, slot: str, update: Update) -> None:
    paths = {found: path for path, found in backbone.family.linear_slots(backbone.depths).items()}
    linear = backbone.model.get_submodule(paths[slot])
    shape = tuple(linear.get_parameter("weight").shape)
    output_size, input_size = shape if isinstance(linear, torch.nn.Linear) else shape[::-1]
    found = update.down.shape[1], update.up.shape[0]
    bias = () if update.bias is None else tuple(update.bias.shape)
    if found != (input_size, output_size) or bias not in ((), (output_size,)):
        raise UserError(
            f"{layer}: the LoRA is for a linear layer with the sizes {found[0]} and {found[1]}, but that of "
            f"{backbone.name_or_path} has {input_size} and {output_size}"
        )


def _weights(backbone: Backbone, lora: PeftLora, slots: dict[str, str]) -> dict[str, Tensor]:
    """Return the tensors with the names of the bare backbone."""
    paths = {slot: path for path, slot in backbone.family.linear_slots(backbone.depths).items()}
    found = {}
    for layer, slot in slots.items():
        update = lora.updates[layer]
        found[f"{paths[slot]}.lora_A.weight"], found[f"{paths[slot]}.lora_B.weight"] = update.down, update.up
        if update.bias is not None:
            found[f"{paths[slot]}.lora_B.bias"] = update.bias
    return found


def _manifest(
    folder: Path, name: str, config: BackboneConfig, backbone: Backbone, lora: PeftLora, slots: dict[str, str]
) -> Manifest:
    described = {}
    for layer, slot in slots.items():
        update = lora.updates[layer]
        described[slot] = {
            "rank": update.rank,
            "scaling": update.scaling,
            "input_size": update.down.shape[1],
            "output_size": update.up.shape[0],
            **({} if update.bias is None else {"bias": True}),
        }
    rank = max(update.rank for update in lora.updates.values())
    targets = list(dict.fromkeys(layer.rpartition(".")[2] for layer in slots))
    method = MethodConfig("lora", rank=rank, alpha=max(1, round(lora.alpha)), targets=targets)
    first = next(iter(slots))
    path = next(path for path, slot in backbone.family.linear_slots(backbone.depths).items() if slot == slots[first])
    return Manifest.of(
        kind="lora",
        name=name,
        task=None,
        backbone=describe_backbone(config, backbone),
        adapter=None,
        composition=None,
        method=method.as_stored(),
        lora=described,
        head=None,
        sources=[],
        data={"max_length": _MAX_LENGTH, "fingerprints": {}},
        metrics={},
        seed=0,
        run={"identity": "imported", "config": {}, "overrides": [], "directory": str(folder.absolute())},
        versions=versions(),
        result={"imported": {"format": "peft", "from": str(folder.absolute()), "prefix": first.removesuffix(path)}},
    )
