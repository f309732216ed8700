"""Values that were bad before the step, and what could not be explained."""

from __future__ import annotations

from nanguard.diagnosis.table.entry import Entry

__all__ = ["OUTSIDE"]


OUTSIDE: tuple[Entry, ...] = (
    Entry(
        "bad_input",
        (),
        "{tensor} holds {counts} before the model sees it. Clean or drop these samples in the dataset.",
    ),
    Entry(
        "parameters",
        (),
        "{tensor} is non-finite already, and running statistics take in every batch of training: look at what it was given in "
        "an earlier one. Load an older checkpoint, or reset the statistics.",
        facts=("statistics",),
    ),
    Entry(
        "parameters",
        (),
        "{tensor} is non-finite already, and no optimizer steps it: look at the code that assigns or updates it. Load an older "
        "checkpoint, or compute it again.",
        facts=("state",),
    ),
    Entry(
        "parameters",
        (),
        "{tensor} is non-finite already, so an earlier step did the damage. Load an older checkpoint, and look at the "
        "learning rate and the gradient norms before this step.",
    ),
    Entry(
        "unknown",
        (),
        "`{line}` gave something non-finite that its inputs do not explain. Look for a NaN or an infinity in the source.",
    ),
    Entry(
        "transient",
        (),
        "A second run of the same step came out finite. Suspect the hardware, or code with state or random numbers of its own.",
    ),
)
