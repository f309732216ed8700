"""What is known about a tensor's logarithm: terms, and the laws and rules about them. Free of torch.

The semantics, in full:

1. What is known about a tensor p is a *term*: a symbolic expression for log p whose leaves are other tensors.
2. A *source* (exp, softmax, sigmoid) makes a term from any tensor: log exp(x) = x.
3. A *step* (product, quotient, sum, indexing, cast, ...) makes the term of its result from the terms of its operands.
   Whatever is no step, or does not fit one exactly, yields a tensor about which nothing is known.
4. A *query* (log, log2, ...) of a tensor with a term is computed from the term instead, if a *rule* names the pattern.
5. A *quotient* whose term has a stable exponential (softmax, sigmoid) is computed by that, if a rule names the pattern.
6. A term's value is a function of its leaves as they were when it was made. Front ends see to it that they still are.

Each front end (eager code, compiled graphs, source) turns a call into a `Call`, asks the law, and computes or writes the term.
"""

from nanguard.algebra.call import Call, Operand
from nanguard.algebra.registry import Law, Names, Rule, laws, lookup, match, misuses, rules
from nanguard.algebra.spelling import Spelling
from nanguard.algebra.term import Apply, Leaf, Operator, Shape, Term, Unrecognised, untracked

__all__ = [
    "Apply",
    "Call",
    "Law",
    "Leaf",
    "Names",
    "Operand",
    "Operator",
    "Rule",
    "Shape",
    "Spelling",
    "Term",
    "Unrecognised",
    "laws",
    "lookup",
    "match",
    "misuses",
    "rules",
    "untracked",
]
