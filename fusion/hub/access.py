"""Loading from the Hugging Face Hub, with the local cache first and without long waits.

The Hub client retries a failed request five times, and some of its requests have no timeout. Here the Hub is probed
once; after that, the first failed request aborts loading. HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT (seconds,
by default 10) set the timeout of a request, and HF_HUB_OFFLINE=1 uses the cache only.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fusion.errors import UserError, first_line

Loaded = TypeVar("Loaded")

log = logging.getLogger(__name__)

TRUST = "backbone.trust_remote_code"

_faults: list[str] = []  # failed requests of the current load
_downloads: Counter[tuple[str, str | None]] = Counter()  # requests of the current load, by URL and first byte
RESUMPTIONS = 1  # attempts to resume a download without receiving new data; the client would make five


class HubFault(OSError):
    """Error for a failed request; the client does not retry after it."""


@functools.cache
def hub_is_reachable(timeout: float = 5.0) -> bool:
    """Return whether the Hub, or a proxy in front of it, responds within `timeout` seconds, with any status."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=timeout)
            answered.set()

    # In a thread, because a DNS lookup can take longer than the timeout of the connection.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(timeout)


@functools.cache
def _fail_fast() -> None:
    """Give every request of the Hub client, which `datasets` and `transformers` also use, a timeout and no retries."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    timeout = max(constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)

    def client() -> Any:
        made = _http.default_client_factory()
        send = made.send

        def send_once(request: Any, **options: Any) -> Any:
            if _faults:  # some callers try the next file after a failure
                raise HubFault(_faults[0])
            if options.get("stream"):
                download = str(request.url), request.headers.get("Range")
                _downloads[download] += 1
                if _downloads[download] > 1 + RESUMPTIONS:
                    _faults.append("the download was interrupted and could not be resumed")
                    raise HubFault(_faults[0])
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), timeout)
            try:
                response = send(request, **options)
                if response.status_code < 500 and response.status_code != 429:
                    return response
                fault = f"the Hub returned status {response.status_code}"
            except Exception as error:
                fault = f"the Hub does not respond ({first_line(error)})"
            if str(request.url).startswith(constants.ENDPOINT):  # `datasets` handles failures of other hosts
                _faults.append(fault)
            raise HubFault(fault)

        made.send = send_once  # type: ignore[method-assign]
        return made

    huggingface_hub.set_client_factory(client)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # errors are raised as well


def from_cache_or_hub(load: Callable[[bool], Loaded], what: str, fix: str, cached: bool = False) -> Loaded:
    """Return `load(True)`, from the local cache, else `load(False)`, from the Hub. Raises UserError if both fail.

    Args:
        load: callable that takes `local_files_only` and raises OSError or ValueError if files are missing.
        what, fix: for the message: what is loaded, and an override that works without the Hub.
        cached: whether the files are known to be cached, so that a failure means they are damaged.
    """
    from huggingface_hub import constants

    try:
        with offline(constants):
            return load(True)
    except (OSError, ValueError) as missing:
        if not hub_is_reachable():
            where = "is not in the local cache"
            if cached:
                where = f"cannot be loaded from the local cache ({first_line(missing)})"
            raise UserError(f"{what} {where}, and the Hub cannot be reached.\n{fix}") from missing
    _fail_fast()
    _faults.clear()
    _downloads.clear()
    try:
        return load(False)
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be loaded: {_reason(error)}\n{fix}") from error


def _reason(error: BaseException) -> str:
    """Return the failed request behind an error, which callers of the client often hide, else the error itself."""
    from huggingface_hub.utils import _http

    if _faults:
        return _faults[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _http._DEFAULT_RETRY_ON_EXCEPTIONS):
            return f"the download was interrupted ({first_line(cause)})"
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


@contextlib.contextmanager
def offline(settings: Any) -> Iterator[None]:
    """Keep the Hub client with this module of constants from sending any request, including telemetry."""
    before = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def own_code_refused(what: str) -> Iterator[None]:
    """Convert transformers' error about a backbone's custom code into a UserError that names the key to set."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{what} comes with its own code, which is not run: set {TRUST}=true if you have read it and trust it"
        ) from None


def warn_of_own_code(auto_map: Any, what: str) -> None:
    """Warn if transformers supports the model type and therefore ignores the custom code."""
    if auto_map:
        log.warning("%s comes with its own code, which is not run; %s=true would run it", what, TRUST)
