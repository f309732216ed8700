"""Which samples of a batch do it: what the recording suggests, checked, and delta debugging for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

from nanguard.diagnosis.batches import batch_size, take

__all__ = ["SampleSearch", "batch_size", "failing_samples", "most_runs_for", "take"]

Fails = Callable[[Sequence[int]], "bool | None"]


def most_runs_for(size: int) -> int:
    """How many sub-batches are tried at most; a single culprit takes two for each halving."""
    return 4 * math.ceil(math.log2(max(size, 2))) + 2 * size


def failing_samples(size: int, fails: Fails, *, most_runs: int = 64) -> tuple[int, ...] | None:
    """All smallest sets of samples that still fail, together (Zeller and Hildebrandt, 2002, ddmin).

    Args:
        size: number of samples in the batch, which as a whole is known to fail.
        fails: whether a sub-batch fails; `None` where it cannot be run, as BatchNorm cannot on one sample.
        most_runs: runs after which the search ends.

    Returns:
        Positions in ascending order, or `None` where the search ran out of runs before it found one.
    """
    search = SampleSearch(size, fails, most_runs)
    found = search.run()
    return found if search.complete or search.found else None


class _OutOfRuns(Exception):
    """The search has used up its runs."""


@final
class SampleSearch:
    """The search in one batch.

    Args:
        size, fails, most_runs: as for `failing_samples`.

    Attributes:
        found: the samples of the smallest sets so far.
        complete: whether the search has come to its end.
        runs: sub-batches tried.
    """

    def __init__(self, size: int, fails: Fails, most_runs: int | None = None) -> None:
        self._size = size
        self._test = fails
        self._left = most_runs_for(size) if most_runs is None else most_runs
        self._healthy: list[int] = []
        self._doubles = True
        self._known: dict[tuple[int, ...], bool | None] = {}
        self._smallest = list(range(size))
        self.found: list[int] = []
        self.complete = False
        self.runs = 0

    def run(self, guess: Sequence[int] = ()) -> tuple[int, ...]:
        """The samples at fault in ascending order; where the runs were used up, the smallest failing set so far.

        Args:
            guess: samples that are suspected, each of which may do it by itself.
        """
        try:
            if not self._confirmed(sorted(guess)):
                self._search()
            self.complete = True
        except _OutOfRuns:
            pass
        return tuple(sorted(self.found or self._smallest))

    @property
    def each_alone(self) -> bool:
        """Whether every sample of the batch is known to do it by itself."""
        return all(self._known.get((position,)) for position in range(self._size))

    def _confirmed(self, guess: list[int]) -> bool:
        """Whether each suspect does it alone, and nobody else does."""
        if not guess:
            return False
        rest = [position for position in range(self._size) if position not in guess]
        if rest and self.fails(rest):
            return False
        if all(self.fails([position]) for position in guess):
            self.found = guess
            return True
        return False

    def _search(self) -> None:
        rest = list(range(self._size))
        while rest and (self.found == [] or self.fails(rest)):
            self._below(rest)
            rest = [position for position in rest if position not in self.found]

    def _below(self, failing: list[int]) -> None:
        """Finds samples at fault in a failing set: those of each half that fails, or else those that fail together only."""
        if len(failing) == 1:
            self._keep(failing)
            return
        middle = len(failing) // 2
        halves = [half for half in (failing[:middle], failing[middle:]) if self.fails(half)]
        if len(halves) == 2 and self._most_alone(failing):
            self._keep([position for position in failing if self.fails([position])])
            return
        for half in halves:
            if not set(half) <= set(self.found):
                self._below(half)
        if not halves:
            together = self._shrink(failing)
            self._keep(together)
            if len(together) > 1:
                self._keep(self._in_place_of(together))

    def _most_alone(self, failing: list[int]) -> bool:
        """Whether most samples do it by themselves, so that asking each of them is the shortest way."""
        quarter = -(-len(failing) // 4)
        quarters = [failing[start : start + quarter] for start in range(0, len(failing), quarter)]
        return all(map(self.fails, quarters)) and any(self.fails([position]) for position in failing[:4])

    def _in_place_of(self, culprits: list[int]) -> list[int]:
        """Samples that could stand in for one of several that only fail together."""
        others = [position for position in range(self._size) if position not in self.found]
        if not others or not self.fails(sorted([*culprits[1:], *others])):
            return []
        return [other for other in others if self.fails(sorted([*culprits[1:], other]))]

    def _keep(self, culprits: list[int]) -> None:
        self.found += [culprit for culprit in culprits if culprit not in self.found]

    def fails(self, positions: Sequence[int]) -> bool:
        """Whether a sub-batch fails. One that is too small to run is filled up with samples that are known to be healthy, or
        else with itself.
        """
        answer = self._run(positions)
        for padding in (1, 3):
            if answer is not None:
                break
            extra = [position for position in self._healthy_beside(positions) if position not in positions][:padding]
            answer = self._run([*positions, *extra]) if len(extra) == padding else None
        if answer is None and len(positions) == 1 and self._doubles:
            answer = self._run([*positions, *positions])
            if answer is None:  # two are too few as well; that was no use
                self._doubles = False
                self._left += 1
        return bool(answer)

    def _run(self, positions: Sequence[int]) -> bool | None:
        key = tuple(positions)
        if key not in self._known:
            if self._left <= 0:
                raise _OutOfRuns
            self._left -= 1
            self.runs += 1
            self._known[key] = self._test(key)
            if self._known[key] is False and len(set(key)) > len(self._healthy):
                self._healthy = list(dict.fromkeys(key))
        return self._known[key]

    def _healthy_beside(self, positions: Sequence[int]) -> list[int]:
        if not self._healthy:
            self._run([position for position in range(self._size) if position not in positions])
        return self._healthy

    def _shrink(self, failing: list[int]) -> list[int]:
        """A minimal failing subset of a failing set."""
        pieces = 2
        while len(failing) > 1:
            size = -(-len(failing) // pieces)
            parts = [failing[start : start + size] for start in range(0, len(failing), size)]
            part = next((part for part in parts if self.fails(part)), None)
            if part is not None:
                failing, pieces = part, 2
                self._note(failing)
                continue
            if pieces > 2:
                without = ([entry for entry in failing if entry not in part] for part in parts)
                smaller = next((rest for rest in without if self.fails(rest)), None)
                if smaller is not None:
                    failing, pieces = smaller, max(pieces - 1, 2)
                    self._note(failing)
                    continue
            if pieces >= len(failing):
                break
            pieces = min(2 * pieces, len(failing))
        return failing

    def _note(self, failing: list[int]) -> None:
        if len(failing) < len(self._smallest):
            self._smallest = failing
