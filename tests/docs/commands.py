"""The commands of README.md, CONTRIBUTING.md and docs/: the lines of their fenced `bash` blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class DocumentedCommand:
    """One command: its words as the shell would pass them, and where it is."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {shlex.join(self.words)}"


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block of a page."""
    for _, language, text in FENCE.findall(page.read_text("utf-8")):
        yield language, text


def commands_of(page: Path) -> Iterator[DocumentedCommand]:
    """The commands of a page, with `$NAME` replaced where an earlier line of the block has set it.

    A program that `torchrun` starts is a command by itself.
    """
    for language, text in blocks(page):
        variables: dict[str, str] = {}
        for line in text.replace("\\\n", " ").splitlines() if language in ("bash", "sh") else ():
            for name, value in variables.items():
                line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)  # type: ignore[misc]
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                    continue
                if len(words) == 1 and (assigned := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
                    variables[assigned[1]] = assigned[2]
                elif words:
                    if words[0] == "torchrun":  # starts `python -m MODULE`
                        words = ["python", *words[words.index("-m") :]]
                    yield DocumentedCommand(page, tuple(words))
                words = []


COMMANDS = [command for page in PAGES for command in commands_of(page)]
