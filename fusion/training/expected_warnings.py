"""Library warnings about intended behavior, which all commands suppress."""

from __future__ import annotations

import warnings

EXPECTED = (
    ".*module\\(s\\) in eval mode at the start of training",  # the frozen backbone
    ".*is smaller than the logging interval",
    ".*does not have many workers",  # loaders only collate tokenized examples
    ".*resuming from a checkpoint that ended before the epoch ended",  # the samplers resume within the epoch
    ".*treespec, LeafSpec",
    ".*will save all targets and predictions in the buffer",
    ".*variance of predictions or target is close to zero",  # the correlation is then reported as 0
    ".*[Pp]ickl",  # fingerprints and files: the caches use their own keys, and no file is unpickled
)


def ignore_expected_warnings() -> None:
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
