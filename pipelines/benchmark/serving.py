"""A worker's side of the conversation: a JSON line in, a JSON line out, nothing else on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import torch

from pipelines.benchmark import measure
from pipelines.benchmark.cases import INFER, TRAIN, Case, Setup

Handler = Callable[[dict[str, Any]], dict[str, Any]]


class Model(Protocol):
    """One built model with its batch."""

    def train(self) -> object:
        """One training step."""

    def infer(self) -> object:
        """Scores of one batch, the model in evaluation mode."""

    def check(self) -> dict[str, Any]:
        """`logits` (B, K) of a padded batch, and that batch's `loss` and `penalty` with dropout off."""


class Worker:
    """Builds each case's model once and does with it what it is asked to.

    Subclasses say how a model is built; `commands` may add to what can be asked for.
    """

    def __init__(self) -> None:
        self.setup: Setup | None = None
        self.models: dict[Case, Model] = {}
        self.commands: dict[str, Handler] = {
            "setup": self.prepare,
            "time": self.time,
            "peak": self.peak,
            "check": self.check,
            "forget": self.forget,
        }

    def build(self, setup: Setup, case: Case) -> Model:
        raise NotImplementedError

    def other_work(self, setup: Setup, case: Case, warmup: int, steps: int) -> list[float]:
        """Seconds of work that only one of the workers knows."""
        raise ValueError(f"{case}: not measured here")

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        self.setup = Setup(**request["setup"])
        torch.set_num_threads(self.setup.threads)
        self.models.clear()
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        setup, case, warmup, steps = (
            self._setup(),
            Case(**request["case"]),
            request["warmup"],
            request["steps"],
        )
        if case.work not in (TRAIN, INFER):
            return {"seconds": self.other_work(setup, case, warmup, steps)}
        step = self._step(self._model(case), case)
        return {"seconds": measure.timed(step, warmup, steps, setup.device)}

    def peak(self, request: dict[str, Any]) -> dict[str, Any]:
        """Of a model that has just been built: no gradient and no optimizer's state is there yet."""
        setup, case = self._setup(), Case(**request["case"])
        model = self.build(setup, case)
        return {"bytes": measure.peak_bytes(self._step(model, case), setup.device)}

    def check(self, request: dict[str, Any]) -> dict[str, Any]:
        return self.build(self._setup(), Case(**request["case"])).check()

    def forget(self, request: dict[str, Any]) -> dict[str, Any]:
        self.models.clear()
        return {}

    def _setup(self) -> Setup:
        if self.setup is None:
            raise RuntimeError("the first thing to ask for is setup")
        return self.setup

    def _model(self, case: Case) -> Model:
        if case not in self.models:
            self.models[case] = self.build(self._setup(), case)
        return self.models[case]

    def _step(self, model: Model, case: Case) -> measure.Step:
        return self.in_precision({TRAIN: model.train, INFER: model.infer}[case.work])

    def in_precision(self, step: measure.Step) -> measure.Step:
        """The step under autocast, where the setup asks for it."""
        if self._setup().precision == "float32":
            return step

        def in_half() -> object:
            with torch.autocast(self._setup().device, torch.bfloat16):
                return step()

        return in_half


def serve(worker: Worker) -> None:
    """Answers until stdin ends. What libraries print goes to stderr, which is the worker's log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            started = time.monotonic()
            answer = worker.commands[request["do"]](request)
            print(
                f"{request['do']} {request.get('case', '')}: {time.monotonic() - started:.1f} s",
                file=sys.stderr,
            )
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)
