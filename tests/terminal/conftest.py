"""A terminal to look at."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from fusion.terminal import bars, display
from tests.terminal.emulator import Terminal, look_on


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """stdout and stderr, 120 columns wide; whatever a test leaves drawn is gone after it."""
    yield Terminal()
    bars.end_sweep()
    display.close()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """pytest's own stdout and stderr are set anew before the test itself: only then can they be the terminal."""
    terminal = getattr(item, "funcargs", {}).get("terminal")
    with pytest.MonkeyPatch.context() as patch:
        if terminal is not None:
            look_on(patch, terminal)
        return (yield)
