"""What to do about a failure, by cause and operation. Data: to add advice is to add a line.

The first entry whose cause, operations, phase and facts fit is taken. Fields in braces: `op`, `tensor`, `counts`, `largest`,
`dtype`, `line` (the line to change, or the operation where there is none), and the texts of the facts that the entry asks for.
An entry stands in the file of its cause. A rule's code is explained by ``nanguard rule``, the facts by
`nanguard.diagnosis.facts` and `nanguard.diagnosis.traits`.
"""

from __future__ import annotations

from nanguard.diagnosis.table.absences import ABSENCES
from nanguard.diagnosis.table.entry import Entry
from nanguard.diagnosis.table.outside import OUTSIDE
from nanguard.diagnosis.table.ranges import RANGES
from nanguard.diagnosis.table.zeros import ZEROS

__all__ = ["ADVICE", "Entry"]

ADVICE: tuple[Entry, ...] = (*OUTSIDE, *ZEROS, *RANGES, *ABSENCES)
