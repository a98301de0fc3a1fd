"""Head selection: which of an artifact's heads scores the rows of a task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.tasks.kind import Decision
from fusion.text import shortened

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


@dataclass(frozen=True)
class SelectedHead:
    """A task, and the head that scores its rows.

    Attributes:
        index: of the head.
        trained_on: the name of the task that the head was trained on.
        decision: what its predictions depend on besides the scores, see `Kind.decision`.
    """

    task: TaskConfig
    index: int
    trained_on: str
    decision: Decision


def select_heads(manifest: Manifest, task: TaskConfig | None) -> list[SelectedHead]:
    """The head for a task: the one of its name, else the only one with its kind and labels. None: all heads.

    Raises:
        UserError: no head or more than one head fits the task, or this version cannot run a stored task.
    """
    try:
        tasks = [stored.as_config(f"manifest of {manifest.name}") for stored in manifest.tasks]
    except UserError as error:  # it may quote a long text of the manifest
        raise UserError(shortened(str(error), 600)) from None
    heads = [
        SelectedHead(own, index, str(own.name), dict(manifest.heads[index].decision)) for index, own in enumerate(tasks)
    ]
    if task is None:
        return heads
    candidates = [head for head in heads if head.trained_on == task.name] or heads
    fitting = [head for head in candidates if (head.task.kind, head.task.labels) == (task.kind, task.labels)]
    if len(fitting) == 1:
        return [replace(fitting[0], task=task)]
    existing = "; ".join(f"{head.trained_on}: {_form(head.task)}" for head in fitting or candidates)
    raise UserError(
        f"{manifest.name} has {'more than one head' if fitting else 'no head'} for task {task.name} ({_form(task)}), "
        f"expected one of the same kind and labels; found {existing}\n"
        "Train for it with stage 1 or 2, "
        + (
            "or leave +task= out"
            if len(heads) == 1
            else f"or set +task= to one of {', '.join(map(str, manifest.task_names))}"
        )
    )


def _form(task: TaskConfig) -> str:
    return f"{task.kind} with labels {task.labels}"
