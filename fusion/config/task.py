"""The task file: its keys, their types, and what a wrong value gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from fusion.config.fields import require
from fusion.errors import UserError
from fusion.tasks.table import KINDS, check_task
from fusion.tasks.task import HubConfig, Task
from fusion.text import shortened


def _is_raw_label(entry: Any) -> bool:
    """An entry of `label_values`: a raw label, or a list of such."""
    values = entry if isinstance(entry, list) else [entry]
    return len(values) > 0 and all(isinstance(v, (str, int, float, bool, type(None))) for v in values)


@dataclass
class TaskConfig(Task):
    """A task file, checked."""

    def __post_init__(self) -> None:
        where = f"task {self.name}" if self.name else "task file"
        require(
            self.kind in KINDS, f"{where}: kind={shortened(self.kind)}: expected one of {', '.join(KINDS)}"
        )
        text = [self.text] if isinstance(self.text, str) else self.text
        require(
            isinstance(text, list) and 1 <= len(text) <= 2 and all(isinstance(t, str) for t in text),
            f"{where}: text={shortened(self.text)}: expected one column name or a list of two",
        )
        require(bool(self.label), f"{where}: label is empty: expected the name of a column")
        for metric in self.metrics:
            allowed = KINDS[self.kind].metric_names
            require(
                metric in allowed,
                f"{where}: metric {shortened(metric)} does not fit kind {self.kind}: expected {', '.join(allowed)}",
            )
        require(
            len(self.metrics) > 0,
            f"{where}: metrics is empty: name at least one of {', '.join(KINDS[self.kind].metric_names)}",
        )
        self.labels = self._label_names(where)
        require(
            all(_is_raw_label(entry) for entry in self.label_values or []),
            f"{where}: label_values={shortened(self.label_values)}: expected for each label a value, or a list of values",
        )
        values = [(type(value), repr(value)) for entry in self.raw_label_values for value in entry]
        require(
            len(set(values)) == len(values),
            f"{where}: label_values={shortened(self.label_values)}: a value stands twice",
        )
        check_task(self, where)
        require(
            all(isinstance(name, str) for name in self.columns.values()),
            f"{where}: columns={shortened(self.columns)}: expected the name of a column for each",
        )
        for split, names in self.hub.splits.items() if self.hub is not None else ():
            every = names if isinstance(names, list) and names else [names]
            require(
                all(isinstance(name, str) and name for name in every),
                f"{where}: hub.splits.{split}={shortened(names)}: expected the hub's name of a split, or a list of names",
            )

    def _label_names(self, where: str) -> Optional[list[str]]:
        if self.labels is None:
            return None
        require(
            isinstance(self.labels, list),
            f"{where}: labels={shortened(self.labels)}: expected a list of names",
        )
        require(
            all(isinstance(name, (str, int, float, bool, type(None))) for name in self.labels),
            f"{where}: labels={shortened(self.labels)}: expected a list of names",
        )
        require(
            not any(isinstance(name, bool) or name is None for name in self.labels),
            f"{where}: labels={shortened(self.labels)}: YAML reads yes, no, true, false and null as values of its own; "
            'write them in quotes, as "yes"',
        )
        return [str(name) for name in self.labels]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> TaskConfig:
        """A task as the manifest `where` keeps it.

        Raises:
            UserError: it is none of this version.
        """
        try:
            hub = values.get("hub")
            return cls(**{**values, "hub": None if hub is None else HubConfig(**hub)})
        except (TypeError, UserError) as error:
            raise UserError(f"{where}: its task is none that this version reads ({error})") from error
