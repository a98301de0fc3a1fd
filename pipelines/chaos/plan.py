"""Which kinds of runs are killed where: drawn by a seed, so that every place gets its turn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipelines.chaos.fate import BATCH, MAIN, OVERWRITE_RENAMES, READS
from pipelines.chaos.work import Kind

ANY_MOMENT = "any moment"
MOST_KILLS = 4  # of one run, before it may end

# In the order in which a run comes by; the second number: how much more often it is drawn than the others.
_CACHE = (
    "half a file of the token cache",
    "half a file of the prefix cache",
    "before the prefix cache is put in place",
)
_COPY = ("a source is copied and not in place",)
_CHECKPOINT = (
    "half a checkpoint",
    "a checkpoint is written and not synced",
    "before a checkpoint's renames",
    "between a checkpoint's renames",
    "a checkpoint is in place, its position not",
    "after a checkpoint",
)
TRAINING = (
    BATCH,
    "before the optimizer's step",
    "after the optimizer's step",
    "a validation batch",
    "after a validation",
    *_CHECKPOINT,
)
_STORE = (
    "half the weights",
    "half the head",
    "before the manifest is written",
    "half the manifest",
    "staged and not in place",
    OVERWRITE_RENAMES,
    "overwritten, the old one is still there",
)
_END = ("stored, the checkpoints are still there", "the checkpoints are half removed")
_PHASES = (_COPY, _CACHE, TRAINING, _STORE, _END)
PLACES = (*(place for phase in _PHASES for place in phase), READS, ANY_MOMENT)
_WEIGHTS = {ANY_MOMENT: 8, BATCH: 2, "half a checkpoint": 2, READS: 2}


@dataclass(frozen=True)
class Kill:
    """One death.

    place: where. count: at which visit, from 1. at: the role of the process that has to be there, or "any".
    whom: the role that dies, or "all". share: of a half-written file is there. seconds: after the start, where the
    place is any moment.
    """

    place: str
    count: int
    at: str
    whom: str
    share: float = 0.5
    seconds: float | None = None

    def said(self, processes: int) -> str:
        if self.seconds is not None:
            what = f"{self.place} ({self.seconds:.1f} s)"
        else:
            what = f"{self.place}{f' ({self.count})' if self.count > 1 else ''}"
        if processes == 1:
            return what
        names = {MAIN: "the launcher", "all": "all"}
        return f"{what}, {names.get(self.whom, f'rank {self.whom}')}"


@dataclass(frozen=True)
class Chain:
    """One run with its deaths, one an attempt, in order."""

    number: int
    kind: Kind
    kills: tuple[Kill, ...]


@dataclass(frozen=True)
class Course:
    """What an undisturbed run of a kind does: its visits to each place by role, and its seconds."""

    visits: Mapping[str, Mapping[str, int]]
    seconds: float

    def roles(self, place: str) -> list[str]:
        return sorted(role for role, counts in self.visits.items() if counts.get(place))


class Plan:
    """Draws runs without end. The place that was drawn least often goes first, so that all come up.

    Args:
        courses: of each kind.
    """

    def __init__(self, kinds: Mapping[str, Kind], courses: Mapping[str, Course], seed: int) -> None:
        self._kinds, self._courses = kinds, courses
        self._draw = random.Random(seed)
        self._drawn: Counter[str] = Counter()

    def chains(self) -> Iterator[Chain]:
        number = 0
        while True:
            for kind in self._kinds.values():
                number += 1
                yield Chain(number, kind, self._kills(kind))

    def _kills(self, kind: Kind) -> tuple[Kill, ...]:
        course = self._courses[kind.name]
        places = self._places(course, self._draw.randint(1, MOST_KILLS))
        fractions = iter(sorted(self._draw.random() for place in places if place in TRAINING))
        kills, before = [], 0.0
        for place in places:
            if place == ANY_MOMENT:
                kills.append(self._any_moment(kind, course))
                continue
            at = self._draw.choice(course.roles(place) or [MAIN]) if place in TRAINING else "any"
            count = 1
            if place in TRAINING:  # later attempts go on: they have only the rest before them
                fraction = next(fractions)
                visits = course.visits[at][place]
                count, before = max(1, round((fraction - before) * visits + 0.5)), fraction
                count = min(count, visits)
            kills.append(Kill(place, count, at, self._whom(kind), share=self._draw.random()))
        return tuple(kills)

    def _places(self, course: Course, count: int) -> list[str]:
        there = [place for place in PLACES if course.roles(place) or place == ANY_MOMENT]
        chosen: list[str] = []
        moments = 0
        for _ in range(count):
            left = [place for place in there if place not in chosen]
            if not left:
                break
            place = min(left, key=lambda p: (self._drawn[p] / _WEIGHTS.get(p, 1), self._draw.random()))
            self._drawn[place] += 1
            if place == ANY_MOMENT:
                moments += 1
            else:
                chosen.append(place)
        chosen.sort(key=lambda place: (phase_of(place), self._draw.random()))
        for _ in range(moments):
            chosen.insert(self._draw.randint(0, len(chosen)), ANY_MOMENT)
        trained = next((n for n, place in enumerate(chosen) if place in (*TRAINING, *_STORE)), None)
        if trained is not None and len(chosen) < MOST_KILLS and self._is_due(READS):
            self._drawn[READS] += 1
            chosen.insert(trained + 1, READS)
        return chosen

    def _is_due(self, place: str) -> bool:
        others = [self._drawn[other] / _WEIGHTS.get(other, 1) for other in self._drawn if other != place]
        return self._drawn[place] / _WEIGHTS.get(place, 1) <= sum(others) / max(1, len(others))

    def _any_moment(self, kind: Kind, course: Course) -> Kill:
        return Kill(ANY_MOMENT, 1, "any", self._whom(kind), seconds=self._draw.uniform(0.0, course.seconds))

    def _whom(self, kind: Kind) -> str:
        if kind.processes == 1:
            return MAIN
        return self._draw.choice([MAIN, "all", *map(str, range(kind.processes))])


def phase_of(place: str) -> int:
    """A number that grows in the order in which a run comes by."""
    return next(number for number, phase in enumerate(_PHASES) if place in phase)
