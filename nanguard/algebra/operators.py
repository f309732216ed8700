"""The operators that terms consist of, and how each is computed and written.

A term stands for a number. Most operators give the logarithm of theirs; the *signed* ones (`WEIGH`, `MINUS`, `DIFFERENCE`,
`TANH`, `ERF`, `PRODUCT`, `POWER`, `FACTOR`) stand for numbers that may be negative, and are computed as a factor times an
exponential.
"""

from __future__ import annotations

from nanguard.algebra.term import Operator

_STABLE = "nanguard.stabilizer.functional"
_SPECIAL = "nanguard.stabilizer.special"

# Products and powers.
ADD = Operator("add", "torch.add", "{0} + {1}", infix=True)
SUBTRACT = Operator("subtract", "torch.sub", "{0} - {1}", infix=True)
NEGATE = Operator("negate", "torch.neg", "-{0}", infix=True)
SCALE = Operator("scale", "torch.mul", "{other} * {0}", infix=True)
SHIFT = Operator("shift", "torch.add", "{0} + {other}", infix=True)
SUM = Operator("sum", "torch.sum", "{0}.sum({dim}, keepdim={keepdim})")
CUMSUM = Operator("cumsum", "torch.cumsum", "{0}.cumsum({dim})")

# Functions with a name.
LOG_SOFTMAX = Operator(
    "log_softmax", "torch.nn.functional.log_softmax", "F.log_softmax({0}, dim={dim})", fresh=False, sign="positive"
)
LOG_SIGMOID = Operator("logsigmoid", "torch.nn.functional.logsigmoid", "F.logsigmoid({0})", sign="positive")
LOG_NDTR = Operator("log_ndtr", f"{_SPECIAL}.log_ndtr", "torch.special.log_ndtr({0})", sign="positive")
LOG_OTHERS = Operator("log_others", f"{_STABLE}.log_others", "log_sum_of_others({0}, dim={dim})")
LOG_REST = Operator("log_rest", f"{_STABLE}.log_rest", "torch.log1p(-F.softmax({0}, dim={dim}))")
SOFTMAX = Operator("softmax", "torch.nn.functional.softmax", "F.softmax({0}, dim={dim})", fresh=False)
SIGMOID = Operator("sigmoid", f"{_STABLE}.sigmoid", "torch.sigmoid({0})", fresh=False)
EXPONENTIAL = Operator("exponential", f"{_STABLE}.exponential", "torch.exp({0})", fresh=False)

# Products of a number and its logarithm.
XLOGY = Operator("xlogy", f"{_STABLE}.xlogy", "{1} * {0}", infix=True)
ENTR = Operator("entr", f"{_STABLE}.entr", "-{0}.exp() * {0}", infix=True)
BINARY_CROSS_ENTROPY = Operator(
    "binary_cross_entropy", f"{_STABLE}.binary_cross_entropy", "-({2} * {0} + (1 - {2}) * {1})", infix=True
)

# How far, and how close, p is to t, given log p, log(1 - p) and t.
DISTANCE = Operator("distance", f"{_SPECIAL}.distance", "torch.log(abs({2} - torch.exp({0})))", sign="positive")
CLOSENESS = Operator("closeness", f"{_SPECIAL}.closeness", "torch.where({2} == 1, {0}, {1})", sign="positive")

# Sums.
LOGSUMEXP = Operator("logsumexp", f"{_STABLE}.logsumexp", "torch.logsumexp({0}, dim={dim}, keepdim={keepdim})")
LOGMEANEXP = Operator(
    "logmeanexp",
    f"{_STABLE}.logmeanexp",
    "torch.logsumexp({0}, dim={dim}, keepdim={keepdim}) - math.log({count})",
    infix=True,
)
LOGCUMSUMEXP = Operator("logcumsumexp", f"{_STABLE}.logcumsumexp", "torch.logcumsumexp({0}, dim={dim})")
LOGADDEXP = Operator("logaddexp", f"{_STABLE}.logaddexp", "torch.logaddexp({0}, {1})")
PLUS_CONSTANT = Operator(
    "plus_constant", f"{_STABLE}.plus_constant", "torch.logaddexp({0}, torch.tensor({constant}).log())"
)
SCATTER_ADD = Operator(
    "scatter_logaddexp", f"{_STABLE}.scatter_logaddexp", "{0}.exp().scatter_add({dim}, {index}, {1}.exp()).log()"
)

NAN_TO_ZERO = Operator("nan_to_zero", f"{_SPECIAL}.nan_to_zero", "{0}.nan_to_num(nan=-math.inf)", sign="positive")

# Bounds, extrema and masks.
FLOOR_ZERO = Operator("floor_zero", f"{_STABLE}.floor_zero", "{0}", sign="positive")
CLAMP_MIN = Operator("clamp_min", f"{_STABLE}.clamp_min", "{0}.clamp(min=math.log({constant}))", sign="positive")
CLAMP_MAX = Operator("clamp_max", f"{_STABLE}.clamp_max", "{0}.clamp(max=math.log({constant}))")
AMAX = Operator("amax", "torch.amax", "{0}.amax({dim}, keepdim={keepdim})", fresh=False)
AMIN = Operator("amin", "torch.amin", "{0}.amin({dim}, keepdim={keepdim})", fresh=False)
EXTREME = Operator("extreme", f"{_STABLE}.extreme", "{0}.max({dim}, {keepdim}).values")
SORTED = Operator("sort", f"{_STABLE}.sort", "{0}.sort({dim}, {descending}).values")
TOPK = Operator("topk", f"{_STABLE}.topk", "{0}.topk({k}, {dim}).values")
WITHOUT_TOP = Operator(
    "without_top",
    f"{_STABLE}.without_top",
    "{0}.scatter({dim}, {0}.topk({k}, {dim}, {largest}).indices, -math.inf)",
)
PADDED = Operator("pad", f"{_STABLE}.pad", "F.pad({0}, {pad}, value={value})")
SET_ITEM = Operator("set_item", f"{_STABLE}.set_item", "{0}.index_put({key}, {value})")
FILLED_DIAGONAL = Operator("fill_diagonal", f"{_STABLE}.fill_diagonal", "{0}.fill_diagonal({value})")
TRIANGLE = Operator("triangle", f"{_STABLE}.triangle", "{0}.masked_fill(outside_of_triangle, -math.inf)")
ON_DIAGONAL = Operator("on_diagonal", f"{_STABLE}.on_diagonal", "{0}.exp().diag_embed({offset}, {dim1}, {dim2}).log()")
LOGADDEXP_AT = Operator(
    "index_logaddexp", f"{_STABLE}.index_logaddexp", "{0}.exp().index_add({dim}, {index}, {1}.exp()).log()"
)
LOG_TAIL = Operator("log_tail", f"{_STABLE}.log_tail", "torch.log1p(-F.softmax({0}, {dim}).cumsum({dim}))")
SCATTER_EXTREME = Operator(
    "scatter_extreme", f"{_SPECIAL}.scatter_extreme", "{0}.scatter_reduce({dim}, {index}, {1}, {reduce})", fresh=False
)
MAXIMUM = Operator("maximum", "torch.maximum", "torch.maximum({0}, {1})")
MINIMUM = Operator("minimum", "torch.minimum", "torch.minimum({0}, {1})")
MASKED = Operator("masked_fill", "torch.masked_fill", "{0}.masked_fill({mask}, {value})")
WHERE = Operator("where", f"{_STABLE}.where", "torch.where({condition}, {0}, {1})")
FULL = Operator("full", f"{_STABLE}.full", "math.log({constant})", sign="positive")

# 1 - p, as a sum that has all its digits but close to 1; where p is small, it is computed from p.
COMPLEMENT = Operator("complement", "", "{0}", infix=True, sign="as first")

# Numbers of either sign.
WEIGH = Operator("weigh", "", "{0} + torch.log({1})", infix=True, sign="any")
WEIGH_REST = Operator("weigh_rest", "", "{0} + torch.log(1 - {1})", infix=True, sign="any")
# What is left of a number of either sign whose exponential is given: nobody has weighed anything.
FACTOR = Operator("factor", "", "{0} + torch.log({1})", infix=True, sign="any")
MINUS = Operator("minus", "", "{0}", sign="any")
DIFFERENCE = Operator("difference", "", "{0} + torch.log(-torch.expm1({1} - ({0})))", infix=True, sign="any")
EXPM1 = Operator("expm1", "", "{0} + torch.log(-torch.expm1(-({0})))", infix=True, sign="any")
BETWEEN = Operator(
    "between_sigmoids",
    "",
    "F.logsigmoid({0}) + F.logsigmoid(-({1})) + torch.log(-torch.expm1({1} - ({0})))",
    infix=True,
    sign="any",
)
ERF = Operator("erf", "", "torch.log(torch.erf({0}))", sign="any")
TANH = Operator("tanh", "", "torch.log(torch.tanh({0}))", sign="any")
PRODUCT = Operator("log_product", "", "torch.log({0}).sum({dim}, keepdim={keepdim})", sign="any")
POWER = Operator("power", "", "{exponent} * {0}", infix=True, sign="positive")

# Elements moved, picked or repeated: the logarithm commutes with these, and so does everything else that is elementwise.
EXPAND = Operator("expand", "torch.broadcast_to", "{0}.expand({size})", fresh=False, move=True)
RESHAPE = Operator("reshape", f"{_STABLE}.reshape", "{0}.reshape({sizes})", fresh=False, move=True)
PERMUTE = Operator("permute", "torch.permute", "{0}.permute({dims})", fresh=False, move=True)
NARROW = Operator("narrow", "torch.narrow", "{0}.narrow({dim}, {start}, {length})", fresh=False, move=True)
SELECT = Operator("select", "torch.select", "{0}.select({dim}, {index})", fresh=False, move=True)
INDEX = Operator("index", f"{_STABLE}.index", "{0}[{key}]", fresh=False, move=True)
DIAGONAL = Operator("diagonal", "torch.diagonal", "{0}.diagonal({offset}, {dim1}, {dim2})", fresh=False, move=True)
GATHER = Operator("gather", "torch.gather", "{0}.gather({dim}, {index})", move=True)
TAKE_ALONG_DIM = Operator(
    "take_along_dim", "torch.take_along_dim", "torch.take_along_dim({0}, {indices}, {dim})", move=True
)
INDEX_SELECT = Operator("index_select", "torch.index_select", "{0}.index_select({dim}, {index})", move=True)
MASKED_SELECT = Operator("masked_select", "torch.masked_select", "{0}[{mask}]", move=True)
TAKE = Operator("take", "torch.take", "{0}.take({index})", move=True)
FLIP = Operator("flip", "torch.flip", "{0}.flip({dims})", move=True)
ROLL = Operator("roll", "torch.roll", "{0}.roll({shifts}, {dims})", move=True)
REPEAT = Operator("repeat", "torch.tile", "{0}.repeat({dims})", move=True)
REPEAT_INTERLEAVE = Operator(
    "repeat_interleave", "torch.repeat_interleave", "{0}.repeat_interleave({repeats}, {dim})", move=True
)
UNFOLD = Operator("unfold", "torch.Tensor.unfold", "{0}.unfold({dimension}, {size}, {step})", fresh=False, move=True)
WRITTEN = Operator("written", f"{_STABLE}.written", "{1}.index_put({key}, {0})", move=True)
CAT = Operator("cat", f"{_STABLE}.cat", "torch.cat([{all}], dim={dim})", move=True)
STACK = Operator("stack", f"{_STABLE}.stack", "torch.stack([{all}], dim={dim})", move=True)

# Of what is not known yet, or not by itself: other laws than those that finish it see a tensor that nothing is known of.
EMPTY = Operator("empty", "", "{0}", sign="any")
FILLING = Operator("filling", "", "{0}", sign="any")
OFFSET = Operator("offset", "", "{0}", sign="any")
# Of a tensor that is a logarithm itself: its exponential.
LOGARITHM = Operator("logarithm", "", "{0}", sign="any")
NORMALISED = Operator("normalised", "", "", sign="any")
UNFINISHED = frozenset({EMPTY, FILLING, OFFSET, LOGARITHM, NORMALISED})
