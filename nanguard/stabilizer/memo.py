"""What calls have taught, and how queries were answered, for all calls that look the same."""

from __future__ import annotations

from typing import Any, Final, final

from torch import Tensor

from nanguard.algebra import Term
from nanguard.stabilizer.accuracy import Digits
from nanguard.stabilizer.answers import Answer
from nanguard.stabilizer.calls import Look
from nanguard.stabilizer.restarts import Reminder

__all__ = ["UNSEEN", "Lesson", "Memo", "Reply"]

# Programs whose numbers change all the time never look the same twice; what they have taught is of no use.
_MOST = 4096


@final
class Lesson:
    """What is known about the result of a call.

    Attributes:
        outline: its logarithm.
        picks: which of the call's tensors the outline's numbers stand for.
        quotient: what takes the place of the result itself, where it may overflow.
        has_basis: whether it is a softmax that logarithms may be picked from later.
        advised: whether the advisor has something to say.
        digits: whether the result has all its digits.
        reminder: how the logarithm is computed, where that is remembered.
    """

    __slots__ = ("advised", "digits", "has_basis", "outline", "picks", "quotient", "reminder")

    def __init__(
        self,
        outline: Term,
        picks: list[int],
        quotient: Reply | None,
        has_basis: bool,
        advised: bool,
        digits: Digits,
    ) -> None:
        self.outline = outline
        self.picks = picks
        self.quotient = quotient
        self.has_basis = has_basis
        self.digits = digits
        self.advised = advised
        self.reminder: Reminder | None = None


@final
class Reply:
    """An answer.

    Attributes:
        answer: it.
        picks: which of the call's tensors it is computed from.
        subject: which of them is asked about, or divided by, where that matters.
    """

    __slots__ = ("answer", "picks", "subject")

    def __init__(self, answer: Answer, picks: list[int], subject: int = -1) -> None:
        self.answer = answer
        self.picks = picks
        self.subject = subject

    def values(self, look: Look) -> list[Tensor]:
        """The tensors that it is computed from this time."""
        values = look.values
        return [values[pick] for pick in self.picks]


@final
class _Unseen:
    pass


UNSEEN: Final = _Unseen()


@final
class Memo:
    """Entries by what calls look like. It holds no tensors."""

    def __init__(self) -> None:
        self._entries: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """The entry, which may be `None`, or `UNSEEN`."""
        return self._entries.get(key, UNSEEN)

    def put(self, key: Any, entry: Lesson | Reply | None) -> None:
        """Keep an entry under a key, if there is one; `None` says that there is nothing to know."""
        if key is None:
            return
        if len(self._entries) >= _MOST:
            self._entries.clear()
        self._entries[key] = entry
