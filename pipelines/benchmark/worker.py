"""A worker process, which builds and measures the model of each case. Shapes: B examples, T tokens, K outputs."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.benchmark.cases import INFER, OUTPUTS, TRAIN, Case, Setup

Step = Callable[[], object]


class TokenBatch(NamedTuple):
    """input_ids, attention_mask: (B, T). labels: (B,)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def token_batch(setup: Setup, vocabulary: int, padded: bool = False) -> TokenBatch:
    """Return random tokens without special tokens; `padded` shortens every second example by up to half."""
    rows, tokens = setup.batch_size, setup.tokens
    random = torch.Generator().manual_seed(setup.seed)
    # BERT's first thousand ids are special or unused, except in the small vocabulary of a test model.
    ids = torch.randint(1000 if vocabulary > 2000 else 5, vocabulary, (rows, tokens), generator=random)
    lengths = torch.full((rows,), tokens)
    if padded:
        shorter = torch.randint(max(1, tokens // 2), tokens + 1, (rows,), generator=random)
        lengths[1::2] = shorter[1::2]
    mask = (torch.arange(tokens) < lengths.unsqueeze(-1)).long()
    labels = torch.randint(0, OUTPUTS, (rows,), generator=random)
    return TokenBatch(*(tensor.to(setup.device) for tensor in (ids * mask, mask, labels)))


def synchronise(device: str) -> None:
    """Wait for queued CUDA kernels; otherwise only their launch would be timed."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, warmup: int, steps: int, device: str) -> list[float]:
    """Return the seconds of each of `steps` calls, after `warmup` untimed ones."""
    seconds = []
    for _ in range(warmup + steps):
        synchronise(device)
        started = time.perf_counter()
        step()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return seconds[warmup:]


def peak_bytes(step: Step, device: str) -> int:
    """Return the peak bytes of tensors above those allocated before, over two calls: the first creates gradients."""
    if device == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(), step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "this torch records no memory events"
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Model:
    """Base class of both implementations, with a full batch to time and a padded one to compare."""

    batch: Any
    padded: Any

    def train(self) -> None:
        """Run a training step."""
        raise NotImplementedError

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses in training mode: `task`, and `value_penalty` for a fusion."""
        raise NotImplementedError

    def scores(self, batch: Any) -> Tensor:
        """Return the logits in evaluation mode, (B, K)."""
        raise NotImplementedError

    @torch.inference_mode()
    def infer(self) -> Tensor:
        return self.scores(self.batch)

    def check(self) -> dict[str, Any]:
        losses = {name: value.item() for name, value in self.losses(self.padded).items()}
        with torch.inference_mode():
            logits = self.scores(self.padded).tolist()
        return {"logits": logits, "loss": losses["task"], "penalty": losses.get("value_penalty", 0.0)}


class Worker:
    """Builds the model of each case once. The `do` of a request is the name of one of its methods."""

    setup: Setup

    def __init__(self) -> None:
        self.models: dict[Case, Model] = {}

    def build(self, case: Case) -> Model:
        raise NotImplementedError

    def prepare(self, setup: dict[str, Any]) -> dict[str, Any]:
        self.setup = Setup(**setup)
        torch.set_num_threads(self.setup.threads)
        self.models.clear()
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def time(self, case: Case, warmup: int, steps: int) -> list[float]:
        return timed(self._step(self.model(case), case), warmup, steps, self.setup.device)

    def peak(self, case: Case) -> int:
        """Measure a new model, which has no gradients and no optimizer state yet."""
        return peak_bytes(self._step(self.build(case), case), self.setup.device)

    def check(self, case: Case) -> dict[str, Any]:
        return self.build(case).check()

    def forget(self) -> None:
        self.models.clear()

    def model(self, case: Case) -> Model:
        if case not in self.models:
            self.models[case] = self.build(case)
        return self.models[case]

    def _step(self, model: Model, case: Case) -> Step:
        return self.in_precision({TRAIN: model.train, INFER: model.infer}[case.work])

    def in_precision(self, step: Step) -> Step:
        """Wrap the step in autocast if the precision is bf16."""
        half = self.setup.precision == "bf16"
        return torch.autocast(self.setup.device, torch.bfloat16)(step) if half else step


def serve(worker: Worker) -> None:
    """Answer requests on stdin until the other end of the pipe is closed."""
    pipe = Connection(os.dup(0))
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = json.loads(pipe.recv_bytes())
            do = request.pop("do")
            if "case" in request:
                request["case"] = Case(**request["case"])
            started = time.monotonic()
            try:
                answer = {"result": getattr(worker, do)(**request)}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(f"{do} {request.get('case', '')}: {time.monotonic() - started:.1f} s", flush=True)
            pipe.send_bytes(json.dumps(answer).encode())
