"""What a step frees stays with the process."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from fusion.memory import give_back_memory, keep_freed_memory

FAULTS = """
import resource, sys, torch
from fusion.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    kept = [torch.ones(1 << 20) for _ in range(30)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_steps_of_the_same_size_cause_no_page_faults() -> None:
    # Set by hand, the threshold no longer grows with use: without the call every large block is mapped anew.
    mapped = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, env=mapped, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100 < faults("leave")


GIVEN_BACK = '''
import resource, torch
from pathlib import Path
from fusion.memory import give_back_memory, keep_freed_memory
def megabytes():
    """That are resident: addresses alone are no memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
keep_freed_memory()
before = megabytes()
kept = [torch.ones(1 << 20) for _ in range(30)]
del kept
between = megabytes()
assert give_back_memory()
print(before, between, megabytes())
'''


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_what_was_kept_can_be_given_back() -> None:
    command = [sys.executable, "-c", GIVEN_BACK]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    before, between, after = map(int, shown.split())
    assert between - before > 100 and between - after > 80


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
    assert give_back_memory() is False
