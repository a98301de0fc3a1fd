"""What `sources=all` and `sources=top:3` of stage 2 stand for: names, before anything is computed from them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

from fusion.analysis.ranking.candidates import all_adapters
from fusion.analysis.ranking.kept import Kept, rankings_of
from fusion.config.data import SplitConfig
from fusion.config.stages import Stage2Config
from fusion.errors import UserError
from fusion.store.lookup import read_manifest
from fusion.text import override, shell_line

log = logging.getLogger(__name__)


def name_sources(config: Stage2Config) -> None:
    """Puts names in the place of `all` and `top:N`, so that the run is the same as one that was told them.

    Raises:
        UserError: there is no adapter, no ranking, none that still holds, or it has fewer sources.
    """
    if isinstance(config.sources, list):
        return
    if config.sources == "all":
        found = all_adapters(Path(config.store), config.backbone.name_or_path)
        config.sources = [manifest.name for manifest in found.sources]
        _say(f"sources=all: {', '.join(config.sources)}")
        if found.left_out:
            _say(found.left_out_line())
        return
    asked, by = config.sources, config.sources_by
    count = int(asked.removeprefix("top:"))
    kept = _standing_ranking(config)
    ordered = _ordered(kept, by)
    if count > len(ordered):
        raise UserError(
            f"sources={asked}: the ranking for {kept.task['name']} has {len(ordered)} sources"
            f"{f' with a score by {by}' if by else ''} ({kept.path}); expected top:{len(ordered)} or fewer"
        )
    config.sources = [source["reference"] for source in ordered[:count]]
    config.sources_by = None
    chosen = ", ".join(source["name"] for source in ordered[:count])
    whose = by or f"the mean rank of {', '.join(kept.methods)}"
    _say(f"sources={asked}: {chosen}, by {whose} ({kept.path})")


@functools.cache
def _say(line: str) -> None:
    """Once a process, which settles a job when it is planned and when its turn comes."""
    log.info("%s", line)


def _ordered(kept: Kept, by: str | None) -> list[dict[str, Any]]:
    """The sources that have a rank, best first; ties as the ranking has them."""
    if by is None:
        return kept.sources
    scored = [source for source in kept.sources if source["ranks"].get(by) is not None]
    return sorted(scored, key=lambda source: float(source["ranks"][by]))


def _standing_ranking(config: Stage2Config) -> Kept:
    """The newest ranking of the target all whose sources are still what the store has."""
    assert config.task is not None
    store, by = Path(config.store), config.sources_by
    rankings, damaged = rankings_of(store, dataclasses.asdict(config.task), config.backbone.name_or_path)
    rankings = [kept for kept in rankings if by is None or by in kept.methods]
    changed: list[list[str]] = []
    for kept in rankings:
        changed.append(_changed(kept, store))
        if not changed[-1]:
            return kept
    if rankings:
        raise UserError(
            f"sources={config.sources}: since {config.task.name} was ranked, {', '.join(changed[0])}; "
            f"rank again\n{_command(config)}"
        )
    what = f"no ranking of sources for {config.task.name} on {config.backbone.name_or_path}"
    if by is not None:
        what += f" by {by}"
    more = f" ({damaged[0]})" if damaged else ""
    raise UserError(
        f"sources={config.sources}: the store {store} has {what}{more}; make one with\n{_command(config)}"
    )


def _changed(kept: Kept, store: Path) -> list[str]:
    """What became of sources that are no longer what was ranked: `snli was replaced`, `rte is gone`."""
    found = []
    for source in kept.sources:
        try:
            now = read_manifest(source["reference"], store).hash
        except UserError:
            found.append(f"{source['name']} is gone or damaged")
        else:
            if now != source["hash"]:
                found.append(f"{source['name']} was replaced")
    return found


def _command(config: Stage2Config) -> str:
    assert config.task is not None
    words = ["+" + override("task", config.task.name), override("store", config.store)]
    words += [
        override("backbone.name_or_path", config.backbone.name_or_path),
        override("backbone.pooling", config.backbone.pooling),
    ]
    if config.data.dir is not None:
        words.append(override("data.dir", config.data.dir))
    if config.data.quoting is not None:
        words.append(override("data.quoting", config.data.quoting))
    for setting in dataclasses.fields(config.data.split):
        value = getattr(config.data.split, setting.name)
        if value != getattr(SplitConfig(), setting.name):
            words.append(override(f"data.split.{setting.name}", value))
    return shell_line("rank", words)
