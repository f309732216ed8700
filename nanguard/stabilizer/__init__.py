"""Front ends of the algebra. Eager code, and what is compiled there: `stabilize`. Compiled code alone: `compile_backend`."""

from nanguard.stabilizer.compiled.backend import compile_backend
from nanguard.stabilizer.context import stabilize
from nanguard.stabilizer.unstable_ops import has_unstable_ops

__all__ = ["compile_backend", "has_unstable_ops", "stabilize"]
