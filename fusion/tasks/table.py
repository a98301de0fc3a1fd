"""The task types (`kind`). To add a kind, add an object here."""

from __future__ import annotations

from fusion.errors import UserError
from fusion.tasks.choice import Choice
from fusion.tasks.classification import Classification
from fusion.tasks.kind import Kind
from fusion.tasks.multi_label import MultiLabel
from fusion.tasks.regression import Regression
from fusion.tasks.tagging import Tagging
from fusion.tasks.task import Task

_EVERY: tuple[Kind, ...] = (Classification(), Regression(), Choice(), MultiLabel(), Tagging())
KINDS: dict[str, Kind] = {kind.name: kind for kind in _EVERY}
METRICS = {kind.name: kind.metric_names for kind in _EVERY}


def kind_of(task: Task) -> Kind:
    return KINDS[task.kind]


def check_task(task: Task, where: str) -> None:
    """Raise UserError, which starts with `where`, if the task is invalid for its kind or has keys of another kind."""
    kind_of(task).check(task, where)
    for owner in _EVERY:
        for key in owner.keys:
            if key not in kind_of(task).keys and getattr(task, key) is not None:
                raise UserError(f"{where}: {key} is only allowed for kind={owner.name}, not {task.kind}")
