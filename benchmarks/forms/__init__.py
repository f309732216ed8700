"""A zoo of forms: the ways people really write unstable losses, each with an exact reference, and innocents that look alike.

A *form* is a short function of tensors as research code has it, with a reference in stable functions that is evaluated in
float64. Its mild inputs prove the reference (naive and stable agree in float64), its extreme inputs break the naive float32
code, in value or gradient. An *innocent* must stay bit-identical under `nanguard.stabilize()`, and no swap may be reported. A
*twin* differs from an unstable form by one dimension, one in-place edit or one keepdim, and means something else: it may be
touched, but has to keep its meaning.

    python benchmarks/forms --failures                 # what `nanguard.stabilize()` gets wrong in eager mode, in seconds
    python benchmarks/forms --failures --family focal  # of one family; or --only NAME (a part of the name)
    python benchmarks/forms --output docs/forms.md     # the table: torch and nanguard, eager and compiled
"""

from __future__ import annotations

import importlib
import pkgutil

from forms import families
from forms.registry import FORMS, INNOCENTS, TWINS, Form, Innocent

__all__ = ["FORMS", "INNOCENTS", "TWINS", "Form", "Innocent"]

for found in sorted(pkgutil.iter_modules(families.__path__), key=lambda module: module.name):
    importlib.import_module(f"forms.families.{found.name}")
