"""The autopsy of a failed step: the operation, the cause and the samples, from second runs that leave no trace."""

from nanguard.diagnosis.autopsy import diagnose
from nanguard.diagnosis.batches import batch_size, dimension_of, has_rows, take
from nanguard.diagnosis.cutting import Parts
from nanguard.diagnosis.ends import Ends, bad_elements
from nanguard.diagnosis.rerun import MicroBatch, Outcome, Rerun
from nanguard.diagnosis.suspects import Diagnosis, suspects

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
    "has_rows",
    "suspects",
    "take",
]
