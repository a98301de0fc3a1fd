"""Token ids on disk: a safetensors file of flat arrays, named by a hash of everything that determines them."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusion.data.cache import discard, write_cache_file
from fusion.data.rows import Rows
from fusion.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arrays = dict[str, NDArray[Any]]

_FORMAT = 2
_METADATA = "key and crc32"  # one entry: the order of multiple entries, and so the bytes of the file, would vary


def cache_key(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """40 hex digits that identify the texts, the tokenizer and the length."""
    import tokenizers

    # The serialized tokenizer includes truncation and padding, which an earlier call may have set.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    parts = [
        _FORMAT,
        rows.fingerprint,
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        tokenizers.__version__,
        sorted(tokenizer.model_input_names),
        tokenizer.truncation_side,
        max_length,
        *([] if rows.words is None else ["words"]),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a cache file; None if it is missing, damaged, or the file of another key."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get(_METADATA) == _signature(arrays, path.stem):
                return arrays
        reason = "its key or checksum is wrong"
    except Exception as error:  # an unknown type, an invalid header: each has its own type
        reason = first_line(error)
    discard(path, reason)
    return None


def write_arrays(path: Path, arrays: Arrays) -> None:
    from safetensors.numpy import save

    write_cache_file(path, save(arrays, metadata={_METADATA: _signature(arrays, path.stem)}))


def _signature(arrays: Arrays, key: str) -> str:
    value = zlib.crc32(key.encode())
    for name in sorted(arrays):
        value = zlib.crc32(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, value)
    return f"{key} {value:08x}"
