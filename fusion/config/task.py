"""The task file: the values that its keys accept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusion.config.fields import require
from fusion.errors import UserError
from fusion.tasks.table import KINDS, check_task
from fusion.tasks.task import HubConfig, Task
from fusion.text import shortened


def _all_texts(values: Any) -> bool:
    return all(isinstance(value, str) and value for value in values)


def _is_raw_label(value: Any) -> bool:
    return isinstance(value, (str, int, float, type(None)))


def _is_label_name(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


@dataclass
class TaskConfig(Task):
    """A task file, checked."""

    def __post_init__(self) -> None:
        where = f"task {self.name}" if self.name else "task file"

        def check(accepted: bool, key: str, value: Any, expected: str) -> None:
            require(accepted, f"{where}: {key}={shortened(value)}: expected {expected}")

        check(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        text = [self.text] if isinstance(self.text, str) else self.text
        is_text = isinstance(text, list) and 1 <= len(text) <= 2 and _all_texts(text)
        check(is_text, "text", self.text, "one column name or a list of two")
        check(bool(self.label), "label", self.label, "the name of a column")
        allowed = KINDS[self.kind].metric_names
        check(
            len(self.metrics) > 0 and set(self.metrics) <= set(allowed),
            "metrics",
            self.metrics,
            f"some of {', '.join(allowed)}, which fit kind {self.kind}",
        )
        if self.labels is not None:
            check(
                isinstance(self.labels, list) and all(map(_is_label_name, self.labels)),
                "labels",
                self.labels,
                'a list of names; yes, no, true, false and null are no texts in YAML unless in quotes, as "yes"',
            )
            self.labels = [str(name) for name in self.labels]
        entries = self.raw_label_values
        values = [(type(value), repr(value)) for entry in entries for value in entry]
        check(
            all(entry and all(map(_is_raw_label, entry)) for entry in entries) and len(set(values)) == len(values),
            "label_values",
            self.label_values,
            "for each label a value, or a list of values, each once",
        )
        check_task(self, where)
        check(_all_texts(self.columns.values()), "columns", self.columns, "the name of a column for each")
        for split, names in self.hub.splits.items() if self.hub is not None else ():
            check(
                _all_texts(names if isinstance(names, list) and names else [names]),
                f"hub.splits.{split}",
                names,
                "the hub's name of a split, or a list of names",
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> TaskConfig:
        """A task of plain containers.

        Raises:
            UserError: it is not a task of this version; the message starts with `where`.
        """
        try:
            hub = values.get("hub")
            return cls(**{**values, "hub": None if hub is None else HubConfig(**hub)})
        except (TypeError, UserError) as error:
            raise UserError(f"{where}: not a task of this version ({error})") from error
