"""Hooks on chosen modules, in every n-th step: the first bad module forward and backward, and the ranges of activations."""

from nanguard.watching.matching import matched_modules
from nanguard.watching.results import StepResults, infinities_of, loss_in
from nanguard.watching.watch import ModuleWatch, Sighting

__all__ = ["ModuleWatch", "Sighting", "StepResults", "infinities_of", "loss_in", "matched_modules"]
