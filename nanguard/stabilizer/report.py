"""The list of swaps: one entry for each place in the user's code, counted."""

from __future__ import annotations

from types import CodeType
from typing import final

from nanguard.algebra import Rule, Term
from nanguard.algebra.render import replacement
from nanguard.incident import Swap
from nanguard.stabilizer.locate import FrameNames, expression, user_frame

__all__ = ["Report"]


@final
class Report:
    """Fills a list of swaps. The first sight of a place reads its source; later ones only count."""

    def __init__(self, swaps: list[Swap]) -> None:
        self.swaps = swaps
        self._seen: dict[tuple[CodeType, int, str], Swap] = {}

    def add(self, rule: Rule, term: Term) -> None:
        """Note that `rule` replaced what the user's code is computing right now by `term`."""
        frame = user_frame()
        key = (frame.f_code, frame.f_lasti, rule.code)
        known = self._seen.get(key)
        if known is None:
            line, original = expression(frame)
            text = replacement(rule, term, FrameNames(frame))
            swap = Swap(rule.code, frame.f_code.co_filename, line, original, text, count=0)
            known = self._seen[key] = self._merged(swap)
        known.count += 1

    def _merged(self, swap: Swap) -> Swap:
        place = (swap.rule, swap.file, swap.line)
        for other in self.swaps:
            if (other.rule, other.file, other.line) == place:
                return other
        self.swaps.append(swap)
        return swap
