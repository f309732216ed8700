"""The lists of swaps and of advice: one entry for each place in the user's code, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any, TypeAlias, TypeVar, final

from nanguard.algebra import Rule, Term
from nanguard.algebra.render import replacement
from nanguard.errors import NumericalAdvice
from nanguard.incident import Advice, Swap
from nanguard.stabilizer.locate import FrameNames, expression, named_callers, user_frame
from nanguard.telling import tell_advice

__all__ = ["Note", "Report", "Swaps"]

Entry = TypeVar("Entry", Swap, Advice)

# Code goes by its identity: equal code may stand in two files, and what dynamo writes may have no hash. Who keeps a place keeps
# its code, too, as identities of what is gone are given away again.
Place: TypeAlias = "tuple[int, int, str]"


@final
class Swaps(list[Swap]):
    """The swaps of a block.

    Attributes:
        advice: what was found in the block and left as it is.
    """

    def __init__(self, swaps: Iterable[Swap] = ()) -> None:
        super().__init__(swaps)
        self.advice: list[Advice] = []


@final
class Note:
    """Advice on one place, which is given once it is certain."""

    __slots__ = ("_advice", "_looks", "_registry", "_report")

    def __init__(self, report: Report, advice: Advice, registry: dict[Any, Any]) -> None:
        self._report = report
        self._advice = advice
        self._registry = registry
        self._looks = 0

    @property
    def is_given(self) -> bool:
        """Whether it was given before: then it need not be established again."""
        return self._advice.count > 0

    def is_worth_a_look(self) -> bool:
        """Whether to look closer: the first time, and then less and less often, where that is costly."""
        self._looks += 1
        return self._looks & (self._looks - 1) == 0

    def give(self) -> None:
        """Put it on the list, or count it."""
        if not self.is_given:
            self._advice = self._report.enter(self._advice, self._registry)
        self._advice.count += 1


@final
class Report:
    """Fills a list of swaps and one of advice. The first sight of a place reads its source; later ones only count.

    Arguments:
        swaps: the list of swaps.
        advice: the list of advice; by default that of the swaps, where they have one.
        silent: whether nothing is noted, as what is computed again has been noted before.
        tells: whether advice is told, too.
    """

    def __init__(
        self, swaps: list[Swap], advice: list[Advice] | None = None, *, silent: bool = False, tells: bool = True
    ) -> None:
        self.swaps = swaps
        self.advice = _advice_of(swaps) if advice is None else advice
        self._silent = silent
        self._tells = tells
        self._seen: dict[Place, Swap] = {}
        self._notes: dict[Place, Note] = {}
        self._codes: list[CodeType] = []
        self._untold: list[tuple[Advice, dict[Any, Any]]] = []
        self._open = 0

    def add(self, rule: Rule, term: Callable[[], Term], answer: object = None) -> None:
        """Note that `rule` replaced what the user's code is computing right now.

        Arguments:
            rule: what it was an instance of.
            term: gives what it was replaced by; asked for at first sight.
            answer: the same for all terms that are written alike.
        """
        if self._silent:
            return
        frame = user_frame()
        key = _place(frame, rule)
        known = self._seen.get(key)
        if known is None:
            self._codes.append(frame.f_code)
            line, original, text = _described(frame, rule, term, answer)
            swap = Swap(rule.code, frame.f_code.co_filename, line, original, text, count=0)
            known = self._seen[key] = _merged(self.swaps, swap)
        known.count += 1

    def count(self, swap: Swap) -> None:
        """Count a swap that was found before, such as one of a compiled graph that runs again."""
        if not self._silent:
            _merged(self.swaps, replace(swap, count=0)).count += swap.count

    def note(self, rule: Rule, facts: Callable[[FrameNames], dict[str, str]]) -> Note | None:
        """Prepare what `rule` has to say about what the user's code is computing right now.

        Arguments:
            rule: one whose kind is advice.
            facts: gives the fields of its text.
        """
        if self._silent:
            return None
        frame = user_frame()
        key = _place(frame, rule)
        note = self._notes.get(key)
        if note is None:
            self._codes.append(frame.f_code)
            line, original = expression(frame)
            text = rule.advice.format(**facts(FrameNames(frame)))
            advice = Advice(rule.code, frame.f_code.co_filename, line, original, text, count=0)
            registry = frame.f_globals.setdefault("__warningregistry__", {}) if self._tells else {}
            note = self._notes[key] = Note(self, advice, registry)
        return note

    def enter(self, advice: Advice, registry: dict[Any, Any]) -> Advice:
        """Put advice on the list, unless its place is there already; give the entry that stands for it."""
        known = _merged(self.advice, advice)
        if known is advice and self._tells:
            self._untold.append((advice, registry))
            if not self._open:  # in a backward pass, which an exception would leave half done
                self.tell(quietly=True)
        return known

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Note nothing for a while."""
        silent, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = silent

    def begin(self) -> None:
        """A block begins."""
        self._open += 1

    def end(self, *, failed: bool) -> None:
        """A block has ended: tell what there is to tell. Earlier, an error made of a warning would leave things half done."""
        self._open -= 1
        if not self._open:
            self.tell(quietly=failed)

    def tell(self, *, quietly: bool) -> None:
        """Warn about each new piece of advice.

        Arguments:
            quietly: whether nothing is raised, where warnings are errors.
        """
        while self._untold:
            advice, registry = self._untold.pop(0)
            try:
                tell_advice(advice, registry)
            except NumericalAdvice:
                if not quietly:
                    raise


# What was written about places before: a loop may enter a block of its own in every step.
_DESCRIBED: dict[Any, tuple[list[CodeType], tuple[int, str, str]]] = {}
_MOST_PLACES = 4096


def _place(frame: FrameType, rule: Rule) -> Place:
    return id(frame.f_code), frame.f_lasti, rule.code


def _described(frame: FrameType, rule: Rule, term: Callable[[], Term], answer: object) -> tuple[int, str, str]:
    """Line and source of a place, and what to write instead, which depends on where the place was called from, too."""
    callers = named_callers(frame)
    codes = [caller.f_code for caller in callers]
    key = (rule.code, answer, *map(id, codes), *[caller.f_lasti for caller in callers])
    found = _DESCRIBED.get(key) if answer is not None else None
    if found is None:
        if len(_DESCRIBED) >= _MOST_PLACES:
            _DESCRIBED.clear()
        text = replacement(rule, term(), FrameNames(frame))
        found = _DESCRIBED[key] = codes, (*expression(frame), text)
    return found[1]


def _advice_of(swaps: list[Swap]) -> list[Advice]:
    return swaps.advice if isinstance(swaps, Swaps) else []


def _merged(entries: list[Entry], new: Entry) -> Entry:
    """The entry of the same rule and place, which is the new one if there was none."""
    place = (new.rule, new.file, new.line)
    for entry in entries:
        if (entry.rule, entry.file, entry.line) == place:
            return entry
    entries.append(new)
    return new
