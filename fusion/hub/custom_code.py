"""Code that a backbone brings along: never run unless the user says so.

A folder or hub repository may name Python files of its own in its `auto_map`; transformers would run them.
"""

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
    """Turns transformers' refusal to run such code into one line that names the key.

    Raises:
        UserError: what is loaded in here cannot be loaded without running its own code.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{what} brings code of its own, which is not run: say {KEY}=true if you have read it and trust it"
        ) from None


def warn_if_ignored(auto_map: Any, what: str) -> None:
    """Says that code of its own was passed over, where the library knows the type without it."""
    if auto_map:
        log.warning("%s brings code of its own, which is not run; %s=true would run it", what, KEY)


def is_own(model: object) -> bool:
    """Whether a model's class came along with it."""
    return type(model).__module__.startswith("transformers_modules.")
