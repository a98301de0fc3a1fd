"""The table of deaths and outcomes, and the summary by place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipelines.chaos.config import ChaosConfig
from pipelines.chaos.journey import EQUAL, Death, Outcome
from pipelines.chaos.plan import PLACES
from pipelines.chaos.work import Kind
from pipelines.commands import typed


def row(outcome: Outcome) -> list[str]:
    """Number, kind, stage, processes, deaths with where the next attempt went on, outcome, seconds."""
    kind = outcome.chain.kind
    return [
        str(outcome.chain.number),
        kind.name,
        str(kind.stage),
        str(kind.processes),
        "; ".join(_death(death, kind) for death in outcome.deaths),
        outcome.outcome,
        f"{outcome.seconds:.0f}",
    ]


def _death(death: Death, kind: Kind) -> str:
    said = death.kill.said(kind.processes)
    return f"{said} → {death.resumed}" if death.came else f"({said}: never came)"


HEADER = ["", "run", "stage", "processes", "killed → went on at", "outcome", "s"]


def summary(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """By place: deaths, how many of them another attempt followed, and how many were in runs that ended equal."""
    rows = []
    for place in PLACES:
        deaths = [(o, d) for o in outcomes for d in o.deaths if d.came and d.kill.place == place]
        if deaths:
            resumed = sum(d.resumed is not None for _, d in deaths)
            equal = sum(o.outcome == EQUAL for o, _ in deaths)
            rows.append([place, str(len(deaths)), str(resumed), str(equal)])
    came = [d for o in outcomes for d in o.deaths if d.came]
    equal = sum(o.outcome == EQUAL for o in outcomes for d in o.deaths if d.came)
    rows.append(["all", str(len(came)), str(sum(d.resumed is not None for d in came)), str(equal)])
    return rows


SUMMARY_HEADER = ["killed at", "kills", "resumed", "equal in the end"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def verdict(outcomes: Sequence[Outcome]) -> str:
    equal = sum(outcome.outcome == EQUAL for outcome in outcomes)
    kills = sum(death.came for outcome in outcomes for death in outcome.deaths)
    return f"{kills} kills in {len(outcomes)} runs; {equal} of the runs ended with the weights of an undisturbed one"


def _commands(config: ChaosConfig, outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Each kind once, with its command, as seen from a folder in OUTPUT/runs."""
    found = {}
    for outcome in outcomes:
        module, *overrides = outcome.chain.kind.command(config.backbone)
        found[outcome.chain.kind.name] = f"`{typed(module, overrides)}`"
    return [[name, command] for name, command in found.items()]


def write(folder: Path, config: ChaosConfig, outcomes: Sequence[Outcome]) -> list[Path]:
    """Keeps table.md and results.json; gives their places."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.chain.number)
    text = [
        verdict(outcomes),
        markdown(SUMMARY_HEADER, summary(outcomes)),
        markdown(HEADER, [row(outcome) for outcome in ordered]),
        "What each was:",
        markdown(["run", "command"], _commands(config, ordered)),
    ]
    table, results = folder / "table.md", folder / "results.json"
    table.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    said = {
        "config": asdict(config),
        "runs": [
            {
                "number": outcome.chain.number,
                "kind": outcome.chain.kind.name,
                "stage": outcome.chain.kind.stage,
                "processes": outcome.chain.kind.processes,
                "command": outcome.chain.kind.command(config.backbone),
                "deaths": [asdict(death) for death in outcome.deaths],
                "outcome": outcome.outcome,
                "seconds": outcome.seconds,
            }
            for outcome in ordered
        ],
    }
    results.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [table, results]
