"""Task files: plain YAML without `defaults`, interpolations (may read the environment) and aliases (may be huge)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusion.config.fields import require
from fusion.errors import UserError, first_line
from fusion.files import read_text
from fusion.tasks.table import KINDS, check_task
from fusion.tasks.task import HubConfig, Task
from fusion.text import shortened

_EXPECTED = "expected plain `key: value` lines without duplicate keys, such as kind: classification"


def _all_strings(values: Any) -> bool:
    return all(isinstance(value, str) and value for value in values)


@dataclass
class TaskConfig(Task):
    """A validated task file."""

    def __post_init__(self) -> None:
        where = f"task {self.name}" if self.name else "task file"

        def check(accepted: bool, key: str, expected: str, value: Any = None) -> None:
            require(accepted, f"{where}: {key}={shortened(getattr(self, key, value))}: expected {expected}")

        check(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}")
        text = [self.text] if isinstance(self.text, str) else self.text
        is_text = isinstance(text, list) and 1 <= len(text) <= 2 and _all_strings(text)
        check(is_text, "text", "one column name or a list of two")
        check(bool(self.label), "label", "the name of a column")
        allowed = KINDS[self.kind].metric_names
        self.metrics = self.metrics or [allowed[0]]
        check(set(self.metrics) <= set(allowed), "metrics", f"one or more of {', '.join(allowed)} (kind {self.kind})")
        if self.labels is not None:
            check(
                isinstance(self.labels, list) and all(type(name) in (str, int, float) for name in self.labels),
                "labels",
                'a list of names; quote yes, no, true, false and null ("yes"), which YAML does not parse as strings',
            )
            self.labels = [str(name) for name in self.labels]
        entries = self.raw_label_values
        values = [(type(value), repr(value)) for entry in entries for value in entry]
        are_raw = all(entries) and {kind for kind, _ in values} <= {str, int, float, bool, type(None)}
        are_raw = are_raw and len(set(values)) == len(values)
        check(are_raw, "label_values", "one value or list of values per label, without duplicates")
        check_task(self, where)
        check(_all_strings(self.columns.values()), "columns", "a column name for each key")
        for split, names in self.hub.splits.items() if self.hub is not None else ():
            are_names = _all_strings(names if isinstance(names, list) and names else [names])
            check(are_names, f"hub.splits.{split}", "the name of a split on the Hub, or a list of names", names)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> TaskConfig:
        """Create a task from plain containers. Raises UserError, which starts with `where`, if it is not valid."""
        try:
            hub = values.get("hub")
            return cls(**{**values, "hub": None if hub is None else HubConfig(**hub)})
        except (TypeError, UserError) as error:
            raise UserError(f"{where}: not a valid task in this version ({error})") from error


def read_task_file(path: Path, loader: Any) -> Any:
    """Read a task file with OmegaConf's YAML loader, a SafeLoader that rejects duplicate keys.

    Raises UserError if the file is not a YAML mapping of plain values.
    """
    try:
        text = read_text(path, path.read_bytes())
        for event in yaml.parse(text, Loader=loader):
            _check_event(event)
        task = loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # a long number, a list as a key, ...
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        reason = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{where}: not plain YAML: {reason}; {_EXPECTED}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(task, dict) or "defaults" in task:
        found = "the key 'defaults'" if isinstance(task, dict) else "no keys"
        raise UserError(f"{path}: found {found}; {_EXPECTED}")
    return task


def _check_event(event: Any) -> None:
    """Raise for an event of the YAML parser that is not allowed, before any object is constructed."""
    value, tag, found = getattr(event, "value", ""), getattr(event, "tag", None), None
    if isinstance(event, yaml.AliasEvent):
        found = f"the alias *{str(event.anchor)[:40]}"
    elif tag is not None:
        found = f"the tag {tag[:60]!r}"
    elif "${" in value or value == "???":
        found = "an interpolation ${...} or a missing value ???"
    if found is not None:
        raise yaml.MarkedYAMLError(problem=f"found {found}", problem_mark=event.start_mark)
