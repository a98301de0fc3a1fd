"""Running the project's commands from a workflow, and reading its settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.errors import UserError
from pipelines import adapterdrop, demo, ranking, two_stage
from pipelines.commands import ROOT, attempt, call, read_config


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A module that the commands below run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "probe.py"


def test_a_refused_command(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = attempt("fusion.stage1", ["+task=nothing_like_it"])
    assert outcome.code == 2 and outcome.seconds > 0
    out, err = capfd.readouterr()
    assert out.startswith("$ python -m fusion.stage1 +task=nothing_like_it")
    assert "nothing_like_it" in err and err.splitlines() == list(outcome.errors)


def test_a_failed_command_exits_with_its_code(probe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    probe.write_text("import sys; sys.exit(3)")
    with pytest.raises(SystemExit) as ended:
        call("probe", [])
    assert ended.value.code == 3 and "exited with code 3" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("sys.exit(130)", 130),
        ("sys.exit(143)", 143),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("signal.signal(signal.SIGINT, signal.SIG_DFL), os.kill(os.getpid(), signal.SIGINT)", 130),
    ],
)
def test_an_interrupted_command_ends_the_workflow(ends: str, code: int, probe: Path) -> None:
    probe.write_text(f"import os, signal, sys, time; {ends}; time.sleep(60)")
    with pytest.raises(SystemExit) as ended:
        attempt("probe", [])
    assert ended.value.code == code


def test_the_last_errors_are_kept_also_of_a_killed_command(probe: Path) -> None:
    probe.write_text(
        "import os, sys\nfor line in range(50): print(line, file=sys.stderr, flush=True)\n"
        "if sys.argv[1:]: os.kill(os.getpid(), 9)\n"
    )
    last = tuple(str(line) for line in range(30, 50))
    assert [(o.code, o.errors) for o in (attempt("probe", []), attempt("probe", ["x"]))] == [(0, last), (-9, last)]


def test_the_environment_and_the_seconds_of_a_command(
    probe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    probe.write_text("import os, time; time.sleep(0.3); print(os.environ['FUSION_NEXT'], os.environ['GIVEN'])")
    monkeypatch.setenv("GIVEN", "1")
    assert 0.3 <= call("probe", []) < 30
    assert "0 1" in capfd.readouterr().out


@pytest.mark.parametrize("function", ["call", "attempt"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_workflow_and_its_command(
    function: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    (tmp_path / "probe.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    script = (
        "import sys; from fusion.runs.signals import exit_code; from pipelines import commands; "
        f"sys.exit(exit_code(lambda: commands.{function}('probe', [])))"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("$ python -m probe")
    child = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(30) == code
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (demo, ["lables=3"]),
        (demo, ["labels=0"]),
        (demo, ["labels=many"]),
        (demo, ["seed=-1"]),
        (demo, ["labels"]),
        (adapterdrop, ["rows=0"]),
        (adapterdrop, ["tasks=[cb,cb]"]),
        (two_stage, ["seeds=[]"]),
        (two_stage, ["targets=[cb,cb]"]),
        (two_stage, ["sedes=[1]"]),
        (ranking, ["seeds=[]"]),
        (ranking, ["sources=[snli]"]),
        (ranking, ["targets=[cb,cb]"]),
        (ranking, ["targets=[snli]"]),
        (ranking, ["target=[cb]"]),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(module: object, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main(words) == 2  # type: ignore[attr-defined]
    word = words[0] if words[0] != "targets=[snli]" else "snli"
    assert word.partition("=")[0] in capsys.readouterr().err


def test_settings_are_read() -> None:
    assert read_config(demo.DemoConfig, ["labels=3", "seed=1", "labels=300"]) == demo.DemoConfig(labels=300, seed=1)
    config = read_config(two_stage.TwoStageConfig, ["targets=[cb,rte]", "data_dir=null"])
    assert (config.targets, config.data_dir, config.seeds) == (["cb", "rte"], None, [1, 2, 3, 4, 5])
    with pytest.raises(UserError, match="seeds"):
        read_config(two_stage.TwoStageConfig, ["seeds=[a]"])


@pytest.mark.parametrize("module", [demo, adapterdrop, two_stage, ranking], ids=lambda module: module.__name__)
def test_help_has_the_description_and_the_defaults(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main(["--help"]) == 0  # type: ignore[attr-defined]
    shown = capsys.readouterr().out
    assert str(module.__doc__) in shown and "\noutput: outputs/" in shown
