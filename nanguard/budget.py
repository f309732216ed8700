"""How many skips a run has spent, and what happens when there are none left."""

from __future__ import annotations

from typing import final

from nanguard.policy import Budget, RuleAction

__all__ = ["SkipBudget"]


@final
class SkipBudget:
    """Counts the skips of one run against the policy's budget."""

    def __init__(self, limits: Budget) -> None:
        self._limits = limits
        self._consecutive = 0
        self._total = 0

    def spend(self, action: RuleAction) -> tuple[RuleAction, str]:
        """The action, or what the policy says instead of a skip too many; and a remark that explains the difference."""
        if action != "skip_step":
            return action, ""
        self._consecutive += 1
        self._total += 1
        if self._consecutive > self._limits.consecutive:
            return self._limits.then, f"the policy's budget of {self._limits.consecutive} skips in a row is spent"
        if self._total > self._limits.total:
            return self._limits.then, f"the policy's budget of {self._limits.total} skips in all is spent"
        return action, ""

    def healthy_step(self) -> None:
        """A step was taken: the next skip is the first in a row."""
        self._consecutive = 0
