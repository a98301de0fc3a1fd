"""Chaos: that victims die exactly where they should, that what went wrong is seen, and a short journey for real."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fusion.errors import UserError
from fusion.store.artifacts import load, save
from pipelines.chaos import attempts
from pipelines.chaos.__main__ import main
from pipelines.chaos.attempts import Attempt, Stopped, course_of, make_attempt, went_on
from pipelines.chaos.config import ChaosConfig
from pipelines.chaos.fate import MAIN, PLAN, READS, STRUCK, members, strike
from pipelines.chaos.journey import EQUAL, Death, Journey, Outcome
from pipelines.chaos.plan import ANY_MOMENT, MOST_KILLS, PLACES, TRAINING, Chain, Course, Kill, Plan, phase_of
from pipelines.chaos.table import markdown, row, summary, verdict
from pipelines.chaos.victims import Fresh, environment, living
from pipelines.chaos.work import KINDS, NAME, PREPARATIONS, TASKS, write_work
from tests.bench import Bench

# A run as far as chaos can see it: a cache, checkpoints, an artifact, an overwrite.
STAND_IN = """
    import os, shutil, sys
    from pathlib import Path

    def write(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    tokens = Path("cache/tokens.safetensors.1.partial")
    tokens.parent.mkdir()
    tokens.write_bytes(b"x" * 100)
    os.replace(tokens, "cache/tokens.safetensors")
    states = Path("cache/.a.states.1.partial")
    write(states, b"x" * 100)
    os.replace(states, "cache/a.states")
    run = Path("store/.runs/made-1")
    for _ in range(3):
        write(run / ".last.ckpt.part", b"x" * 100)
        if (run / "last.ckpt").exists():
            os.replace(run / "last.ckpt", run / "before.ckpt")
        os.replace(run / ".last.ckpt.part", run / "last.ckpt")
        (run / "position.part").touch()
        os.replace(run / "position.part", run / "position.json")
    (run / "last.ckpt").read_bytes()
    staged, old = Path("store/.staging/made~new"), Path("store/.staging/made.old")
    for _ in range(2):
        for name in ("weights.safetensors", "head.safetensors", "manifest.json"):
            write(staged / name, b"x" * 100)
        if Path("store/made").exists():
            os.replace("store/made", old)
        os.replace(staged, "store/made")
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(run)
"""
WITHOUT_STEPS = [
    place
    for place in PLACES
    if place not in (*TRAINING[:5], "a source is copied and not in place", ANY_MOMENT)
]
CHECKPOINTS = {".last.ckpt.part", "last.ckpt", "before.ckpt", "position.json", "position.part"}
# What is in the folder of checkpoints after a death at the second visit.
LEFT: dict[str, set[str]] = {
    "half a checkpoint": {".last.ckpt.part", "last.ckpt", "position.json"},
    "a checkpoint is written and not synced": {".last.ckpt.part", "last.ckpt", "position.json"},
    "before a checkpoint's renames": {".last.ckpt.part", "last.ckpt", "before.ckpt", "position.json"},
    "between a checkpoint's renames": {".last.ckpt.part", "before.ckpt", "position.json"},
    "a checkpoint is in place, its position not": {"last.ckpt", "before.ckpt", "position.json"},
    "after a checkpoint": {"last.ckpt", "before.ckpt", "position.json"},
}


def die(folder: Path, place: str, count: int = 1, **more: Any) -> subprocess.CompletedProcess[str]:
    """Runs the stand-in in the folder under a fate."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "said").mkdir()
    (folder / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    kill = {"place": place, "count": count, "at": "any", "whom": MAIN, "share": 0.3} | more
    plan = {PLAN: json.dumps({"folder": str(folder / "said"), "kill": kill})}
    return subprocess.run(
        [sys.executable, "stand_in.py"],
        cwd=folder,
        env=environment(plan),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("place", WITHOUT_STEPS)
def test_a_victim_dies_at_its_place(tmp_path: Path, place: str) -> None:
    done = die(tmp_path / "a folder", place)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "a folder" / "said" / STRUCK).read_text() == MAIN


@pytest.mark.parametrize("place", LEFT)
def test_what_a_death_leaves_of_a_checkpoint(tmp_path: Path, place: str) -> None:
    second = 1 if "renames" in place and place.startswith("between") else 2
    die(tmp_path, place, second)
    run = tmp_path / "store" / ".runs" / "made-1"
    found = {path.name for path in run.iterdir()}
    expected = set(LEFT[place])
    assert found == expected
    for name in found & {".last.ckpt.part"}:
        assert (run / name).stat().st_size == (30 if place.startswith("half") else 100)


@pytest.mark.parametrize(
    ("place", "path", "size"),
    [
        ("half a file of the token cache", "cache/tokens.safetensors.1.partial", 30),
        ("half a file of the prefix cache", "cache/.a.states.1.partial", 30),
        ("half the weights", "store/.staging/made~new/weights.safetensors", 30),
        ("before the manifest is written", "store/.staging/made~new/head.safetensors", 100),
        ("half the manifest", "store/.staging/made~new/manifest.json", 30),
        ("staged and not in place", "store/.staging/made~new/manifest.json", 100),
        ("between an overwrite's renames", "store/.staging/made.old/manifest.json", 100),
        ("stored, the checkpoints are still there", "store/.runs/made-1/last.ckpt", 100),
    ],
)
def test_what_a_death_leaves_of_a_file(tmp_path: Path, place: str, path: str, size: int) -> None:
    die(tmp_path, place)
    assert (tmp_path / path).stat().st_size == size


def test_half_of_the_checkpoints_are_removed(tmp_path: Path) -> None:
    die(tmp_path, "the checkpoints are half removed", share=0.7)
    assert {path.name for path in (tmp_path / "store" / ".runs" / "made-1").iterdir()} == {"position.json"}


def test_who_is_not_there_does_not_die(tmp_path: Path) -> None:
    done = die(tmp_path, "half a checkpoint", at="1")
    assert done.returncode == 0 and not (tmp_path / "said" / STRUCK).exists()
    said = json.loads((tmp_path / "said" / "counts-main.json").read_text())
    assert said["half a checkpoint"] == 3 and said["between a checkpoint's renames"] == 2
    assert said["between an overwrite's renames"] == 1 and said["half the weights"] == 2


def test_a_file_is_whole_where_somebody_else_dies(tmp_path: Path) -> None:
    done = die(tmp_path, "half the weights", whom="1")
    assert done.returncode == 0 and (tmp_path / "said" / STRUCK).read_text() == "1"
    assert (tmp_path / "store" / "made" / "weights.safetensors").stat().st_size == 100


def test_only_the_chosen_die(tmp_path: Path) -> None:
    sleepers = {}
    for role in (MAIN, "0", "1"):
        sleepers[role] = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / str(sleepers[role].pid)).write_text(role)
    try:
        strike(tmp_path, "1")
        assert sleepers["1"].wait(10) == -9
        assert set(living(tmp_path).values()) == {MAIN, "0"} and len(members(tmp_path)) == 3
        strike(tmp_path, "all")
        assert sleepers[MAIN].wait(10) == sleepers["0"].wait(10) == -9
        assert living(tmp_path) == {}
    finally:
        for sleeper in sleepers.values():
            sleeper.kill()
            sleeper.wait()


# --- attempts -------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder; modules that are put there can be started."""
    folder = tmp_path / "out put" / "runs" / "001"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def attempt(place: Path, program: str, kill: Kill | None = None, **more: Any) -> Attempt:
    (place / "probe.py").write_text(textwrap.dedent(program))
    given: dict[str, Any] = {"look": lambda: None, "stop": threading.Event()} | more
    return make_attempt(Fresh(), place, 1, ["probe"], kill, **given)


def test_an_attempt_ends_by_itself_and_counts(place: Path) -> None:
    ended = attempt(place, STAND_IN + "\n    sys.exit(3)")
    assert (ended.code, ended.struck, ended.problems) == (3, None, [])
    course = course_of(place, 1, ended.seconds)
    assert course.visits[MAIN]["half a checkpoint"] == 3 and course.roles("half a checkpoint") == [MAIN]
    assert course.roles("a validation batch") == []


def test_an_attempt_is_killed_at_its_place_and_at_any_moment(place: Path) -> None:
    ended = attempt(place, STAND_IN, Kill("half the head", 2, "any", MAIN))
    assert (ended.code, ended.struck, ended.problems) == (-9, MAIN, [])
    sleeps = "import time; time.sleep(60)"
    ended = attempt(place, sleeps, Kill(ANY_MOMENT, 1, "any", "1", seconds=0.2))
    assert (ended.code, ended.struck) == (-9, MAIN), "there is no such rank yet"
    assert 0.2 <= ended.seconds < 30


def test_who_outlives_his_command_is_named_and_killed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "SURVIVAL", 0.5)
    program = """
        import os, subprocess, sys, time
        environment = os.environ | {"LOCAL_RANK": "0"}
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)
        time.sleep(2)
    """
    ended = attempt(place, program)
    assert ended.code == 0 and ended.problems == ["processes outlived the command by 0.5 s"]
    deadline = time.monotonic() + 10
    while living(place / "processes-1"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert sorted(members(place / "processes-1").values()) == ["0", MAIN]


def test_what_hangs_is_ended_and_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "ENDLESS", 1.0)
    ended = attempt(place, "import time; time.sleep(60)")
    assert ended.code is None and ended.problems == ["hung for 1 s"] and ended.seconds < 30


def test_what_is_wrong_in_the_store_meanwhile_is_said_once(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_LOOK", 0.1)
    seen = itertools.chain([None, "half an artifact"], itertools.repeat(None))
    ended = attempt(place, "import time; time.sleep(1)", look=lambda: next(seen))
    assert ended.problems == ["half an artifact"]


def test_a_journey_that_is_stopped_leaves_no_victim(place: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Stopped):
        attempt(place, "import time; time.sleep(60)", stop=stop)
    assert not living(place / "processes-1")


@pytest.mark.parametrize(
    ("said", "trained", "expected"),
    [
        ("going on at epoch 2, batch 7\n", True, "epoch 2, batch 7"),
        ("going on at epoch 3, batch 1\n", False, "epoch 3, batch 1"),
        ("made is done already: store/made\n", False, "done already"),
        ("films train: 64 rows\n", True, "the beginning"),
        ("films train: 64 rows\n", False, "killed before it began"),
        (None, False, "killed before it began"),
    ],
)
def test_where_an_attempt_went_on(tmp_path: Path, said: str | None, trained: bool, expected: str) -> None:
    if said is not None:
        (tmp_path / "run.log").write_text(said)
    assert went_on(tmp_path / "run.log", trained) == expected


# --- the plan -------------------------------------------------------------------------------------

_VISITS = {place: 16 for place in PLACES if place not in (READS, ANY_MOMENT)}
COURSES = {
    name: Course(
        {MAIN: _VISITS} if kind.processes == 1 else {"0": _VISITS, "1": {"a training batch": 16}}, 9.0
    )
    for name, kind in KINDS.items()
}


def chains(seed: int, count: int) -> list[Chain]:
    return list(itertools.islice(Plan(KINDS, COURSES, seed).chains(), count))


def test_a_seed_is_a_plan() -> None:
    assert chains(3, 20) == chains(3, 20) != chains(4, 20)


def test_every_place_comes_up_in_a_hundred_kills() -> None:
    for seed in range(5):
        kills = [kill for chain in chains(seed, 48) for kill in chain.kills]
        assert len(kills) >= 90
        drawn = Counter(kill.place for kill in kills[:100])
        assert drawn.keys() == set(PLACES)


def test_kills_can_happen() -> None:
    for chain in chains(1, 200):
        assert 1 <= len(chain.kills) <= MOST_KILLS
        roles = {MAIN} if chain.kind.processes == 1 else {MAIN, "0", "1", "all"}
        passed = 0.0
        places = [kill.place for kill in chain.kills if kill.place not in (ANY_MOMENT, READS)]
        assert len(set(places)) == len(places)
        phases = [phase_of(place) for place in places]
        assert phases == sorted(phases), "in the order in which a run comes by"
        for number, kill in enumerate(chain.kills):
            assert kill.whom in roles and 0 <= kill.share < 1
            if kill.place == ANY_MOMENT:
                assert kill.seconds is not None and 0 <= kill.seconds <= 9
            elif kill.place in TRAINING:
                assert kill.at in COURSES[chain.kind.name].roles(kill.place)
                assert 1 <= kill.count <= 16
                passed += kill.count
            else:
                assert kill.count == 1 and kill.at == "any"
            if kill.place == READS:
                assert number > 0, "nothing is there to be read"
        assert passed <= 16 + MOST_KILLS, "later ones have only the rest before them"


# --- what is said ---------------------------------------------------------------------------------


def outcomes() -> list[Outcome]:
    one = Kill("half a checkpoint", 3, MAIN, MAIN)
    two = Kill(ANY_MOMENT, 1, "any", "all", seconds=2.5)
    never = Kill("half the head", 1, "any", "1")
    return [
        Outcome(Chain(1, KINDS["adapter"], (one,)), EQUAL, [Death(one, True, "epoch 1, batch 2")], 4.4),
        Outcome(
            Chain(2, KINDS["fusion in two processes"], (two, never)),
            "DIFFERENT: weights.safetensors",
            [Death(two, True, "the beginning"), Death(never, False)],
            9.0,
        ),
    ]


def test_table_and_summary() -> None:
    first, second = outcomes()
    assert row(first) == ["1", "adapter", "1", "1", "half a checkpoint (3) → epoch 1, batch 2", EQUAL, "4"]
    assert row(second)[4:6] == [
        "any moment (2.5 s), all → the beginning; (half the head, rank 1: never came)",
        "DIFFERENT: weights.safetensors",
    ]
    assert summary([first, second]) == [
        ["half a checkpoint", "1", "1", "1"],
        [ANY_MOMENT, "1", "1", "0"],
        ["all", "2", "2", "1"],
    ]
    assert verdict([first, second]).startswith("2 kills in 2 runs; 1 of the runs ended")
    assert markdown(["a", "b"], [["1", "x|y"]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | x\\|y |",
    ]


def test_wrong_settings_end_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kills=0"]) == 2
    assert "kills=0: expected at least 1" in capsys.readouterr().err
    assert main(["kinds=[adaptor]"]) == 2
    assert "kinds: adaptor is none; expected some of adapter" in capsys.readouterr().err


def test_the_work_is_the_same_every_time(tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        write_work(folder)
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one == two and {f"data/{name}/train.jsonl" for name in TASKS} <= one.keys()
    assert yaml.safe_load(one["conf/task/films.yaml"])["labels"] == ["bad", "good"]
    for kind in KINDS.values():
        assert {*kind.needs, *kind.beside} <= PREPARATIONS.keys()
        assert kind.overwrites == ("older" in kind.needs)


# --- what must be seen ----------------------------------------------------------------------------


@pytest.fixture
def judge(bench: Bench, tmp_path: Path) -> tuple[Journey, Path]:
    """A journey that expects what a run made, and the folder of another run that made the same."""
    bench.stage1("films", name=NAME, store=str(tmp_path / "undisturbed"))
    journey = Journey(ChaosConfig(output=str(tmp_path)), Fresh())
    expected = load(NAME, tmp_path / "undisturbed")
    journey.expected = {"adapter": expected, "overwriting": expected}
    folder = tmp_path / "runs" / "001"
    save(folder / "store", expected.manifest, expected.weights, expected.head)
    return journey, folder


def test_equal_different_and_left_over(judge: tuple[Journey, Path]) -> None:
    journey, folder = judge
    expected, kind = journey.expected["adapter"], KINDS["adapter"]
    assert journey._compare(kind, folder) == EQUAL
    (folder / "store" / ".runs" / "made-1").mkdir(parents=True)
    assert journey._compare(kind, folder) == "failed: left over: store/.runs/made-1"
    result = expected.manifest.content["result"] | {"best_epoch": 7}
    manifest = expected.manifest.changed(result=result)
    head = {name: tensor + torch.finfo(tensor.dtype).eps for name, tensor in expected.head.items()}
    save(folder / "store", manifest, expected.weights, head, overwrite=True)
    best = expected.manifest.result.best_epoch
    assert journey._compare(kind, folder) == f"DIFFERENT: head.safetensors; best_epoch 7, not {best}"
    (folder / "store" / NAME / "weights.safetensors").unlink()
    assert journey._compare(kind, folder).startswith("failed: ")


def test_who_looks_into_the_store_sees_the_old_one_the_new_one_or_none(judge: tuple[Journey, Path]) -> None:
    journey, folder = judge
    expected = journey.expected["adapter"]
    look = journey._looker(KINDS["adapter"], folder)
    assert look() is None
    half = folder / "store" / NAME / "head.safetensors"
    content = half.read_bytes()
    half.write_bytes(content[:-1])
    assert "the store was read and said" in str(look())
    half.write_bytes(content)
    os.rename(folder / "store" / NAME, folder / "store" / "away")
    assert look() is None, "it may not be there yet"
    os.rename(folder / "store" / "away", folder / "store" / NAME)
    other = {name: tensor + 1 for name, tensor in expected.weights.items()}
    save(folder / "store", expected.manifest, other, expected.head, overwrite=True)
    assert look() == "another artifact than the old and the new one was read"
    over = journey._looker(KINDS["overwriting"], folder)
    assert over() is None, "the old one"
    save(folder / "store", expected.manifest, expected.weights, expected.head, overwrite=True)
    assert over() is None, "the new one"
    os.rename(folder / "store" / NAME, folder / "store" / "away")
    assert "the store was read and said: no artifact 'made'" in str(over()), "one of the two must be there"


class Pretended:
    """Victims that end at once: killed where the plan says so and it is their turn, else with an artifact or a code."""

    def __init__(self, made: Path | None, code: int, struck: tuple[bool, ...]) -> None:
        self.made, self.code, self.struck = made, code, struck
        self.started = 0

    def start(self, words: list[str], folder: Path, more: Mapping[str, str], output: Path) -> Ended:
        plan = json.loads(more[PLAN])
        self.started += 1
        (folder / f"attempt-{self.started}").mkdir()
        (folder / f"attempt-{self.started}" / "run.log").write_text(
            f"going on at epoch {self.started}, batch 1"
        )
        output.write_text("the last word\n")
        if plan["kill"] is not None and self.struck[self.started - 1]:
            (Path(plan["folder"]) / STRUCK).write_text(MAIN)
            return Ended(-9)
        if self.made is not None:
            shutil.copytree(self.made, folder / "store" / NAME)
        return Ended(self.code)

    def close(self) -> None:
        pass


@dataclasses.dataclass
class Ended:
    code: int

    def poll(self) -> int:
        return self.code


@pytest.mark.parametrize(
    ("made", "code", "struck", "expected"),
    [
        ("same", 0, (True, True), EQUAL),
        ("same", 0, (True, False), EQUAL),
        ("other", 0, (True, True), "DIFFERENT: head.safetensors"),
        (None, 0, (True, True), "failed: no artifact 'made'"),
        (None, 1, (True, True), "failed: attempt 3 ended with 1: the last word"),
        (None, 2, (False, True), "failed: attempt 1 ended with 2: the last word"),
    ],
)
def test_a_run_with_deaths_is_judged_by_its_end(
    judge: tuple[Journey, Path], made: str | None, code: int, struck: tuple[bool, bool], expected: str
) -> None:
    journey, folder = judge
    (folder / "store").rename(folder.parent / "same")
    whole = journey.expected["adapter"]
    head = {name: tensor + 1 for name, tensor in whole.head.items()}
    save(folder.parent / "other", whole.manifest, whole.weights, head)
    folder.rmdir()
    starter = Pretended(None if made is None else folder.parent / made / NAME, code, struck)
    journey.starter = starter
    kill = Kill("half a checkpoint", 1, "any", MAIN)
    outcome = journey._chain(Chain(1, KINDS["adapter"], (kill, dataclasses.replace(kill, count=2))))
    assert outcome.outcome.startswith(expected)
    came = list(itertools.takewhile(bool, struck))
    assert starter.started == len(came) + 1
    assert [death.came for death in outcome.deaths] == [*came, False][:2]
    resumed = [f"epoch {number}, batch 1" for number in range(2, len(came) + 2)]
    assert [death.resumed for death in outcome.deaths if death.came] == resumed
    assert folder.exists() == (expected != EQUAL), "what went wrong is kept"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="something else is there"):
        next(Journey(ChaosConfig(output=str(tmp_path)), Fresh()).run())
    assert (tmp_path / "runs").is_dir()
    (tmp_path / ".chaos").touch()
    (tmp_path / "table.md").touch()
    Journey(ChaosConfig(output=str(tmp_path)), Fresh())._clear()
    assert {path.name for path in tmp_path.iterdir()} == {".chaos", "table.md"}


def test_a_place_that_never_comes_is_named() -> None:
    journey = Journey(ChaosConfig(), Fresh())
    journey.courses = {"adapter": Course({MAIN: _VISITS}, 1.0)}
    journey._check_places()
    fewer = {place: count for place, count in _VISITS.items() if place != "half the manifest"}
    journey.courses = {"adapter": Course({MAIN: fewer}, 1.0)}
    with pytest.raises(UserError, match="no undisturbed run came by: half the manifest"):
        journey._check_places()


# --- for real -------------------------------------------------------------------------------------


@pytest.fixture
def with_handlers() -> Iterator[None]:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def journey_of(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    output = tmp_path / "a chaos"
    code = main([*words, f"output={output}", "fork=true", "jobs=2"])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    assert (output / "table.md").read_text().count("| equal |") == said.out.count("| equal |") > 0
    assert not list((output / "runs").glob("*")), "what ended well is not kept"
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


@pytest.mark.usefixtures("warm")
def test_a_short_journey(tmp_path: Path, capsys: pytest.CaptureFixture[str], with_handlers: None) -> None:
    found = journey_of(tmp_path, capsys, "kills=6", "kinds=[adapter]")
    deaths = [death for run in found["runs"] for death in run["deaths"] if death["came"]]
    assert len(deaths) >= 6 and all(death["resumed"] for death in deaths)
    assert {run["outcome"] for run in found["runs"]} == {EQUAL}
    assert len({death["kill"]["place"] for death in deaths}) >= 4


@pytest.mark.slow
def test_a_journey_with_sources_and_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], with_handlers: None
) -> None:
    kinds = "kinds=[fusion in two processes,fusion with a kept prefix,overwriting]"
    found = journey_of(tmp_path, capsys, "kills=12", kinds, "seed=1")
    whom = {death["kill"]["whom"] for run in found["runs"] for death in run["deaths"] if death["came"]}
    assert len(whom) >= 2 and {run["outcome"] for run in found["runs"]} == {EQUAL}
