"""The autopsy of a failed step: the operation, the cause and the samples, from second runs that leave no trace."""

from nanguard.diagnosis.autopsy import Diagnosis, diagnose, suspects
from nanguard.diagnosis.batches import batch_size, dimension_of, take
from nanguard.diagnosis.ends import Ends, bad_elements
from nanguard.diagnosis.rerun import MicroBatch, Outcome, Parts, Rerun

__all__ = [
    "Diagnosis",
    "Ends",
    "MicroBatch",
    "Outcome",
    "Parts",
    "Rerun",
    "bad_elements",
    "batch_size",
    "diagnose",
    "dimension_of",
    "suspects",
    "take",
]
