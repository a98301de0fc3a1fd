"""Python code that comes with a backbone, named in the `auto_map` of its files: never run without permission."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from fusion.errors import UserError

log = logging.getLogger(__name__)

KEY = "backbone.trust_remote_code"


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn transformers' refusal to run such code into a UserError that names the key."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{what} comes with its own code, which is not run: set {KEY}=true if you have read it and trust it"
        ) from None


def warn_if_ignored(auto_map: Any, what: str) -> None:
    """Warn where transformers supports the type and ignores the code."""
    if auto_map:
        log.warning("%s comes with its own code, which is not run; %s=true would run it", what, KEY)


def is_own(model: object) -> bool:
    """Whether the class of a model came with it."""
    return type(model).__module__.startswith("transformers_modules.")
