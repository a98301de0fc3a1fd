"""The diagram of the packages on the architecture page agrees with what the packages import."""

from __future__ import annotations

import re

from tests.docs.commands import ROOT, blocks
from tests.test_imports import EVERYWHERE, MODULES, PACKAGES, package_of


def real_imports() -> set[tuple[str, str]]:
    """Pairs of packages of which the first imports the second."""
    found = {
        (package_of(module), package_of(name))
        for module, names in MODULES.items()
        for name in names & MODULES.keys() - {"fusion"}
    }
    return {(a, b) for a, b in found if a != b and not {a, b} & {*EVERYWHERE} and b != "commands"}


def diagram() -> set[tuple[str, str]]:
    (text,) = [text for language, text in blocks(ROOT / "docs" / "architecture.md") if language == "mermaid"]
    return set(re.findall(r"^ *(\w+) --> (\w+)$", text, re.MULTILINE))


def reachable(edges: set[tuple[str, str]], start: str) -> set[str]:
    found: set[str] = set()
    new = {start}
    while new:
        new = {b for a, b in edges if a in new} - found
        found |= new
    return found


def test_the_diagram_shows_the_packages_and_what_they_import() -> None:
    real, drawn = real_imports(), diagram()
    assert {package for edge in drawn for package in edge} == {"commands", *PACKAGES}
    needed = {(a, b) for a, b in real if not any(b in reachable(real, c) for x, c in real if x == a and c != b)}
    hint = "docs/architecture.md: the arrows may be\n" + "\n".join(f"    {a} --> {b}" for a, b in sorted(needed))
    assert drawn <= real, hint
    assert {(a, b) for a, b in real if b not in reachable(drawn, a)} == set(), hint


def test_the_table_of_packages_is_in_the_order_of_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.partition("| package | contents |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(PACKAGES)
