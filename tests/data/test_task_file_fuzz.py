"""Hostile and damaged task files through the program that reads them: data, or refused by file in a line or two."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusion.cli.app import command
from fusion.config.stages import Stage1Config
from fusion.config.task import TaskConfig
from fusion.data.task_files import check_task_file
from fusion.errors import UserError
from fusion.runs.run import Run
from tests.data.test_fuzz import mutate

GOOD = b"""kind: classification            # a comment
text: [premise, hypothesis]
label: label
labels: [entailment, neutral, "yes"]
label_values: [0, 1, 2]
ignore_labels: [-1]
metrics: [accuracy, macro_f1]
hub: {path: nyu-mll/glue, name: mnli, splits: {train: train, validation: [near, far]}}
columns: {premise: sentence1}
"""
SECONDS = 8.0  # of computing
Answer = tuple[int, str, TaskConfig | None]


@pytest.fixture
def ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Answer]]:
    """Writes conf/task/mine.yaml, runs the program up to its check, and gives exit code, message and the task."""
    place = tmp_path / "conf" / "task" / "mine.yaml"
    place.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("SECRET_OF_THE_ENVIRONMENT", "hunter2")
    root, seen = logging.getLogger(), list[TaskConfig]()
    handlers, level, handler = root.handlers[:], root.level, signal.getsignal(signal.SIGTERM)

    def check(config: Any, run: Run) -> None:
        seen.append(config.task or config.tasks[0])
        raise UserError("taken")  # a job is not what is asked for here

    @command("stage1", Stage1Config, check)
    def main(config: Any, run: Run) -> dict[str, Any]:
        raise AssertionError("never gets here")

    def run(content: bytes, *arguments: str) -> Answer:
        place.write_bytes(content)
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["stage1", *(arguments or ("+task=mine",))])
        capsys.readouterr()
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(SystemExit) as ended:
            main()
        assert time.process_time() - started < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200
        said = capsys.readouterr().err.strip()
        assert "hunter2" not in said and "Traceback" not in said
        assert not (tmp_path / "owned").exists(), "something of the file was executed"
        assert ended.value.code == 2 and len(said.splitlines()) <= 2 and len(said) < 2000, said
        return ended.value.code, said, seen[0] if seen else None

    yield run
    root.handlers[:], root.level = handlers, level
    signal.signal(signal.SIGTERM, handler)


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(12)
)
REFUSED: list[tuple[bytes, str]] = [
    (b"", "the file is empty"),
    (b"# nothing\n", "the file is empty"),
    (b"- kind\n", "no keys at the top"),
    (b"classification\n", "no keys at the top"),
    (b"\xff\xfe" + GOOD, "line 1: not UTF-8"),
    (GOOD + "é".encode("latin-1"), "line 10: not UTF-8"),
    (GOOD.decode().encode("utf-16"), "line 1: not UTF-8"),
    (GOOD + b"\tx: 1\n", "line 10: not YAML"),
    (GOOD + b"x: [1\n", "not YAML"),
    (GOOD + b"x: \x00\n", "not YAML"),
    (GOOD + b"label: other\n", "line 10: the key 'label' stands twice"),
    (GOOD + b"columns2: {a: b, a: c}\n", "line 10: the key 'a' stands twice"),
    (GOOD + b"---\nkind: x\n", "a second document"),
    (BOMB, "line 2: *a stands for another part"),
    (GOOD + b"more: *x\n", "line 10: *x stands for"),
    (GOOD + b"<<: {kind: regression}\n", "line 10: the key << would bring in"),
    (GOOD + b"x: !!python/object/apply:os.system ['touch owned']\n", "the tag 'tag:yaml.org,2002:python/object/apply"),
    (GOOD + b"x: !!python/object/apply:pathlib.Path [a]\n", "line 10: the tag"),
    (GOOD + b"x: !local 1\n", "line 10: the tag '!local'"),
    (GOOD.replace(b"label: label", b"label: ${oc.env:SECRET_OF_THE_ENVIRONMENT}"), "line 3: ${...} stands for"),
    (GOOD.replace(b"label: label", b"label: ${seed}"), "line 3: ${...}"),
    (GOOD.replace(b"premise: sentence1", b"${unique:}: x"), "line 9: "),
    (GOOD.replace(b"label: label", b"label: ???"), "line 3: ??? stands for"),
    (b"defaults: [mnli]\n" + GOOD, "line 1: the key defaults would bring in"),
    (b"defaults:\n- /trainer: default\n- override /hydra/launcher: joblib\n", "the key defaults"),
    (b"# @package hydra\nrun: {dir: owned}\n", "a line with # @"),
    (b"#@package _global_\nseed: 1\n", "a line with # @"),
    (GOOD.replace(b"{premise: ", b"{_target_: "), "line 9: the key _target_ would bring in"),
    (GOOD + b"_target_: os.system\n", "line 10: the key _target_"),
    (GOOD.replace(b"path:", b"_partial_: true, path:"), "line 8: the key _partial_"),
    (b"x: " + b"[" * 50 + b"]" * 50, "line 1: nested more than 10 deep"),
    (b"x: " + b"[" * 100_000, "line 1: nested more than 10 deep"),
    (b"{x: " * 100_000, "line 1: nested more than 10 deep"),
    (b"x: " + b"9" * 5000, "line 1: a number of 5000 digits"),
    (GOOD.replace(b"[0, 1, 2]", b"[0x" + b"f" * 5000 + b", 1, 2]"), ": a number of 5002 digits"),
    (GOOD.replace(b"[0, 1, 2]", b"[-0b" + b"1" * 20_000 + b", 1, 2]"), ": a number of 20003 digits"),
    (b"x: '" + b"9" * 2_000_000 + b"'", "2.0 MB; expected a task file of at most 1 MB"),
    (GOOD + b"1: x\n", "unknown key 1"),
    (GOOD + b"? [a, b]\n: x\n", "line 10: a key that is no name"),
    (GOOD + b"'': x\n", "line 10: a key that is no name"),
    (GOOD + b"metric: [accuracy]\n", "unknown key metric: did you mean task.metrics?"),
    (GOOD.replace(b"kind: classification", b"kind: [a]"), "mine.yaml: task.kind: expected text"),
    (GOOD.replace(b"[accuracy, macro_f1]", b"accuracy"), "mine.yaml: task.metrics: expected a list"),
    (GOOD.replace(b"[0, 1, 2]", b"3"), "mine.yaml: task.label_values: expected a list"),
    (GOOD.replace(b"[0, 1, 2]", b"[0, 0, 2]"), "each once"),
    (GOOD.replace(b"[0, 1, 2]", b"[[0, a], [1, a], 2]"), "each once"),
    (GOOD.replace(b"[0, 1, 2]", b"[[], 1, 2]"), "expected for each label a value, or a list of values"),
    (GOOD.replace(b"[0, 1, 2]", b"[[[0]], 1, 2]"), "expected for each label a value, or a list of values"),
    (GOOD.replace(b"[0, 1, 2]", b"[{a: b}, 1, 2]"), "expected for each label a value, or a list of values"),
    (GOOD.replace(b"[0, 1, 2]", b"[0, 1]"), "label_values has 2 entries for 3 labels"),
    (GOOD.replace(b"{premise: sentence1}", b"[1]"), "mine.yaml: Cannot merge DictConfig with ListConfig"),
    (GOOD.replace(b"sentence1", b"{a: b}"), "columns={premise:{a:b}}: expected the name of a column"),
    (GOOD.replace(b"path: nyu-mll/glue, ", b""), "task.hub.path is required in the file of mine"),
    (GOOD.replace(b"train: train", b"train: 5"), "hub.splits.train=5: expected the hub's name"),
    (GOOD.replace(b"train: train", b"train: []"), "hub.splits.train=[]: expected"),
    (GOOD.replace(b'"yes"', b"yes"), "yes, no, true, false and null"),
    (GOOD.replace(b'"yes"', b"[a]"), "expected a list of names"),
    (GOOD.replace(b"label: label", b"label: ''"), "expected the name of a column"),
    (GOOD.replace(b"[premise, hypothesis]", b"[a, b, c]"), "expected one column name or a list of two"),
    (b"kind: choice\ntext: t\nchoices: 5\nmetrics: [accuracy]\n", "choices=5: expected"),
    (b"kind: choice\ntext: t\nchoices: []\nmetrics: [accuracy]\n", "choices=[]: expected"),
    (b"kind: choice\ntext: t\nchoices: c\nblank: ''\nmetrics: [accuracy]\n", "blank is empty"),
]  # fmt: skip
TAKEN = [
    GOOD,
    b"\xef\xbb\xbf" + GOOD,
    GOOD.replace(b"\n", b"\r\n"),
    b"---\n" + GOOD + b"...\n",
    GOOD + b"choices: null\n",
]


@pytest.mark.parametrize(("content", "expected"), REFUSED, ids=range(len(REFUSED)))
def test_a_file_that_is_refused(ask: Callable[..., Answer], content: bytes, expected: str) -> None:
    said = ask(content)[1]
    assert expected in said and "mine" in said, said


@pytest.mark.parametrize("content", TAKEN, ids=range(len(TAKEN)))
def test_a_file_that_is_taken(ask: Callable[..., Answer], content: bytes) -> None:
    _, said, task = ask(content)
    assert said == "taken" and task is not None
    assert task.text == ["premise", "hypothesis"] and task.labels == ["entailment", "neutral", "yes"]
    assert task.hub is not None and task.hub.splits["validation"] == ["near", "far"]


def test_every_way_to_name_the_file_reads_it_so(ask: Callable[..., Answer], tmp_path: Path) -> None:
    bad = b"defaults: [mnli]\n" + GOOD
    for arguments in (
        ("-m", "+task=mine,mnli"),
        ("tasks=[mnli,mine]", "method=multitask_adapter"),
        ("--config-dir", str(tmp_path / "conf"), "+task=mine"),
        ("+task=mine", f"hydra.searchpath=[file://{tmp_path}/conf]"),
    ):
        assert "the key defaults would bring in" in ask(bad, *arguments)[1], arguments


def test_a_task_that_is_typed_out_is_no_file(ask: Callable[..., Answer]) -> None:
    for arguments in (
        ("+task={kind: regression}",),
        ("+task={text:a}", "tasks=[mnli,mine]"),
        ("-m", "++task={a:b}"),
    ):
        assert "a task is one file: expected +task=NAME" in ask(GOOD, *arguments)[1], arguments


LARGE = GOOD + b"columns: {" + b", ".join(b"c%d: %sd%d" % (n, b"x" * 100, n) for n in range(600)) + b"}\n"
LARGE = LARGE.replace(b"columns: {premise: sentence1}\n", b"")


def test_a_large_file_is_read_like_a_small_one(ask: Callable[..., Answer]) -> None:
    _, said, task = ask(LARGE)
    assert said == "taken" and task is not None
    assert len(task.columns) == 600 and task.columns["c17"] == "x" * 100 + "d17"
    assert task.label_values == [0, 1, 2] and task.labels == ["entailment", "neutral", "yes"]
    line = LARGE.count(b"\n")
    for broken, expected in (
        (LARGE.replace(b"x" * 100 + b"d599", b"{a: b}"), "columns="),
        (LARGE.replace(b"x" * 100 + b"d599", b"0x" + b"f" * 5000), f"line {line}: a number of 5002 digits"),
        (LARGE.replace(b"x" * 100 + b"d599", b"*a"), f"line {line}: *a stands for another part"),
        (LARGE.replace(b"c599", b"c1"), f"line {line}: the key 'c1' stands twice"),
        (LARGE.replace(b"d599}", b"d599"), "not YAML"),
        (LARGE.replace(b"[0, 1, 2]", b"3"), "label_values: expected a list"),
    ):
        assert expected in ask(broken)[1]


def test_the_time_to_check_a_file_grows_with_its_size_alone(tmp_path: Path) -> None:
    labels = b"[" + b", ".join(b"n%d" % n for n in range(40_000)) + b"]"
    (tmp_path / "mine.yaml").write_bytes(GOOD + b"more: " + labels + b"\n")
    started = time.process_time()
    assert check_task_file(tmp_path / "mine.yaml")
    assert time.process_time() - started < 3


def run_mutations(ask: Callable[..., Answer], seeds: range) -> None:
    ended = {"taken": 0, "refused": 0}
    for seed in seeds:
        content = mutate(GOOD, random.Random(seed))
        try:
            _, said, task = ask(content)
            ended["taken" if said == "taken" else "refused"] += 1
            assert said == "taken" or "mine" in said, said
            assert said != "taken" or (task is not None and 1 <= len(task.text_columns) <= 2)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {content!r}") from error
    assert sum(ended.values()) == len(seeds) and min(ended.values()) > len(seeds) // 10, ended


def test_mutated_files(ask: Callable[..., Answer]) -> None:
    run_mutations(ask, range(25))


@pytest.mark.slow
def test_many_more_mutated_files(ask: Callable[..., Answer]) -> None:
    run_mutations(ask, range(25, 1025))


def test_mutated_files_before_they_are_composed(tmp_path: Path) -> None:
    refused = 0
    for seed in range(1000):
        draw = random.Random(seed)
        content = (
            mutate(GOOD, draw) if seed % 3 else bytes(draw.randrange(256) for _ in range(draw.randrange(80)))
        )
        (tmp_path / "mine.yaml").write_bytes(content)
        try:
            check_task_file(tmp_path / "mine.yaml")
        except UserError as error:
            refused += 1
            assert str(tmp_path / "mine.yaml") in str(error) and len(str(error).splitlines()) <= 2, content
    assert 450 < refused < 950
    assert os.listdir(tmp_path) == ["mine.yaml"]
