"""Several processes that train one model must decide alike: one that raised alone would leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final, get_args

from nanguard.incident import Trigger
from nanguard.policy import RuleAction

__all__ = ["Peers"]


@final
@dataclass(frozen=True)
class Peers:
    """The processes that train together. Every one takes part in each call.

    Attributes:
        rank: of this process.
        any: whether any of them says so; called at each step.
        gather: the number that each gives, by rank; called only when something is wrong.
    """

    rank: int
    any: Callable[[bool], bool]
    gather: Callable[[int], list[int]]

    def culprit(self, *, loss: bool, alarm: bool) -> int | None:
        """The rank where it began, if that is another one.

        After the reduction every rank sees the same bad gradients, so a bad loss counts for more.

        Args:
            loss: whether the loss of this rank is non-finite.
            alarm: whether anything is.
        """
        with_loss, with_alarm = self.gather(loss), self.gather(alarm)
        flags = with_loss if any(with_loss) else with_alarm
        return None if flags[self.rank] else flags.index(1)

    def reproducing(self, mine: bool, elsewhere: int | None) -> int | None:
        """The rank where it began, if that is another one, now that each has run its part of the step again.

        Args:
            mine: whether this rank's part has failed again.
            elsewhere: what was known before.
        """
        flags = self.gather(mine)
        if not any(flags):
            return elsewhere
        return None if flags[self.rank] else flags.index(1)

    def told(self, trigger: Trigger, elsewhere: int | None) -> Trigger:
        """What noticed it on the rank where it began."""
        triggers: tuple[Trigger, ...] = get_args(Trigger)
        votes = self.gather(triggers.index(trigger))
        return trigger if elsewhere is None else triggers[votes[elsewhere]]

    def agreed(self, action: RuleAction, elsewhere: int | None) -> RuleAction:
        """The action of the lowest rank where it began; only that rank knows the cause."""
        actions: tuple[RuleAction, ...] = get_args(RuleAction)
        votes = self.gather(-1 if elsewhere is not None else actions.index(action))
        return actions[next(vote for vote in votes if vote >= 0)]
