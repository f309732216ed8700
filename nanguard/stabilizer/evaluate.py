"""The value of a term as a tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.algebra.build import negate
from nanguard.algebra.decisions import stem
from nanguard.algebra.pattern import constant_of, core, is_sum
from nanguard.stabilizer import scaled
from nanguard.stabilizer.contracted import contraction, is_contraction, may_contract
from nanguard.stabilizer.digits import Digits
from nanguard.stabilizer.exponents import is_differentiated
from nanguard.stabilizer.functional import exponential, sigmoid
from nanguard.stabilizer.mantissas import Mantissa
from nanguard.stabilizer.outline import filled_value
from nanguard.stabilizer.resolve import function
from nanguard.stabilizer.scaled import Scaled

__all__ = ["Program", "compute_dtype", "evaluate", "evaluate_stem", "exponential_with_parts", "is_fresh", "program"]

# Computes an outline of the tensors that its numbers stand for.
Program = Callable[[Sequence[Tensor]], Tensor]


def compute_dtype(term: Term, result: torch.dtype) -> torch.dtype:
    """The dtype to compute in: the widest of the leaves and the result, and float32 at least."""
    return _widest(result, (leaf.value.dtype for leaf in term.leaves if leaf.value.is_floating_point()))


def evaluate(term: Term, dtype: torch.dtype, *, private: bool = False) -> Tensor:
    """The value of a term, differentiable in its tracked leaves.

    Arguments:
        term: the term; its leaves are tensors.
        dtype: what to compute in.
        private: whether leaves are copied before they are used, so that no derivative saves the user's own tensor, which he may
            go on to edit. Derivatives of softmaxes save their output, so their argument needs none.
    """
    return _Evaluation(dtype, term.leaves[0].value.device, private).log(term)


def program(outline: Term, dtype: torch.dtype) -> Program:
    """The same, private, for an outline, whatever its tensors: made once, and run often."""
    straight = _straight(outline, dtype, copied=True) if _is_straight(outline) else None
    return straight or (lambda values: _Evaluation(dtype, values[0].device, True, values).log(outline))


def evaluate_stem(term: Term, dtype: torch.dtype, values: Sequence[Tensor] | None = None) -> Scaled:
    """The number that the stem of a term, or of an outline of these tensors, stands for."""
    device = (term.leaves[0].value if values is None else values[0]).device
    return scaled.settled(_bare(_Evaluation(dtype, device, True, values).number(stem(term)), term))


def _bare(own: Scaled, outline: Term) -> Scaled:
    """The number that the stem of an outline stands for, with a factor only where it may be negative."""
    whole = stem(outline) is outline
    return own if whole and outline.signed else Scaled(scaled.logarithm(own, floor=not whole))


def exponential_with_parts(
    outline: Term, others: Sequence[Term], dtype: torch.dtype
) -> Callable[[Sequence[Tensor]], tuple[Tensor, Scaled, list[Scaled]]]:
    """Computes the exponential of an outline, what that comes from (its stem), and what others are that are part of it."""

    def run(values: Sequence[Tensor]) -> tuple[Tensor, Scaled, list[Scaled]]:
        evaluation = _Evaluation(dtype, values[0].device, True, values)
        own, whole = evaluation.number(stem(outline)), stem(outline) is outline
        if whole:
            result = scaled.number(own)
        own = _bare(own, outline)
        if not whole:
            assert isinstance(outline, Apply)
            operator = ops.SOFTMAX if outline.operator is ops.LOG_SOFTMAX else ops.SIGMOID
            result = function(operator.function)(own.log, **outline.params)
        return result, own, [evaluation.number(other) for other in others]

    return run


def is_fresh(term: Term) -> bool:
    """Whether the value, if private, is memory of its own that no derivative has saved."""
    return isinstance(term, Leaf) or term.operator.fresh


# How a number of either sign is computed: from the numbers that it is made of, and from the parameters.
_SCALED: dict[str, Callable[..., Scaled]] = {
    "add": scaled.product,
    "subtract": scaled.quotient,
    "negate": lambda a: scaled.quotient(Scaled(torch.zeros_like(a.log)), a),
    "shift": lambda a, other: Scaled(a.log + other, a.factor),
    "masked_fill": scaled.masked,
    "power": scaled.power,
    "minus": scaled.negative,
    "difference": scaled.difference,
    "expm1": lambda a: scaled.difference(a, Scaled(torch.zeros_like(a.log))),
    "logsumexp": scaled.total,
    "logmeanexp": lambda a, dim, keepdim, count: scaled.quotient(
        scaled.total(a, dim, keepdim), Scaled(a.log.new_full((), count).log())
    ),
    "logcumsumexp": scaled.running_total,
    "sum": scaled.multiplied,
    "cumsum": scaled.running_product,
    "logaddexp": scaled.added,
    "plus_constant": lambda a, constant: scaled.added(a, Scaled(a.log.new_full((), constant).log())),
}
# Of positive numbers these have a form of their own.
_OF_POSITIVE = (ops.LOGCUMSUMEXP, ops.SUM, ops.CUMSUM)
_WEIGHED = (ops.WEIGH, ops.WEIGH_REST, ops.FACTOR)
_SUMS_OF_TWO = (ops.LOGADDEXP, ops.PLUS_CONSTANT, ops.DIFFERENCE)
# The same, of what is no logarithm.
_OF_VALUES: dict[str, Callable[..., Scaled]] = {
    "between_sigmoids": scaled.between_sigmoids,
    "tanh": lambda x: Scaled(torch.zeros_like(x), torch.tanh(x)),
    "erf": lambda x: Scaled(torch.zeros_like(x), torch.erf(x)),
    "log_product": scaled.product_of,
}


@final
class _Evaluation:
    """One evaluation; terms that occur several times are computed once."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, private: bool, values: Sequence[Tensor] | None = None
    ) -> None:
        self._values = values
        self._dtype = dtype
        self._device = device
        self._private = private
        self._known: dict[Any, Any] = {}
        self._mantissas: dict[int, Mantissa] = {}

    def log(self, term: Term, private: bool | None = None) -> Tensor:
        """The logarithm of the number that a term stands for: for a leaf, the tensor itself."""
        private = self._private if private is None else private
        key = (id(term), private)
        if key not in self._known:
            self._known[key] = self._compute(term, private)
        value: Tensor = self._known[key]
        return value

    def _compute(self, term: Term, private: bool) -> Tensor:
        if isinstance(term, Leaf):
            value: Tensor = term.value if self._values is None else self._values[term.value]
            return (value if term.tracked else value.detach()).to(self._dtype, copy=private)
        if term.operator is ops.DIFFERENCE and not any(arg.signed for arg in term.args):
            return self._digits().logarithm_of_difference(term)
        if term.operator is ops.COMPLEMENT:
            return scaled.logarithm_of_complement(self.log(term.args[0]), self.scaled(term.args[1]))
        if term.signed and term.operator in _SUMS_OF_TWO:
            return scaled.logarithm_of_sum(*self._summands(term))
        if _by_factor(term):
            return scaled.logarithm(self.scaled(term))
        total = self._contraction(term)
        if total is not None:
            return total.log if total.factor is None else total.log + total.factor.log()
        if term.operator is ops.FULL:
            number = torch.full((), term.params["constant"], dtype=self._dtype, device=self._device)
            return number.log().expand(term.shape)
        if term.operator is ops.EXPONENTIAL:
            inner = term.args[0]
            weighed = _weighed_sigmoid(inner)
            if weighed is not None:
                weight, x = map(self.log, weighed)
                return weight * sigmoid(x)
            by_factor = isinstance(inner, Apply) and (inner.signed or _by_factor(inner))
            if not by_factor:
                return exponential(self.log(inner))
            shares = self._shares(inner)
            return scaled.number(self.scaled(inner)) if shares is None else shares
        saves_input = self._private and term.operator not in _SAVE_OUTPUT
        if term.operator.sign == "positive" and term.args[0].signed:
            args = [scaled.logarithm(self.scaled(term.args[0]), floor=True)]
        else:
            args = [self.log(arg, saves_input) for arg in term.args]
        result: Tensor = function(term.operator.function)(*args, **self._parameters(term))
        return result

    def _digits(self) -> Digits:
        # Not kept: it refers back to this, and a cycle would keep all of it alive.
        return Digits(self.log, self._parameters, self._contraction, self._mantissas)

    def _summands(self, term: Apply) -> list[Scaled]:
        if term.operator is ops.PLUS_CONSTANT:
            number = self.scaled(term.args[0])
            return [number, Scaled(number.log.new_full((), term.params["constant"]).log())]
        first, second = map(self.scaled, term.args)
        return [first, scaled.negative(second) if term.operator is ops.DIFFERENCE else second]

    def _shares(self, term: Term) -> Tensor | None:
        """The shares of a total of numbers with weights that are differentiated at; `None` where it is none."""
        dim = _dims_of_shares(term)
        if dim is None:
            return None
        assert isinstance(term, Apply)
        parts = self.scaled(term.args[0])
        differentiated = parts.factor is not None and is_differentiated(parts.factor)
        return scaled.shares(parts, dim) if differentiated else None

    def _contraction(self, term: Apply) -> Scaled | None:
        """A total of products in one go, where that can be had."""
        # In this order: in code that is compiled, sizes may be symbols.
        if (
            term.operator is not ops.LOGSUMEXP
            or not may_contract(self._dtype, self._device)
            or not is_contraction(term)
        ):
            return None
        products = term.args[0]
        assert isinstance(products, Apply)
        first, second = products.args
        number = self._factor(first)
        if products.operator is ops.WEIGH:
            weight = self.log(second)
            other = Scaled(torch.zeros_like(weight.detach()), weight)
        else:
            other = self._factor(second)
        return contraction(number, other, products.shape, term.params["dim"], term.params["keepdim"])

    def _factor(self, term: Term) -> Scaled:
        # Without derivatives, none saves the user's own tensor.
        return self.number(term) if torch.is_grad_enabled() else self.number(term, private=False)

    def _parameters(self, term: Apply) -> dict[str, Any]:
        return {name: filled_value(value, self._values) for name, value in term.params.items()}

    def number(self, term: Term, private: bool | None = None) -> Scaled:
        """The number that a term stands for, with a factor only where it needs one."""
        by_factor = isinstance(term, Apply) and (term.signed or _by_factor(term))
        return self.scaled(term) if by_factor else Scaled(self.log(term, private))

    def scaled(self, term: Term) -> Scaled:
        """The number that a term stands for."""
        key = id(term)
        if key not in self._known:
            self._known[key] = self._compute_scaled(term)
        value: Scaled = self._known[key]
        return value

    def _compute_scaled(self, term: Term) -> Scaled:
        if isinstance(term, Leaf):
            return Scaled(self.log(term))
        params = self._parameters(term)
        if term.operator.move:
            move = functools.partial(function(term.operator.function), **params)
            return scaled.moved(move, [self.scaled(arg) for arg in term.args])
        if term.operator in _WEIGHED:
            weight = self.log(term.args[1])
            return scaled.weighed(self.scaled(term.args[0]), 1 - weight if term.operator is ops.WEIGH_REST else weight)
        if term.operator is ops.DIFFERENCE and not any(arg.signed for arg in term.args):
            return self._digits().difference(term)
        if term.operator is ops.COMPLEMENT and term.signed:
            return self.scaled(term.args[0])
        x = _sigmoid_in(term) if term.signed else None
        if x is not None:
            weighed = self.scaled(term.args[0])
            return Scaled(weighed.log + torch.nn.functional.logsigmoid(self.log(x)), weighed.factor)
        total = self._contraction(term) if term.signed else None
        if total is not None:
            return total
        if term.operator.name in _OF_VALUES:
            return _OF_VALUES[term.operator.name](*map(self.log, term.args), **params)
        if term.operator.name in _SCALED and (term.signed or term.operator not in _OF_POSITIVE):
            return _SCALED[term.operator.name](*map(self.scaled, term.args), **params)
        return Scaled(self.log(term))


def _sigmoid_in(term: Term) -> Term | None:
    """The x of p / (1 + e^-x), which is p sigmoid(x)."""
    below = term.args[1] if isinstance(term, Apply) and term.operator is ops.SUBTRACT else None
    if not isinstance(below, Apply) or below.operator is not ops.PLUS_CONSTANT or below.signed:
        return None
    return negate(below.args[0]) if below.params["constant"] == 1.0 else None


def _weighed_sigmoid(term: Term) -> tuple[Term, Term] | None:
    """The w and the x of w / (1 + e^-x)."""
    x = _sigmoid_in(term)
    above = term.args[0] if isinstance(term, Apply) and x is not None else None
    if x is None or not isinstance(above, Apply) or above.operator is not ops.WEIGH:
        return None
    return (above.args[1], x) if constant_of(above.args[0]) == 1.0 else None


def _dims_of_shares(term: Term) -> tuple[int, ...] | None:
    """The dims that are totalled in p / sum p."""
    if not isinstance(term, Apply) or term.operator is not ops.SUBTRACT or not term.args[0].signed:
        return None
    part, total = term.args
    if not isinstance(total, Apply) or total.operator is not ops.LOGSUMEXP or total.args[0] != part:
        return None
    dim: tuple[int, ...] = total.params["dim"]
    return dim if total.params["keepdim"] or dim == tuple(range(len(dim))) else None


def _by_factor(term: Apply) -> bool:
    """Whether a number has to be computed as a factor times an exponential, or is better so: shares of a total of others."""
    if not term.operator.function:
        return True
    if term.operator is ops.SUBTRACT:
        return term.signed or any(is_sum(core(arg)) for arg in term.args)
    return term.signed and (term.operator.move or term.operator.name in _SCALED)


_SAVE_OUTPUT = (ops.LOG_SOFTMAX, ops.SOFTMAX)


def _is_straight(term: Term) -> bool:
    """Whether it is one function of another, nothing of which is a special case, or needed twice."""
    seen: set[int] = set()
    stack = [term]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            return False
        seen.add(id(part))
        if isinstance(part, Apply):
            if part.operator in (ops.DIFFERENCE, ops.FULL, ops.EXPONENTIAL) or part.signed or _by_factor(part):
                return False
            if is_contraction(part):
                return False
            stack.extend(part.args)
    return True


def _straight(term: Term, dtype: torch.dtype, copied: bool) -> Program:
    if isinstance(term, Leaf):
        place, tracked = term.value, term.tracked
        if not copied and tracked:
            return lambda values: values[place].to(dtype)
        return lambda values: (values[place] if tracked else values[place].detach()).to(dtype, copy=copied)
    call = function(term.operator.function)
    args = [_straight(arg, dtype, term.operator not in _SAVE_OUTPUT) for arg in term.args]
    first, params, leaves = args[0], term.params, Apply(term.operator, (), term.shape, **term.params).leaves
    if leaves:
        return lambda values: call(
            *[arg(values) for arg in args], **{name: filled_value(value, values) for name, value in params.items()}
        )
    if len(args) == 1:
        return lambda values: call(first(values), **params)
    return lambda values: call(*[arg(values) for arg in args], **params)


def _widest(start: torch.dtype, others: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, others, torch.promote_types(start, torch.float32))
