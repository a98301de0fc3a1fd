"""torch.compile for the layers of a backbone, what fills their slots included."""

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
    """See that what torch.compile calls is there.

    Raises:
        UserError: there is no C++ compiler, Python's headers are missing, or a path of theirs has a space.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"compile=true needs a C++ compiler, and there is no {compiler} here: install it, name another one "
            "in the environment as CXX, or leave compile=false"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise UserError(
            f"compile=true needs Python's headers, and there is no {header}: install them (python3-dev), "
            "or leave compile=false"
        )
    # Inductor gives the compiler these paths without quotes.
    for path in (Path(torch.__file__).parent, header.parent):
        if " " in str(path):
            raise UserError(
                f"compile=true: torch.compile cannot use the path {path}, which has a space: make the environment in a "
                "folder without one, or leave compile=false"
            )


def compile_layers(layers: nn.ModuleList, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let the layers run compiled, from their next call on, for any number of rows and tokens.

    Layer by layer and not the model as one, which takes a fraction of the time and runs as fast. The modules stay
    as they are, and so do the names of their tensors.
    """
    # What an earlier model of this process left counts against the limit on compiled versions of one function.
    torch.compiler.reset()
    # Layers may all differ (in their sources), and each is compiled for training, evaluation and a single row.
    torch._dynamo.config.cache_size_limit = max(8, 4 * len(layers))
    # A slot may be a hook: a layer that has one is not to take what was compiled for one that has none.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
