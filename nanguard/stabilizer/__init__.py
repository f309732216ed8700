"""Front ends of the algebra. Eager code: `stabilize`."""

from nanguard.stabilizer.context import stabilize
from nanguard.stabilizer.watch import has_unstable_ops

__all__ = ["has_unstable_ops", "stabilize"]
