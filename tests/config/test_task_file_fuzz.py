"""Damaged and hostile task files, through the command that reads them: read, or refused in one or two lines."""

from __future__ import annotations

import logging
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf._utils import get_yaml_loader

from fusion.cli.app import command
from fusion.config.stages import Stage1Config
from fusion.config.task import TaskConfig, read_task_file
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
SECONDS, MEGABYTES = 8.0, 200  # of computing and memory
Answer = tuple[str, TaskConfig | None]
Ask = Callable[..., Answer]
LOADER = get_yaml_loader()


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Ask]:
    """Writes conf/task/mine.yaml and runs a command up to its check; returns its message and the task."""
    place = tmp_path / "conf" / "task" / "mine.yaml"
    place.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("SECRET_OF_THE_ENVIRONMENT", "hunter2")
    root, seen = logging.getLogger(), list[TaskConfig]()
    handlers, level, handler = root.handlers[:], root.level, signal.getsignal(signal.SIGTERM)

    def check(config: Any, run: Run) -> None:
        seen.append(config.task or config.tasks[0])
        raise UserError("accepted")  # nothing is trained here

    @command("stage1", Stage1Config, check)
    def main(config: Any, run: Run) -> dict[str, Any]:
        raise AssertionError("the check raises")

    def run(content: bytes, *arguments: str) -> Answer:
        place.write_bytes(content)
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["stage1", *(arguments or ("+task=mine",))])
        capsys.readouterr()
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(SystemExit) as ended:
            main()
        assert time.process_time() - started < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES
        message = capsys.readouterr().err.strip()
        assert "hunter2" not in message and "Traceback" not in message
        assert not (tmp_path / "owned").exists(), "content of the file was executed"
        assert ended.value.code == 2 and len(message.splitlines()) <= 2 and len(message) < 2000, message
        return message, seen[0] if seen else None

    yield run
    root.handlers[:], root.level = handlers, level
    signal.signal(signal.SIGTERM, handler)


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(12)
)
NOT_PLAIN: list[tuple[bytes, str]] = [  # refused by `read_task_file`
    (b"", "no keys"),
    (b"# nothing\n", "no keys"),
    (b"- kind\n", "no keys"),
    (b"classification\n", "no keys"),
    (b"\xff\xfe" + GOOD, "line 1: not UTF-8"),
    (GOOD + "é".encode("latin-1"), "line 10: not UTF-8"),
    (GOOD.decode().encode("utf-16"), "line 1: not UTF-8"),
    (GOOD + b"\tx: 1\n", "line 10: not plain YAML"),
    (GOOD + b"x: [1\n", "not plain YAML"),
    (GOOD + b"x: \x00\n", "not plain YAML"),
    (GOOD + b"label: other\n", "line 10: not plain YAML: found duplicate key label"),
    (GOOD + b"columns2: {a: b, a: c}\n", "line 10: not plain YAML: found duplicate key a"),
    (GOOD + b"---\nkind: x\n", "another document"),
    (BOMB, "line 2: not plain YAML: found the alias *a"),
    (GOOD + b"more: *x\n", "line 10: not plain YAML: found the alias *x"),
    (GOOD + b"x: !!python/object/apply:os.system ['touch owned']\n", "line 10: not plain YAML: found the tag"),
    (GOOD + b"x: !local 1\n", "line 10: not plain YAML: found the tag '!local'"),
    (GOOD.replace(b"label: label", b"label: ${oc.env:SECRET_OF_THE_ENVIRONMENT}"), "line 3: not plain YAML: found an interpolation"),
    (GOOD.replace(b"premise: sentence1", b"${unique:}: x"), "line 9: "),
    (GOOD.replace(b"label: label", b"label: ???"), "missing value ???"),
    (b"defaults: [mnli]\n" + GOOD, "found the key 'defaults'"),
    (b"x: " + b"9" * 5000, "not plain YAML: Exceeds the limit"),
    (b"{x: " * 2_000 + b"1" + b"}" * 2_000, "not plain YAML: maximum recursion"),
    (GOOD + b"? [a, b]\n: x\n", "not plain YAML"),
]  # fmt: skip
WRONG: list[tuple[bytes, str]] = [  # plain data, but not a task
    (GOOD + b"1: x\n", "unknown key 1"),
    (GOOD + b"metric: [accuracy]\n", "unknown key metric"),
    (GOOD.replace(b"kind: classification", b"kind: [a]"), "task.kind: expected a string"),
    (GOOD.replace(b"[accuracy, macro_f1]", b"accuracy"), "task.metrics: expected a list"),
    (GOOD.replace(b"[0, 1, 2]", b"3"), "task.label_values: expected a list"),
    (GOOD.replace(b"[0, 1, 2]", b"[0, 0, 2]"), "without duplicates"),
    (GOOD.replace(b"[0, 1, 2]", b"[[0, a], [1, a], 2]"), "label_values="),
    (GOOD.replace(b"[0, 1, 2]", b"[[], 1, 2]"), "label_values="),
    (GOOD.replace(b"[0, 1, 2]", b"[{a: b}, 1, 2]"), "label_values="),
    (GOOD.replace(b"[0, 1, 2]", b"[0, 1]"), "label_values has 2 entries for 3 labels"),
    (GOOD.replace(b"{premise: sentence1}", b"[1]"), "Cannot merge DictConfig with ListConfig"),
    (GOOD.replace(b"sentence1", b"{a: b}"), "columns={premise:{a:b}}"),
    (GOOD.replace(b"path: nyu-mll/glue, ", b""), "task.hub.path is required"),
    (GOOD.replace(b"train: train", b"train: 5"), "hub.splits.train=5"),
    (GOOD.replace(b"train: train", b"train: []"), "hub.splits.train=[]"),
    (GOOD.replace(b'"yes"', b"yes"), "yes, no, true, false and null"),
    (GOOD.replace(b'"yes"', b"[a]"), "labels="),
    (GOOD.replace(b"label: label", b"label: ''"), "expected the name of a column"),
    (GOOD.replace(b"[premise, hypothesis]", b"[a, b, c]"), "text=[a,b,c]"),
    (b"kind: choice\ntext: t\nchoices: 5\nmetrics: [accuracy]\n", "choices=5"),
    (b"kind: choice\ntext: t\nchoices: []\nmetrics: [accuracy]\n", "choices=[]"),
    (b"kind: choice\ntext: t\nchoices: c\nblank: ''\nmetrics: [accuracy]\n", "blank is empty"),
]  # fmt: skip
ACCEPTED = [
    GOOD,
    b"\xef\xbb\xbf" + GOOD,
    GOOD.replace(b"\n", b"\r\n"),
    b"---\n" + GOOD + b"...\n",
    GOOD + b"choices: null\n",
]


@pytest.mark.parametrize(("content", "expected"), NOT_PLAIN, ids=range(len(NOT_PLAIN)))
def test_a_task_file_that_is_not_plain_data(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        read_task_file(path, LOADER)
    assert expected in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2 and time.process_time() - started < SECONDS


@pytest.mark.parametrize("content", [BOMB, GOOD + b"x: ${seed}\n", *(content for content, _ in NOT_PLAIN[-3:])])
def test_a_command_refuses_the_file(ask: Ask, content: bytes) -> None:
    assert "mine.yaml" in ask(content)[0]


@pytest.mark.parametrize(("content", "expected"), WRONG, ids=range(len(WRONG)))
def test_a_file_that_is_not_a_task(ask: Ask, content: bytes, expected: str) -> None:
    message = ask(content)[0]
    assert expected in message and "mine" in message, message


@pytest.mark.parametrize("content", ACCEPTED, ids=range(len(ACCEPTED)))
def test_a_file_that_is_accepted(ask: Ask, content: bytes) -> None:
    message, task = ask(content)
    assert message == "accepted" and task is not None
    assert task.text == ["premise", "hypothesis"] and task.labels == ["entailment", "neutral", "yes"]
    assert task.hub is not None and task.hub.splits["validation"] == ["near", "far"]


def test_every_way_to_select_the_file_checks_it(ask: Ask, tmp_path: Path) -> None:
    for arguments in (
        ("-m", "+task=mine,mnli"),
        ("tasks=[mnli,mine]", "method=multitask_adapter"),
        ("--config-dir", str(tmp_path / "conf"), "+task=mine"),
        ("+task=mine", f"hydra.searchpath=[file://{tmp_path}/conf]"),
    ):
        assert "the key 'defaults'" in ask(b"defaults: [mnli]\n" + GOOD, *arguments)[0], arguments


def test_a_task_typed_on_the_command_line(ask: Ask) -> None:
    for arguments in (("+task={kind: regression}",), ("+task={text:a}", "tasks=[mnli,mine]")):
        assert "+task=NAME" in ask(GOOD, *arguments)[0], arguments


def test_a_large_file(ask: Ask) -> None:
    columns = b", ".join(b"c%d: %sd%d" % (n, b"x" * 100, n) for n in range(600))
    message, task = ask(GOOD.replace(b"premise: sentence1", columns))
    assert message == "accepted" and task is not None
    assert len(task.columns) == 600 and task.columns["c17"] == "x" * 100 + "d17"
    assert task.label_values == [0, 1, 2] and task.labels == ["entailment", "neutral", "yes"]


def test_values_are_those_of_omegaconf(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text("x: [1_000, 0x1f, 1e3, 1.5, .inf, no, 'no', 2020-01-01, ~, '', 010, +3, 1:30]\n")
    assert read_task_file(path, LOADER) == yaml.load(path.read_text(), LOADER)


def run_mutations(ask: Ask, seeds: range) -> None:
    for seed in seeds:
        content = mutate(GOOD, random.Random(seed))
        try:
            message, task = ask(content)
            assert message == "accepted" or "mine" in message, message
            assert message != "accepted" or (task is not None and 1 <= len(task.text_columns) <= 2)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {content!r}") from error


def test_mutated_files(ask: Ask) -> None:
    run_mutations(ask, range(12))


@pytest.mark.slow
def test_many_more_mutated_files(ask: Ask) -> None:
    run_mutations(ask, range(12, 1012))


@pytest.mark.parametrize(
    ("count", "low", "high"), [(200, 84, 190), pytest.param(600, 250, 570, marks=pytest.mark.slow)]
)
def test_mutated_files_before_they_are_composed(tmp_path: Path, count: int, low: int, high: int) -> None:
    path, refused = tmp_path / "mine.yaml", 0
    for seed in range(count):
        draw = random.Random(seed)
        noise = bytes(draw.randrange(256) for _ in range(draw.randrange(80)))
        path.write_bytes(mutate(GOOD, draw) if seed % 3 else noise)
        try:
            read_task_file(path, LOADER)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error).splitlines()) <= 2, path.read_bytes()
    assert low < refused < high
