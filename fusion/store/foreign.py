"""What a path is that is given as an artifact and is none: the format is named, so that nobody has to guess.

Only names of files and the keys of small JSON files are looked at; no weights are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusion.store.layout import MANIFEST

_LARGEST = 2**20  # bytes of a config

# By a file that only this format has. The first that is there decides.
FOLDERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("adapter_fusion_config.json",), "a fusion of AdapterHub's adapters"),
    (("adapter_setup.json", "adapter_interface.json"), "a setup of AdapterHub's adapters"),
    (("head_config.json",), "a prediction head of AdapterHub's adapters"),
    (("modules.json", "config_sentence_transformers.json"), "a sentence-transformers model"),
    (("pytorch_adapter.bin", "adapter.safetensors"), "an adapter of AdapterHub's adapters"),
    (("adapter_model.safetensors", "adapter_model.bin"), "a peft adapter"),
)
MODEL_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"),
)
FILES = {
    ".ckpt": "a Lightning checkpoint",
    ".pt": "a file of torch.save",
    ".pth": "a file of torch.save",
    ".bin": "a file of torch.save",
    ".safetensors": "a safetensors file",
    ".gguf": "a GGUF model",
    ".zip": "a zip archive; unpack it first",
    ".gz": "an archive; unpack it first",
    ".tar": "an archive; unpack it first",
}


def why_no_artifact(path: Path) -> str:
    """What lies at a path without a manifest, and what to give instead."""
    if path.is_file():
        return _of_file(path)
    there = {entry.name for entry in _entries(path)}
    if (form := _of_folder(path, there)) is not None:
        return f"this is {form}, and no artifact of this project, which has a {MANIFEST}"
    if {"weights.safetensors", "head.safetensors"} & there:
        return f"this artifact has lost its {MANIFEST}; copy it again, or train it again"
    if (stored := _stored_by(path, there)) is not None:
        return f"this is the output folder of a run; its artifact is {stored}"
    if any((path / name / MANIFEST).is_file() for name in there):
        return f"this folder is a store, not an artifact: store={path} artifact=NAME"
    if "last.ckpt" in there:
        return "these are the checkpoints of a run that has not finished; its own command resumes it"
    if any(name.endswith(".ckpt") for name in there):
        return "this folder holds Lightning checkpoints, and no artifact of this project"
    return f"this folder is no artifact, it has no {MANIFEST}"


def _of_file(path: Path) -> str:
    if (path.parent / MANIFEST).is_file():
        return f"this is a file of an artifact; expected its folder, {path.parent}"
    form = FILES.get(path.suffix.lower(), "a file")
    return f"this is {form}; expected the folder of an artifact, which has a {MANIFEST}"


def _of_folder(path: Path, there: set[str]) -> str | None:
    if "adapter_config.json" in there:  # of both: peft's has a type, AdapterHub's another config inside
        config = _json(path / "adapter_config.json")
        if isinstance(kind := config.get("peft_type"), str):
            return f"a peft adapter ({ascii(kind)[1:30].rstrip(chr(39))})"
        if "config" in config:
            return "an adapter of AdapterHub's adapters"
    for files, form in FOLDERS:
        if there & {*files}:
            return form
    if "adapter_config.json" in there:
        return "an adapter of peft or AdapterHub"
    if "config.json" in there and (there & {*MODEL_WEIGHTS} or "model_type" in _json(path / "config.json")):
        return "a transformers model (backbone.name_or_path= takes one)"
    return None


def _stored_by(path: Path, there: set[str]) -> str | None:
    """The artifact that the run with this output folder has stored."""
    if not {"status.json", "result.json"} <= there:
        return None
    stored = _json(path / "result.json").get("artifact")
    return stored if isinstance(stored, str) and stored.isprintable() and len(stored) < 300 else None


def _entries(path: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
