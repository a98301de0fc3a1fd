"""torch.compile for the layers of a backbone, with their slot modules."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusion.errors import UserError


def check_compiler() -> None:
    """Check for the compiler that torch.compile calls.

    Raises:
        UserError: no C++ compiler, no Python headers, or a path with a space.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"compile=true needs a C++ compiler, and {compiler} was not found: install it, set CXX to another one, "
            "or leave compile=false"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise UserError(
            f"compile=true needs Python's headers, and {header} was not found: install them (python3-dev), "
            "or leave compile=false"
        )
    # Inductor does not quote these paths.
    for path in (Path(torch.__file__).parent, header.parent):
        if " " in str(path):
            raise UserError(
                f"compile=true: torch.compile cannot use the path {path}, which has a space: create the environment in a "
                "folder without one, or leave compile=false"
            )


def compile_layers(layers: nn.ModuleList, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each layer on its next call, for any number of rows and tokens.

    Compiling layers takes a fraction of the time of compiling the model and runs as fast. Modules and tensor names do
    not change.
    """
    # Versions compiled for an earlier model of this process count against the cache limit.
    torch.compiler.reset()
    # All layers may differ in their sources, and each is compiled for training, evaluation and a single row.
    torch._dynamo.config.cache_size_limit = max(8, 4 * len(layers))
    # A layer with hooks must not use the code compiled for one without.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
