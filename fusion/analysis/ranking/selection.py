"""Resolve `sources=all` and `sources=top:N`, using only manifests and stored rankings."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.config.compositions import LORA_DEFAULTS, CompositionConfig
from fusion.config.stages import Stage2Config
from fusion.errors import UserError
from fusion.store.compatibility import why_unfit
from fusion.store.layout import OLD
from fusion.store.lookup import artifacts, names, read_manifest
from fusion.text import key_of, log_once, override, shell_line

if TYPE_CHECKING:
    from fusion.analysis.ranking.rankings import RankedSource, StoredRanking
    from fusion.store.manifest import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidates:
    """Adapters that can be fused with each other, sorted by name, and the reason for each excluded adapter."""

    sources: list[Manifest]
    left_out: dict[str, str]

    def left_out_line(self) -> str:
        """Describe the excluded adapters in one line; empty if there are none."""
        by_reason = defaultdict(list)
        for name, reason in self.left_out.items():
            by_reason[reason].append(name)
        parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        return f"excluded: {'; '.join(parts)}" if parts else ""


def all_adapters(store: Path, backbone: str, without_task: str | None = None) -> Candidates:
    """Return the adapters trained on this backbone that have the most common tokenizer and placement.

    Raises UserError if there are none. Adapters that were trained on `without_task` are excluded.
    """
    readable = {folder.name.removesuffix(OLD): manifest for folder, manifest in artifacts(store)}
    left_out = {
        name: "cannot be read, see python -m fusion.store verify" for name in names(store) if name not in readable
    }

    def keep(manifests: Iterable[Manifest], problem: Callable[[Manifest], str | bool | None]) -> list[Manifest]:
        problems = [(manifest, problem(manifest)) for manifest in manifests]
        left_out.update({manifest.name: str(reason) for manifest, reason in problems if reason})
        return [manifest for manifest, reason in problems if not reason]

    adapters = [manifest for manifest in readable.values() if manifest.kind == "adapter"]
    # The same weights may be stored under different names and paths.
    prints = {m.backbone.fingerprint for m in adapters if _is_same(m.backbone.name_or_path, backbone)}
    sources = keep(
        adapters, lambda m: m.backbone.fingerprint not in prints and f"trained on backbone {m.backbone.name_or_path}"
    )
    sources = keep(sources, why_unfit)
    tokenizer = _most_common(m.backbone.tokenizer for m in sources if m.backbone.tokenizer)
    other = f"instead of the most common {str(tokenizer)[:8]}"
    sources = keep(
        sources,
        lambda m: m.backbone.tokenizer not in (None, tokenizer) and f"tokenizer {m.backbone.tokenizer:.8} {other}",
    )
    own = f"trained on the target {without_task}; set include_target=true to include it"
    sources = keep(sources, lambda m: without_task in m.task_names and own)
    placement = _most_common(map(_placement, sources))
    differs = f"instead of the most common {placement}"
    sources = keep(sources, lambda m: _placement(m) != placement and f"{_placement(m)} {differs}")
    found = Candidates(sources, left_out)
    if not sources:
        line = found.left_out_line()
        raise UserError(
            f"sources=all: the store {store} has no adapters for {backbone}{f'; {line}' if line else ''}\n"
            "Train one with python -m fusion.stage1 +task=NAME, or set store=DIR and backbone=NAME as in stage 1"
        )
    return found


def _most_common(values: Iterable[str]) -> str | None:
    return next((value for value, _ in Counter(values).most_common(1)), None)


def _is_same(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other))


def _placement(manifest: Manifest) -> str:
    """Describe the placement, which has to be equal for all sources of a fusion."""
    sites, reads = manifest.placement["adapter.sites"], manifest.placement["adapter.reads"]
    return f"{'+'.join(sites)}/{reads} on weights {manifest.backbone.fingerprint[:8]}"


def settle_sources(config: Stage2Config, overrides: Sequence[str]) -> None:
    """Resolve the sources, and use a low rank and no value matrix for LoRAs unless the overrides set them.

    A query, key and value of size D x D in each linear layer would have far more parameters than the LoRAs.
    """
    resolve_sources(config)
    composition, store = config.composition, Path(config.store)
    given = set(map(key_of, overrides))
    if not config.sources or config.sources[0] not in names(store):
        return
    if read_manifest(config.sources[0], store).kind == "lora":
        for key, value in LORA_DEFAULTS.items():
            applies = key in composition.definition.settings and f"composition.{key}" not in given
            if applies and getattr(composition, key) == getattr(CompositionConfig(), key):
                setattr(composition, key, value)


def resolve_sources(config: Stage2Config) -> None:
    """Replace `all` and `top:N` in `config.sources` by artifact names. Raises UserError if there are too few."""
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
    """Return the newest ranking for the target whose sources have not changed since."""
    from fusion.analysis.ranking.rankings import rankings_of  # imports pydantic, which most commands do not need

    assert config.task is not None
    store, by = Path(config.store), config.sources_by
    rankings, damaged = rankings_of(store, dataclasses.asdict(config.task), config.backbone.name_or_path)
    changed = []  # names of the changed sources of each ranking
    for ranking in rankings:
        if by is None or by in ranking.methods:
            changed.append([source.name for source in ranking.sources if _is_changed(source, store)])
            if not changed[-1]:
                return ranking
    if changed:
        problem = f"{', '.join(changed[0])} changed or was removed since the last ranking for {config.task.name}"
    else:
        problem = f"no ranking for {config.task.name} on {config.backbone.name_or_path}{f' by {by}' if by else ''}"
        problem += f" in {store}" + (f" ({damaged[0]})" if damaged else "")
    raise UserError(f"sources={config.sources}: {problem}; rank the sources with\n{_rank_command(config)}")


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
