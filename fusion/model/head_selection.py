"""Which task of an artifact answers: its own, or one that is asked for and that a head of it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.tasks.kind import Decision
from fusion.text import shortened

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


@dataclass(frozen=True)
class Answer:
    """A task, and which of the artifact's heads scores its rows: the number, and its own task's name.

    decision: what predictions with this head depend on, as its training chose it, see `Kind.decision`.
    """

    task: TaskConfig
    head: int
    head_task: str
    decision: Decision


def own_tasks(manifest: Manifest) -> list[TaskConfig]:
    """What the artifact was trained on, in the order of its heads."""
    where = f"manifest of {manifest.name}"
    try:
        return [task.as_config(where) for task in manifest.tasks]
    except UserError as error:  # what it quotes from the file may hold anything
        raise UserError(shortened(str(error), 600)) from None


def decision_of(manifest: Manifest, head: int = 0) -> Decision:
    """What the manifest keeps beside one of the artifact's heads."""
    return dict(manifest.heads[head].decision)


def answers(manifest: Manifest, asked: TaskConfig | None) -> list[Answer]:
    """What to score: the artifact's own tasks, or the one that is asked for.

    A task that the artifact has by name gets that head, any other one the head with its kind and labels.

    Raises:
        UserError: no head fits the task, or several do.
    """
    own = own_tasks(manifest)
    if asked is None:
        return [
            Answer(task, number, str(task.name), decision_of(manifest, number))
            for number, task in enumerate(own)
        ]
    named = [number for number, task in enumerate(own) if task.name == asked.name]
    fitting = [number for number in named or range(len(own)) if _form(own[number]) == _form(asked)]
    if len(fitting) == 1:
        return [Answer(asked, fitting[0], str(own[fitting[0]].name), decision_of(manifest, fitting[0]))]
    names = [str(task.name) for task in own]
    one_of = f"say +task= with one of {', '.join(names)}" if len(own) > 1 else "leave +task= out"
    if fitting:
        several = " and ".join(names[number] for number in fitting)
        raise UserError(
            f"{manifest.name}: the heads of {several} would all do for task {asked.name}, and which is meant "
            f"cannot be told.\nTrain for it with stage 1 or 2, or {one_of}"
        )
    like = own[named[0]] if named else own[0] if len(own) == 1 else None
    what = _shown(like) if like is not None else f"the tasks {', '.join(names)}"
    raise UserError(
        f"{manifest.name} answers {what}, and task {asked.name} asks for {_shown(asked)}.\n"
        f"Train for it with stage 1 or 2, or {one_of}"
    )


def _form(task: TaskConfig) -> tuple[Any, ...]:
    return task.kind, task.labels


def _shown(task: TaskConfig) -> str:
    return f"{task.kind} with labels {task.labels}"
