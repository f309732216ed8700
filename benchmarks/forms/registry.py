"""What a form, a twin and an innocent are, and how one is declared."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["FORMS", "INNOCENTS", "TWINS", "Family", "Form", "Innocent", "Inputs"]

Function = Callable[..., Tensor]
Inputs = dict[str, Callable[[], tuple[Tensor, ...]]]


@dataclass(frozen=True, eq=False)
class Form:
    """An unstable form, or a twin of one.

    Attributes:
        name: unique.
        family: what it is shown under.
        naive: the code as people write it; a parameter `eps` has the literal number of the source as its default.
        stable: the exact function, to be evaluated in float64; `None` for a twin that is its own reference on mild inputs.
        inputs: factories of inputs; the keys say what for. Floating-point inputs get gradients.
        constant: positions of inputs that get none.
        epsilon: under which policy it is judged. Under ``drop`` the reference is that of `eps=0`.
        saturated: under which policy it is judged, where the loss of a library is fed probabilities.
        breaks: whether its extreme inputs break the naive float32 code (false for twins).
        compilable: whether `torch.compile` itself can do it.
        tolerance: a factor on the allowed error.
        double: whether the naive code can be evaluated in float64 (false where it casts to another dtype).
        infinite: whether the exact result holds infinities.
        precision: that of the naive code inside, where neither inputs nor result show it (autocast).
        of: the form that a twin resembles.
    """

    name: str
    family: str
    naive: Function
    stable: Function | None
    inputs: Inputs = field(repr=False)
    constant: tuple[int, ...] = ()
    epsilon: str = "keep"
    saturated: str = "report"
    breaks: bool = True
    compilable: bool = True
    tolerance: float = 1.0
    double: bool = True
    infinite: bool = False
    precision: torch.dtype = torch.float32
    of: str = ""

    @property
    def exact(self) -> Function:
        """The reference; float64 in, float64 out."""
        function = self.naive if self.stable is None else self.stable
        if _has_epsilon(function):
            return functools.partial(function, eps=0.0 if self.epsilon == "drop" else self.literal)
        return function

    @property
    def undisturbed(self) -> Function:
        """The naive code, without its epsilon where that is to be dropped: what the reference must equal on mild inputs."""
        without = self.epsilon == "drop" and _has_epsilon(self.naive)
        return functools.partial(self.naive, eps=0.0) if without else self.naive

    @property
    def literal(self) -> float:
        """The epsilon in the source."""
        return float(inspect.signature(self.naive).parameters["eps"].default)


@dataclass(frozen=True, eq=False)
class Innocent:
    """Code that must stay bit-identical, in value and gradient.

    Attributes:
        name: unique.
        family: what it is shown under.
        function: the code.
        inputs: factories of inputs.
        constant: positions of inputs that get no gradient.
        quiet: whether no swap may be reported either.
        compilable: whether `torch.compile` itself can do it.
    """

    name: str
    family: str
    function: Function
    inputs: Inputs = field(repr=False)
    constant: tuple[int, ...] = ()
    quiet: bool = True
    compilable: bool = True


FORMS: dict[str, Form] = {}
TWINS: dict[str, Form] = {}
INNOCENTS: dict[str, Innocent] = {}


class Family:
    """Declares forms of one family.

    Arguments:
        title: of the family.
        inputs: of those that say nothing else.
    """

    def __init__(self, title: str, inputs: Inputs | None = None) -> None:
        self.title = title
        self._inputs = inputs

    def form(
        self, stable: Function, inputs: Inputs | None = None, *, epsilon: str = "keep", name: str = "", **more: object
    ) -> Callable[[Function], Function]:
        """Declare an unstable form. With `epsilon="drop"` its float32 code is right as it stands, and is a twin under keep;
        with `epsilon="both"` it is wrong under both policies.
        """

        def declare(naive: Function) -> Function:
            given = name or naive.__name__.strip("_")
            found = self._chosen(inputs)
            if epsilon != "drop":
                _add(FORMS, Form(given, self.title, naive, stable, found, **more))  # type: ignore[arg-type]
            if epsilon != "keep":
                dropped = f"{given}__drop"
                _add(FORMS, Form(dropped, self.title, naive, stable, found, epsilon="drop", **more))  # type: ignore[arg-type]
            if epsilon == "drop":
                twin = Form(f"{given}__keep", self.title, naive, stable, found, breaks=False, of=dropped, **more)  # type: ignore[arg-type]
                _add(TWINS, twin)
            return naive

        return declare

    def twin(
        self, of: str, inputs: Inputs | None = None, *, name: str = "", **more: object
    ) -> Callable[[Function], Function]:
        """Declare code that resembles a form and means something else."""

        def declare(naive: Function) -> Function:
            given = name or naive.__name__.strip("_")
            stable = more.pop("stable", None)
            found = self._chosen(inputs)
            _add(TWINS, Form(given, self.title, naive, stable, found, breaks=False, of=of, **more))  # type: ignore[arg-type]
            return naive

        return declare

    def innocent(
        self, inputs: Inputs | None = None, *, name: str = "", **more: object
    ) -> Callable[[Function], Function]:
        """Declare code that must stay as it is."""

        def declare(function: Function) -> Function:
            given = name or function.__name__.strip("_")
            _add(INNOCENTS, Innocent(given, self.title, function, self._chosen(inputs), **more))  # type: ignore[arg-type]
            return function

        return declare

    def _chosen(self, inputs: Inputs | None) -> Inputs:
        found = self._inputs if inputs is None else inputs
        if found is None:
            raise ValueError(f"{self.title}: no inputs; expected them for the family or the form")
        return found


def _has_epsilon(function: Function) -> bool:
    try:
        return "eps" in inspect.signature(function).parameters
    except ValueError:  # one of torch's own
        return False


def _add(table: dict[str, object], entry: Form | Innocent) -> None:  # type: ignore[type-arg]
    if any(entry.name in known for known in (FORMS, TWINS, INNOCENTS)):
        raise ValueError(f"{entry.name}: declared twice")
    table[entry.name] = entry
