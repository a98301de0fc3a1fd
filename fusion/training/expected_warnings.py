"""Warnings of libraries about what this project does on purpose; no command shows them."""

from __future__ import annotations

import warnings

EXPECTED = (
    ".*module\\(s\\) in eval mode at the start of training",  # the frozen backbone
    ".*is smaller than the logging interval",
    ".*does not have many workers",  # loaders only gather tokenised rows
    ".*resuming from a checkpoint that ended before the epoch ended",  # the samplers resume within the epoch
    ".*treespec, LeafSpec",
    ".*will save all targets and predictions in the buffer",
    ".*variance of predictions or target is close to zero",  # such a correlation counts as 0
    ".*[Pp]ickl",  # of fingerprints and files: the caches have keys of their own, and no file is unpickled
)


def ignore_expected_warnings() -> None:
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
