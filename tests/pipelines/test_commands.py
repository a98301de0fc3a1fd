"""Running the project's commands from a journey."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.commands import ROOT, attempt, call, read_config


def test_a_failed_command_ends_the_journey_with_its_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call("fusion.stage1", ["+task=nothing_like_it"])
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert out.startswith("$ python -m fusion.stage1 +task=nothing_like_it")
    assert "exit code 2" in out and "nothing_like_it" in err


def test_a_failed_attempt_says_how_it_ended(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = attempt("fusion.stage1", ["+task=nothing_like_it"])
    assert outcome.code == 2 and outcome.seconds > 0
    assert any("nothing_like_it" in line for line in outcome.errors)
    out, err = capfd.readouterr()
    assert out.startswith("$ python -m fusion.stage1 +task=nothing_like_it")
    assert err.splitlines() == list(outcome.errors), "what it says is shown as well"


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("sys.exit(130)", 130),
        ("sys.exit(143)", 143),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("signal.signal(signal.SIGINT, signal.SIG_DFL), os.kill(os.getpid(), signal.SIGINT)", 130),
    ],
)
def test_an_interrupted_attempt_ends_the_journey(
    ends: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "probe.py").write_text(f"import os, signal, sys, time; {ends}; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        attempt("probe", [])
    assert ended.value.code == code


def test_an_attempt_succeeds_or_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(
        "import os, sys\nfor line in range(50): print(line, file=sys.stderr)\n"
        "if sys.argv[1:]: os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = attempt("probe", [])
    assert outcome.code == 0 and outcome.errors == tuple(str(line) for line in range(30, 50))
    assert attempt("probe", ["now"]).code == -9, "no interrupt: the next command may do better"


def test_a_variable_can_be_hidden_and_the_seconds_are_those_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "probe.py").write_text(
        "import os, sys, time; time.sleep(0.3); sys.exit('HIDE' in os.environ)"
    )
    monkeypatch.setenv("HIDE", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit):
        call("probe", [])
    assert 0.3 <= call("probe", [], without=("HIDE",)) < 30


def test_a_terminated_journey_terminates_its_command(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    code = "from pipelines.commands import call; call('probe', [])"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("$ python -m probe")
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    for _ in range(50):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the command outlived the journey")


def test_help_says_what_a_journey_does_and_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.two_stage import TwoStageConfig

    with pytest.raises(SystemExit) as ended:
        read_config(TwoStageConfig, ["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "single adapter, over seeds" in said and "backbone: minilm" in said


def test_a_command_of_a_journey_does_not_say_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "probe.py").write_text("import os; print('next', os.environ['FUSION_NEXT'])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    call("probe", [])
    assert "next 0" in capfd.readouterr().out
