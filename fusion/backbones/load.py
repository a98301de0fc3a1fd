"""Load a backbone, freeze it, and say by a hash which one it is."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from fusion.backbones.families import Family, family_of
from fusion.backbones.files import (
    CONFIG,
    FIX,
    check_config,
    check_files,
    check_tokenizer_files,
    locate,
    read_object,
    stamp,
)
from fusion.backbones.pairing import adjust, check_max_length, check_pair
from fusion.backbones.repeated_layers import separate_repeated_layers
from fusion.backbones.weights import check_complete, check_finite, check_headers, check_shapes
from fusion.errors import UserError
from fusion.hub import custom_code
from fusion.hub.access import from_cache_or_hub
from fusion.hub.tokenizer import load_tokenizer, tokenizer_hash

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Backbone:
    """A frozen transformer in float32.

    model: gives `last_hidden_state` (B, T, D); none of its parameters requires a gradient.
    fingerprint: sha256 of the architecture's config and of every tensor.
    tokenizer: gives what the model reads. tokenizer_hash: of what decides its token ids.
    stamp: of its files as they were when they were read, see `fusion.backbones.files.stamp`.
    """

    name_or_path: str
    model: PreTrainedModel
    family: Family
    fingerprint: str
    hidden_size: int
    layers: int
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    stamp: str | None = None

    def copy(self) -> Backbone:
        """Another one of the same weights: a model changes its backbone in place."""
        return replace(self, model=copy.deepcopy(self.model))


def load_backbone(
    name_or_path: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_length: int | None = None,
) -> Backbone:
    """Load by folder, from the local cache, or from the hub, in this order; freeze; fingerprint.

    Config and tokenizer come first: what they show to be wrong is refused before the weights are read.

    Args:
        trust_remote_code: whether Python code that the backbone brings along is run.
        max_length: tokens of a sequence that it will be given, which is `data.max_length`; None: not checked.

    Raises:
        UserError: not found, no network, a damaged file, weights that are incomplete or not finite, a tokenizer that
            does not belong to the model, code of its own that is not trusted, or a family that is not supported.
    """
    source = locate(name_or_path)
    what = f"backbone {name_or_path}"
    read_at = stamp(name_or_path)
    folder = Path(source) if Path(source).is_dir() else _cached_folder(source, revision)
    where: Path | str = what if folder is None else folder / CONFIG
    if Path(source).is_dir():
        check_files(name_or_path, trust_remote_code)
    elif folder is not None:
        read_object(folder / CONFIG)

    def load(read: Callable[[bool], Loaded]) -> Loaded:
        with quiet_transformers(), custom_code.refused(what):
            if source == str(folder):
                return read(True)
            cure = "backbone.name_or_path=FOLDER takes a local copy"
            return from_cache_or_hub(read, what=what, fix=cure, cached=folder is not None)

    def read_config(local: bool) -> PretrainedConfig:
        return AutoConfig.from_pretrained(
            source, revision=revision, local_files_only=local, trust_remote_code=trust_remote_code
        )

    def read_model(local: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModel.from_pretrained(
            source,
            revision=revision,
            local_files_only=local,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            output_loading_info=True,
            **family.model_options,
        )
        return loaded

    try:
        config = load(read_config)
    except UserError:
        raise
    except Exception as error:  # each wrong value of config.json has an error of its own
        raise UserError(f"{where}: cannot be loaded ({_one_line(error)})\n{FIX}") from error
    family = family_of(config.model_type, name_or_path)
    check_config(config.to_dict(), name_or_path, where)
    if config.hidden_act not in ACT2FN:
        known = ", ".join(sorted(ACT2FN))
        raise UserError(f'{where}: hidden_act is "{config.hidden_act}", expected one of {known}\n{FIX}')
    tokenizer = _load_tokenizer(source, revision, trust_remote_code, folder)
    adjust(tokenizer, config, family)
    check_pair(tokenizer, config, family, name_or_path)
    if max_length is not None:
        check_max_length(tokenizer, config, family, name_or_path, max_length)
    if folder is not None:
        check_headers(folder, family, config, complete=source == str(folder))
    try:
        model, loading = load(read_model)
    except UserError:
        raise
    except Exception as error:  # safetensors, pickle and zip errors share no base
        if folder is not None:
            check_shapes(folder, family, config)
        raise UserError(
            f"backbone {name_or_path}: its weights cannot be read ({_one_line(error)}).\n"
            "Fetch it again, or name another copy with backbone.name_or_path=FOLDER"
        ) from error
    check_complete(loading, family, model.base_model_prefix, what)
    if not trust_remote_code:
        custom_code.warn_if_ignored(getattr(config, "auto_map", None), what)
    model.requires_grad_(False)
    model.eval()
    check_finite(model, what)
    identity = fingerprint(model, family)
    separate_repeated_layers(model, family)
    return Backbone(
        name_or_path=name_or_path,
        model=model,
        family=family,
        fingerprint=identity,
        hidden_size=config.hidden_size,
        layers=len(family.layer_list(model)),
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        stamp=read_at,
    )


def _load_tokenizer(
    source: str, revision: str | None, trust_remote_code: bool, folder: Path | None
) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(source, revision, trust_remote_code)
    except UserError:
        if folder is not None:
            check_tokenizer_files(folder)  # names the file that is damaged, if one is
        raise


def _cached_folder(hub_id: str, revision: str | None) -> Path | None:
    """Where the hub's cache keeps the files of this id; None: it does not."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(hub_id, CONFIG, revision=revision)
    except ValueError:  # no name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def _one_line(error: BaseException) -> str:
    """All that another library says, on one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


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
