"""Names of the sources of stage 2 for `sources=all` and `sources=top:N`."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.analysis.ranking.candidates import all_adapters
from fusion.config.stages import Stage2Config
from fusion.errors import UserError
from fusion.store.lookup import read_manifest
from fusion.text import log_once, override, shell_line

if TYPE_CHECKING:
    from fusion.analysis.ranking.rankings import RankedSource, StoredRanking

log = logging.getLogger(__name__)


def resolve_sources(config: Stage2Config) -> None:
    """Replace `all` and `top:N` by names, so that the run equals one with these names.

    Raises:
        UserError: there is no adapter, no ranking of the current sources, or it has fewer sources.
    """
    if isinstance(config.sources, list):
        return
    if config.sources == "all":
        found = all_adapters(Path(config.store), config.backbone.name_or_path)
        config.sources = [manifest.name for manifest in found.sources]
        log_once(log, f"sources=all: {', '.join(config.sources)}")
        if found.left_out:
            log_once(log, found.left_out_line())
        return
    ranking, by, count = _current_ranking(config), config.sources_by, int(config.sources.removeprefix("top:"))
    ordered = ranking.sources
    if by is not None:
        ranks = {source.reference: rank for source in ordered if (rank := source.ranks.get(by)) is not None}
        ordered = [source for source in ordered if source.reference in ranks]
        ordered.sort(key=lambda source: ranks[source.reference])
    if count > len(ordered):
        scored = f" with a score by {by}" if by else ""
        raise UserError(
            f"sources={config.sources}: expected top:{len(ordered)} or fewer; the ranking for {ranking.task['name']} has "
            f"{len(ordered)} sources{scored} ({ranking.path})"
        )
    names = ", ".join(source.name for source in ordered[:count])
    order = by or f"the mean rank of {', '.join(ranking.methods)}"
    log_once(log, f"sources={config.sources}: {names}, by {order} ({ranking.path})")
    config.sources, config.sources_by = [source.reference for source in ordered[:count]], None


def _current_ranking(config: Stage2Config) -> StoredRanking:
    """The newest ranking for the target whose sources are unchanged in the store."""
    from fusion.analysis.ranking.rankings import rankings_of  # imports pydantic, which most commands do not need

    assert config.task is not None
    store, by = Path(config.store), config.sources_by
    rankings, damaged = rankings_of(store, dataclasses.asdict(config.task), config.backbone.name_or_path)
    changed = []  # of each ranking, the names of its changed sources
    for ranking in rankings:
        if by is None or by in ranking.methods:
            changed.append([source.name for source in ranking.sources if _is_changed(source, store)])
            if not changed[-1]:
                return ranking
    if changed:
        problem = f"{', '.join(changed[0])} changed, or is missing, since the last ranking for {config.task.name}"
    else:
        problem = f"no ranking for {config.task.name} on {config.backbone.name_or_path}{f' by {by}' if by else ''}"
        problem += f" in {store}" + (f" ({damaged[0]})" if damaged else "")
    raise UserError(f"sources={config.sources}: {problem}; rank the sources:\n{_rank_command(config)}")


def _is_changed(source: RankedSource, store: Path) -> bool:
    try:
        return read_manifest(source.reference, store).hash != source.hash
    except UserError:
        return True


def _rank_command(config: Stage2Config) -> str:
    assert config.task is not None
    optional = {"data.dir": config.data.dir, "data.quoting": config.data.quoting}
    words = [
        "+" + override("task", config.task.name),
        override("store", config.store),
        override("backbone.name_or_path", config.backbone.name_or_path),
        override("backbone.pooling", config.backbone.pooling),
        *(override(key, value) for key, value in optional.items() if value is not None),
        *config.data.split.overrides(),
    ]
    return shell_line("rank", words)
