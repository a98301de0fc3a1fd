"""Crash test: kills happen exactly where they are planned, faults are detected, and a short run of the command."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from fusion.store.artifacts import load, save
from tests.bench import Bench
from tests.crash import attempts, faults, trial
from tests.crash.__main__ import main
from tests.crash.attempts import Attempt, Stopped, alive, make_attempt
from tests.crash.faults import BATCH, MAIN, READS, Faults, processes_of, watch_files
from tests.crash.plan import ANY_MOMENT, MOST_KILLS, PHASE, PLACES, TRAINING, Kill, Plan, Profile
from tests.crash.trial import EQUAL, Death, StoreReader, Trial
from tests.crash.workload import KINDS, NAME

# The files of a run: caches, checkpoints, an artifact, an overwrite.
STAND_IN = textwrap.dedent("""
    import os, shutil
    from pathlib import Path

    def write(path, content=b"x" * 100):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    for cache in ("tokens.safetensors.1", ".a.states.1"):
        write(Path("cache", f"{cache}.partial"))
        os.replace(f"cache/{cache}.partial", f"cache/{cache.removesuffix('.1')}")
    run = Path("store/.runs/made-1")
    for _ in range(3):
        write(run / ".last.ckpt.1.partial")
        if (run / "last.ckpt").exists():
            os.replace(run / "last.ckpt", run / "before.ckpt")
        os.replace(run / ".last.ckpt.1.partial", run / "last.ckpt")
        (run / ".position.json.1.partial").touch()
        os.replace(run / ".position.json.1.partial", run / "position.json")
    (run / "last.ckpt").read_bytes()
    staged, old = Path("store/.staging/made~new"), Path("store/.staging/made.old")
    for _ in range(2):
        for name in ("weights.safetensors", "head.safetensors", "manifest.json"):
            write(staged / name)
        if Path("store/made").exists():
            os.replace("store/made", old)
        os.replace(staged, "store/made")
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(run)
""")
CHECKPOINTS, STAGED = "store/.runs/made-1", "store/.staging/made~new"


class Killed(BaseException):
    pass


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a stub of a training run in this process; kills raise an exception."""

    def run(place: str = "", count: int = 1, target: str = MAIN, share: float = 0.3) -> Faults:
        kill = {"place": place, "count": count, "target": target, "share": share}
        injected = Faults(tmp_path, kill if place else None, MAIN)
        watch_files(injected)
        exec(STAND_IN, {})
        return injected

    def kill(folder: Path, target: str) -> None:
        if target == MAIN:
            raise Killed

    for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    monkeypatch.setattr(faults, "kill_processes", kill)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize(
    ("place", "count", "path", "size"),
    [
        ("half a file of the token cache", 1, "cache/tokens.safetensors.1.partial", 30),
        ("half a file of the feature cache", 1, "cache/.a.states.1.partial", 30),
        ("before the feature cache is put in place", 1, "cache/.a.states.1.partial", 100),
        ("half a checkpoint", 2, f"{CHECKPOINTS}/.last.ckpt.1.partial", 30),
        ("a checkpoint is written and not synced", 2, f"{CHECKPOINTS}/.last.ckpt.1.partial", 100),
        ("before a checkpoint's renames", 1, f"{CHECKPOINTS}/before.ckpt", None),
        ("between a checkpoint's renames", 1, f"{CHECKPOINTS}/last.ckpt", None),
        ("a checkpoint is in place, its position not", 1, f"{CHECKPOINTS}/position.json", None),
        ("after a checkpoint", 1, f"{CHECKPOINTS}/position.json", 0),
        ("half the weights", 1, f"{STAGED}/weights.safetensors", 30),
        ("half the head", 2, f"{STAGED}/head.safetensors", 30),
        ("before the manifest is written", 1, f"{STAGED}/head.safetensors", 100),
        ("half the manifest", 1, f"{STAGED}/manifest.json", 30),
        ("staged and not in place", 1, f"{STAGED}/manifest.json", 100),
        ("between an overwrite's renames", 1, "store/.staging/made.old/manifest.json", 100),
        ("overwritten, the old one is still there", 1, "store/.staging/made.old/manifest.json", 100),
        ("stored, the checkpoints are still there", 1, f"{CHECKPOINTS}/last.ckpt", 100),
        ("the checkpoints are half removed", 1, f"{CHECKPOINTS}/before.ckpt", None),
    ],
)
def test_files_after_a_kill(stand_in: Any, place: str, count: int, path: str, size: int | None) -> None:
    with pytest.raises(Killed):
        stand_in(place, count)
    assert Path(path).exists() == (size is not None)
    assert size is None or Path(path).stat().st_size == size


def test_visits_are_counted_and_other_processes_continue(stand_in: Any) -> None:
    visits = stand_in("half the weights", target="1").visits
    assert visits["half a checkpoint"] == 3 and visits["between a checkpoint's renames"] == 2
    assert visits["between an overwrite's renames"] == 1 and visits["half the weights"] == 2
    assert Path("store/made/weights.safetensors").stat().st_size == 100


# --- attempts -------------------------------------------------------------------------------------


def attempt(folder: Path, program: str, kill: Kill | None = None, **options: Any) -> Attempt:
    (folder / "probe.py").write_text(textwrap.dedent(program))
    given: dict[str, Any] = {"check": lambda: None, "stop": threading.Event()} | options
    return make_attempt(sys.executable, folder / "runs" / "1" / "attempt-1", ["probe"], kill, **given)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a space in its name, on the import path."""
    folder = tmp_path / "out put"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def test_an_undisturbed_attempt(folder: Path) -> None:
    ended = attempt(folder, STAND_IN + "\nprint('the end')\nraise SystemExit(3)")
    assert (ended.code, ended.killed, ended.problems, ended.last_line) == (3, None, [], "the end")
    assert ended.profile.visits["half a checkpoint"] == 3 and not ended.profile.visits["a validation batch"]


@pytest.mark.parametrize("kill", [Kill(READS, 1, MAIN), Kill(ANY_MOMENT, 1, "1", seconds=0.2)])
def test_an_attempt_is_killed(folder: Path, kill: Kill) -> None:
    ended = attempt(folder, STAND_IN + "\nimport time; time.sleep(60)", kill)
    assert (ended.code, ended.killed, ended.problems) == (-signal.SIGKILL, MAIN, [])


def test_only_the_target_is_killed_and_processes_that_outlive_the_command_are_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "GRACE", 0.5)
    program = """
        import os, subprocess, sys, time
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        ranks = [subprocess.Popen(sleep, env=os.environ | {"LOCAL_RANK": str(n)}) for n in range(2)]
        assert ranks[1].wait() == -9 and ranks[0].poll() is None
    """
    ended = attempt(folder, program, Kill(ANY_MOMENT, 1, "1", seconds=1.5))
    assert (ended.code, ended.killed) == (0, "1"), ended.last_line
    assert ended.problems == ["processes were still running 0.5 s after the command exited"]
    assert sorted(processes_of(ended.folder).values()) == ["0", "1", MAIN]
    deadline = time.monotonic() + 10
    while alive(ended.folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_attempt_that_hangs_and_a_store_that_is_wrong_are_reported_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "TIMEOUT", 1.0)
    monkeypatch.setattr(attempts, "_CHECK", 0.1)
    ended = attempt(folder, "import time; time.sleep(60)", check=lambda: "half an artifact")
    assert ended.problems == ["half an artifact", "was still running after 1 s"]


def test_a_trial_that_is_stopped_leaves_no_process(folder: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Stopped):
        attempt(folder, "import time; time.sleep(60)", stop=stop)
    assert not alive(folder / "runs" / "1" / "attempt-1")


# --- the plan -------------------------------------------------------------------------------------

PROFILES = {name: Profile(dict.fromkeys(PHASE, 16), 9.0) for name in KINDS}


@pytest.mark.parametrize("seed", range(3))
def test_every_fault_point_occurs_in_a_hundred_kills(seed: int) -> None:
    plan, again = Plan(PROFILES, seed), Plan(PROFILES, seed)
    drawn: Counter[str] = Counter()
    for kind in [*KINDS.values()] * 4:
        kills = plan.kills(kind)
        assert kills == again.kills(kind) and 1 <= len(kills) <= MOST_KILLS
        order = [PHASE[kill.place] for kill in kills if kill.place in PHASE]
        assert order == sorted(order), "in the order in which a run reaches them"
        assert kills[0].place != READS, "there is no checkpoint yet"
        for kill in kills:
            assert kill.target in ({MAIN} if kind.processes == 1 else {MAIN, "0", "1", "all"})
            assert 0 <= kill.share < 1 and (kill.count == 1 or kill.place in TRAINING)
            assert kill.place != ANY_MOMENT or 0 <= (kill.seconds or 0.0) <= 9
        assert sum(kill.count for kill in kills if kill.place in TRAINING) <= 16
        drawn.update(kill.place for kill in kills)
    assert drawn.keys() == set(PLACES) and drawn.total() >= 90


# --- comparison -----------------------------------------------------------------------------------


@pytest.fixture
def reader(bench: Bench, tmp_path: Path) -> StoreReader:
    """Return a reader of a store that contains the expected artifact."""
    bench.stage1("films", name=NAME, store=str(tmp_path / "undisturbed"))
    expected = load(NAME, tmp_path / "undisturbed")
    shutil.copytree(tmp_path / "undisturbed" / NAME, tmp_path / "store" / NAME)
    return StoreReader(tmp_path / "store", expected, overwrites=False)


def test_a_reader_of_the_store_finds_the_old_artifact_the_new_one_or_none(reader: StoreReader) -> None:
    store, expected = reader.store, reader.expected
    assert reader.problem() is None
    half = store / NAME / "head.safetensors"
    content = half.read_bytes()
    half.write_bytes(content[:-1])
    assert "could not be read" in str(reader.problem())
    half.write_bytes(content)
    head = {name: tensor + 1 for name, tensor in expected.head.items()}
    save(store, expected.manifest, expected.weights, head, overwrite=True)
    assert reader.problem() == "the store contained an unexpected artifact"
    overwriting = StoreReader(store, expected, overwrites=True)
    assert overwriting.problem() is None, "the old one"
    shutil.rmtree(store / NAME)
    assert reader.problem() is None, "it may be missing"
    assert "could not be read" in str(overwriting.problem()), "one of the two must be there"


def test_differences(reader: StoreReader) -> None:
    store, expected = reader.store, reader.expected
    assert reader.differences() == []
    (store / ".runs" / "made-1").mkdir(parents=True)
    assert reader.differences() == [".runs/made-1 is left over"]
    (store / ".runs" / "made-1").rmdir()
    result = expected.manifest.content["result"] | {"best_epoch": 7}
    head = {name: tensor + 1e-6 for name, tensor in expected.head.items()}
    save(store, expected.manifest.changed(result=result), expected.weights, head, overwrite=True)
    best = expected.manifest.result.best_epoch
    assert reader.differences() == ["head.safetensors differs", f"best_epoch: 7, expected {best}"]
    shutil.rmtree(store / NAME)
    assert len(reader.differences()) == 1


@pytest.mark.parametrize(
    ("codes", "stored", "problems", "outcome"),
    [
        ((-9, -9, 0), True, [], EQUAL),
        ((-9, 0), True, [], EQUAL),  # the second place was not reached
        ((-9, -9, 0), False, [], "attempt 3: no artifact 'made'"),
        ((-9, 1), True, [], "attempt 2: exit code 1: the last line"),
        ((-9,), True, ["half an artifact"], "attempt 1: half an artifact"),
    ],
)
def test_a_run_with_kills_is_judged_by_its_final_state(
    reader: StoreReader,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    codes: tuple[int, ...],
    stored: bool,
    problems: list[str],
    outcome: str,
) -> None:
    left = iter(codes)

    def pretend(python: str, own: Path, *_: Any) -> Attempt:
        code = next(left)
        own.mkdir()
        (own / "output.txt").write_text("the last line\n")
        if code == 0 and stored:
            shutil.copytree(reader.store / NAME, own.parent / "store" / NAME)
        return Attempt(code, MAIN if code < 0 else None, 1.0, "epoch 1, batch 2", problems, own)

    monkeypatch.setattr(trial, "make_attempt", pretend)
    crash = Trial(tmp_path, "python", ["adapter"], expected={"adapter": reader.expected})
    kills = [Kill("half a checkpoint", count, MAIN) for count in (1, 2)]
    found = crash.run_with_deaths(1, KINDS["adapter"], kills)
    assert found.outcome.startswith(outcome) and next(left, None) is None
    happened = [code < 0 for code in codes][:2]
    assert found.deaths == [
        Death(kill, came, "epoch 1, batch 2" if came and n + 1 < len(codes) else None)
        for n, (kill, came) in enumerate(zip(kills, happened, strict=False))
    ]
    assert (tmp_path / "runs" / "001").exists() == (outcome != EQUAL), "a faulty run is kept"


def test_wrong_settings_and_a_folder_of_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["kills=0"], ["kinds=[adaptor]"], ["kill=1"]):
        assert main(words) == 2
        assert words[0].partition("=")[0] in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert main([f"output={tmp_path}"]) == 1
    assert "output=" in capsys.readouterr().err and (tmp_path / "runs").is_dir()


def test_a_fault_point_that_is_never_reached_is_an_error(tmp_path: Path) -> None:
    crash = Trial(tmp_path, "python", ["adapter"], profiles={"adapter": PROFILES["adapter"]})
    crash._check_places()
    crash.profiles["adapter"] = dataclasses.replace(PROFILES["adapter"], visits={BATCH: 16})
    with pytest.raises(UserError, match="half the manifest"):
        crash._check_places()


# --- for real -------------------------------------------------------------------------------------


@pytest.fixture
def crash_trial(warm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def run(*words: str) -> list[dict[str, Any]]:
        code = main([*words, f"output={tmp_path / 'a trial'}", "jobs=2"])
        shown = capsys.readouterr()
        assert code == 0, shown.out + shown.err
        assert not list((tmp_path / "a trial" / "runs").glob("*")), "runs that ended well are not kept"
        found: list[dict[str, Any]] = json.loads((tmp_path / "a trial" / "results.json").read_text())
        assert {run["outcome"] for run in found} == {EQUAL}
        return [death for run in found for death in run["deaths"] if death["happened"]]

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def test_a_short_trial(crash_trial: Any, tmp_path: Path) -> None:
    deaths = crash_trial("kills=4", "kinds=[adapter]")
    visits = json.loads((tmp_path / "a trial/undisturbed/adapter/attempt-1/visits-main.json").read_text())
    of_other_kinds = {place for place in PHASE if "source" in place or "feature cache" in place or "overw" in place}
    assert (
        set(PHASE) - {place for place, count in visits.items() if count} == of_other_kinds and len(of_other_kinds) == 5
    )
    assert len(deaths) >= 4 and all(death["resumed"] for death in deaths)
    assert any(death["resumed"].startswith("epoch") for death in deaths)
    assert len({death["kill"]["place"] for death in deaths}) >= 3


@pytest.mark.slow
def test_a_trial_with_sources_and_ranks(crash_trial: Any) -> None:
    kinds = "kinds=[fusion in two processes,fusion with cached features,overwriting]"
    deaths = crash_trial("kills=12", kinds, "seed=1")
    assert len({death["kill"]["target"] for death in deaths}) >= 2
