"""The Hugging Face hub, with an end to every wait.

The hub's own client tries six times and sleeps in between, and some of its requests wait for ever: a hub that is not
there, or does not answer, would cost minutes. Here it is asked once whether it answers at all; after that, a request
that fails twice is a fault that is said.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, proxy_bypass, urlopen

from fusion.errors import UserError, first_line

Loaded = TypeVar("Loaded")

_ANSWER = 5.0  # seconds in which the hub answers a first request of any kind
_SILENCE = 7.0  # seconds without a byte, after which a request has failed
_FAILURES = 2  # in a row
_GOOD_PART = 10_000_000  # bytes of a file


class HubFault(OSError):
    """The hub fails again and again: no client tries once more after this."""


@functools.cache
def hub_is_reachable(timeout: float = 2.0) -> bool:
    """Whether a connection to the hub, or to the proxy in front of it, opens within `timeout` seconds.

    And whether anything is answered there: whatever it is, its own client will say what is wrong with it.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    endpoint = urlsplit(address)
    proxy = None if proxy_bypass(endpoint.hostname or "") else getproxies().get(endpoint.scheme)
    target = urlsplit(proxy) if proxy else endpoint
    port = target.port or (443 if target.scheme == "https" else 80)
    connected, answers = threading.Event(), threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((target.hostname or "", port), timeout=timeout).close()
            connected.set()
            if _answers(address):
                answers.set()
        connected.set()

    # In a thread, because looking up a name can hang for longer than any timeout of the connection.
    threading.Thread(target=ask, daemon=True).start()
    return connected.wait(timeout) and answers.wait(_ANSWER)


def _answers(address: str) -> bool:
    try:
        urlopen(Request(address, method="HEAD"), timeout=_ANSWER).close()
    except HTTPError:
        return True
    except URLError as error:  # a certificate that Python does not know, say, is an answer
        return not isinstance(error.reason, (TimeoutError, ConnectionError, socket.gaierror))
    except (OSError, HTTPException, ValueError) as error:
        return not isinstance(error, (TimeoutError, ConnectionError))
    return True


@functools.cache
def bound_the_client() -> None:
    """Let the hub's client, which `datasets` and `transformers` use as well, give up in seconds.

    A user's own HF_HUB_DOWNLOAD_TIMEOUT or HF_HUB_ETAG_TIMEOUT is kept.
    """
    import huggingface_hub
    from huggingface_hub.utils import _http

    own = [os.environ.get(f"HF_HUB_{name}_TIMEOUT", "") for name in ("DOWNLOAD", "ETAG")]
    silence = max([_SILENCE, *(float(value) for value in own if value.replace(".", "", 1).isdecimal())])

    def client() -> Any:
        made = _http.default_client_factory()
        made.send = _bounded(made.send, silence)  # type: ignore[method-assign]
        return made

    huggingface_hub.set_client_factory(client)
    logging.getLogger("huggingface_hub").setLevel(
        logging.CRITICAL
    )  # an error is raised as well, and ours says it


@dataclass
class _Failures:
    """Requests that failed in a row, in one load."""

    count: int = 0
    said: str = ""

    def reset(self) -> None:
        self.count, self.said = 0, ""

    def add(self, what: str, error: Exception | None = None) -> None:
        self.count, self.said = self.count + 1, f"the hub {what}"
        self.check(error)

    def check(self, error: Exception | None = None) -> None:
        """Some clients go on to the next file: that one then fails at once."""
        if self.count >= _FAILURES:
            raise HubFault(f"{self.said}, {_FAILURES} times in a row") from error


_failures = _Failures()


def _bounded(send: Callable[..., Any], silence: float) -> Callable[..., Any]:
    """A client's `send` that never waits in silence, and gives up at the second failure in a row."""

    def bounded(request: Any, **options: Any) -> Any:
        _failures.check()
        asked = request.extensions.get("timeout") or {}
        limits = {
            part: min(asked.get(part) or silence, silence) for part in ("connect", "read", "write", "pool")
        }
        request.extensions = {**request.extensions, "timeout": limits}
        try:
            response = send(request, **options)
        except Exception as error:
            _failures.add(f"does not answer ({first_line(error)})", error)
            raise
        if response.status_code >= 500 or response.status_code == 429:
            _failures.add(f"answers {response.status_code}")
        elif options.get("stream"):
            response.iter_raw = _watched(response.iter_raw)
        else:
            _failures.reset()
        return response

    return bounded


def _watched(read: Callable[..., Iterator[bytes]]) -> Callable[..., Iterator[bytes]]:
    """A response's content; all of it, or a good part, ends a row of failures."""

    def watched(*values: Any, **options: Any) -> Iterator[bytes]:
        received = 0
        try:
            for chunk in read(*values, **options):
                received += len(chunk)
                if received > _GOOD_PART:
                    _failures.reset()
                yield chunk
        except Exception as error:
            _failures.add(f"stops in the middle of a file ({first_line(error)})", error)
            raise
        _failures.reset()

    return watched


def from_cache_or_hub(load: Callable[[bool], Loaded], what: str, cure: str, cached: bool = False) -> Loaded:
    """`load(True)` from the local cache alone, else `load(False)` from the hub.

    Args:
        load: takes `local_files_only`; raises OSError or ValueError where the files are not there.
        what: what is loaded, for the message.
        cure: the override that does without the hub.
        cached: whether the cache is known to have it, so that a failure there means damaged files.

    Raises:
        UserError: neither has it.
    """
    import huggingface_hub.constants

    try:
        with offline(huggingface_hub.constants):
            return load(True)
    except (OSError, ValueError) as missing:
        if not hub_is_reachable():
            where = "is not in the local cache"
            if cached:
                where = f"cannot be loaded from the local cache ({first_line(missing)})"
            raise UserError(f"{what} {where}, and the hub cannot be reached.\n{cure}") from missing
    bound_the_client()
    _failures.reset()
    try:
        return load(False)
    except (OSError, ValueError) as error:
        reason = _failures.said or first_line(error)  # the clients do not always say what was behind it
        raise UserError(f"{what} cannot be loaded: {reason}\n{cure}") from error


@contextlib.contextmanager
def offline(settings: Any) -> Iterator[None]:
    """Keep a hub's client from asking anything: it does, for its own statistics, even where all is in the cache.

    Args:
        settings: the client's module of constants.
    """
    before = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before
