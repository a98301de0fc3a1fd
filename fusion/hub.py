"""Whether the Hugging Face hub can be reached, asked once and quickly.

The hub's own client retries for more than twenty seconds before it says that there is no network.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fusion.errors import UserError, first_line

Loaded = TypeVar("Loaded")


@functools.cache
def hub_is_reachable(timeout: float = 2.0) -> bool:
    """Whether a connection to the hub, or to the proxy in front of it, opens within `timeout` seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = None if proxy_bypass(endpoint.hostname or "") else getproxies().get(endpoint.scheme)
    target = urlsplit(proxy) if proxy else endpoint
    port = target.port or (443 if target.scheme == "https" else 80)
    answers: list[bool] = []

    def connect() -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((target.hostname or "", port), timeout=timeout),
        ):
            answers.append(True)

    # In a thread, because looking up a name can hang for longer than any timeout of the connection.
    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(timeout)
    return bool(answers)


def from_cache_or_hub(load: Callable[[bool], Loaded], what: str, cure: str) -> Loaded:
    """`load(True)` from the local cache alone, else `load(False)` from the hub.

    Args:
        load: takes `local_files_only`; raises OSError or ValueError where the files are not there.
        what: what is loaded, for the message.
        cure: the override that does without the hub.

    Raises:
        UserError: neither has it.
    """
    try:
        return load(True)
    except (OSError, ValueError) as missing:
        if not hub_is_reachable():
            raise UserError(
                f"{what} is not in the local cache, and the hub cannot be reached.\n{cure}"
            ) from missing
    try:
        return load(False)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{what} cannot be loaded: {reason}\n{cure}") from error
