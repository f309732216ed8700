"""Bugs as people write them, one in each module, and healthy modules with infinities that are meant.

Importing a family fills `BUGS` and `CONTROLS`. The line at fault carries the comment ``# <- here``.
"""

from __future__ import annotations

import importlib
import pkgutil

from zoo.base import BUGS, CONTROLS, Bug, Control

__all__ = ["BUGS", "CONTROLS", "Bug", "Control"]

for family in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{family.name}")
