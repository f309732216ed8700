"""The place of a value that a capture could not store."""

from __future__ import annotations

from typing import NoReturn, final

from nanguard.errors import CaptureError

__all__ = ["Unstored"]


@final
class Unstored:
    """Stands where a value was that the capture could not store. Any use of it raises `CaptureError`.

    Attributes:
        path, type, reason: what it was called, its class, and why it could not be stored.
    """

    def __init__(self, path: str, type: str, reason: str) -> None:
        self.path = path
        self.type = type
        self.reason = reason

    def __repr__(self) -> str:
        return f"<not stored: {self.path} ({self.type}): {self.reason}>"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") and name.endswith("__"):  # copying and printing ask for these
            raise AttributeError(name)
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise CaptureError(
            f"{self.path} ({self.type}) is needed and was not stored: {self.reason}; "
            f"give it with replay(..., fill={{{self.path!r}: value}})"
        )

    def _refuse_call(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse()

    # Whatever a step would do with the value ends in the same words.
    __call__ = __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __int__ = _refuse_call
