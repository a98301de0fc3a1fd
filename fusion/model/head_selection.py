"""Head selection: choose the head of an artifact for a task."""

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
    """A task and the head that predicts its examples.

    Attributes:
        index: index of the head.
        trained_on: name of the task that the head was trained on.
        decision: decision parameters of the predictions, see `Kind.decision`.
    """

    task: TaskConfig
    index: int
    trained_on: str
    decision: Decision


def select_heads(manifest: Manifest, task: TaskConfig | None) -> list[SelectedHead]:
    """Return the head for a task: the head with its name, else the only head with its kind and labels.

    If `task` is `None`, return all heads. Raises UserError if not exactly one head matches the task, or this version
    cannot run a stored task.
    """
    manifest.check_head()
    try:
        tasks = [stored.as_config(f"manifest of {manifest.name}") for stored in manifest.tasks]
    except UserError as error:  # the message may quote a long string of the manifest
        raise UserError(shortened(str(error), 600)) from None
    described = enumerate(zip(tasks, manifest.heads, strict=True))
    heads = [SelectedHead(own, index, str(own.name), dict(head.decision)) for index, (own, head) in described]
    if task is None:
        return heads
    candidates = [head for head in heads if head.trained_on == task.name] or heads
    matching = [head for head in candidates if (head.task.kind, head.task.labels) == (task.kind, task.labels)]
    if len(matching) == 1:
        return [replace(matching[0], task=task)]
    existing = "; ".join(f"{head.trained_on}: {_form(head.task)}" for head in matching or candidates)
    otherwise = "omit +task=" if len(heads) == 1 else f"set +task= to one of {', '.join(manifest.task_names)}"
    raise UserError(
        f"{manifest.name} has {'more than one head' if matching else 'no head'} for task {task.name} ({_form(task)}), "
        f"expected one head with the same kind and labels; found {existing}\n"
        f"Train on this task with stage 1 or 2, or {otherwise}"
    )


def _form(task: TaskConfig) -> str:
    return f"{task.kind} with labels {task.labels}"
