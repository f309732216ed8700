"""What to do about an incident: pydantic models, read from YAML. Imports neither torch nor lightning.

Keys that a later version will bring are refused by name until they do something: a guard whose settings are silently
    ignored is worse than none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from nanguard.errors import PolicyError
from nanguard.incident import Cause, Trigger
from nanguard.policy_errors import check_keys, describe, pattern_problem
from nanguard.policy_values import Amount, Count, Folder, Step, Version

__all__ = ["Budget", "Policy", "Rule", "RuleAction", "Watch", "When", "load_policy", "with_overrides"]

_CONSTRUCTOR = "Policy(...)"

RuleAction = Literal["raise", "skip_step", "record", "stop"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Stabilize(_Section):
    """The stabiliser around the training step.

    Attributes:
        enabled: whether unstable computations are replaced while they run.
        epsilon: ``keep`` preserves the value of ``log(p + eps)``; ``drop`` computes ``log p`` itself.
        saturated: ``report`` tells where torch's own bounds on probabilities change a loss; ``repair`` leaves them out.
    """

    enabled: StrictBool = True
    epsilon: Literal["keep", "drop"] = "keep"
    saturated: Literal["report", "repair"] = "report"


class When(_Section):
    """Which incidents a rule is for; a part left out matches everything.

    Attributes:
        trigger: one or more of the triggers of an incident.
        cause: one or more of its causes.
        steps: first and last optimizer step (both included); `None` leaves an end open.
    """

    trigger: tuple[Trigger, ...] | None = None
    cause: tuple[Cause, ...] | None = None
    steps: tuple[Step | None, Step | None] | None = None

    @field_validator("trigger", "cause", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("steps")
    @classmethod
    def _ordered(cls, steps: tuple[int | None, int | None] | None) -> tuple[int | None, int | None] | None:
        if steps is not None and None not in steps and steps[0] > steps[1]:  # type: ignore[operator]
            raise ValueError("the first step must not come after the last")
        return steps

    def matches(self, *, trigger: str, cause: str, step: int) -> bool:
        """Whether an incident with this trigger and cause at this step is one the rule is for."""
        first, last = self.steps or (None, None)
        return (
            (self.trigger is None or trigger in self.trigger)
            and (self.cause is None or cause in self.cause)
            and (first is None or step >= first)
            and (last is None or step <= last)
        )


class Rule(_Section):
    """An action and the incidents that it is for.

    Attributes:
        when: the incidents; without it the rule matches every one.
        action: ``raise`` ends the run with a `NonFiniteError`; ``skip_step`` leaves the batch out as if it had never
            been in the data; ``record`` writes it down and lets the step happen; ``stop`` leaves the batch out and
            ends the run in order.
    """

    when: When = When()
    action: RuleAction


class Budget(_Section):
    """How many steps may be skipped before skipping counts as the failure that it hides.

    Attributes:
        consecutive: skips in a row that are tolerated.
        total: skips in the whole run that are tolerated.
        then: what happens at the next one.
    """

    consecutive: Count = 5
    total: Count = 100
    then: Literal["raise", "stop"] = "raise"


class Diagnosis(_Section):
    """The autopsy of a failed step.

    Attributes:
        enabled: re-run the failed step once, without a trace, to find the origin.
        samples: find the samples at fault by re-running parts of the batch.
        counterfactuals: re-run the step in other circumstances too (float64, the stabiliser, once more), for evidence.
    """

    enabled: StrictBool = True
    samples: StrictBool = True
    counterfactuals: StrictBool = True


class Watch(_Section):
    """Hooks on modules, and the validation step.

    Attributes:
        modules: patterns over the qualified names of modules, as those of a shell (``decoder.*``, ``*`` for all, ``""`` for the
            root where it is called); each must match when the fit begins, and matches what comes later, too.
        every_n_steps: the modules are watched in the first optimizer step, and in every so many-th after it.
        validation: whether what `validation_step` returns and logs inside ``fit`` is looked at, too.
        infinities: which infinities in activations count as bad beside NaN. ``positive`` is the default, because -inf is how
            masks are written; ``none`` is for models that use +inf on purpose, too; ``all`` counts both. In gradients both do.
    """

    modules: tuple[str, ...] = ()
    every_n_steps: StrictInt = Field(default=50, ge=1)
    validation: StrictBool = False
    infinities: Literal["none", "positive", "all"] = "positive"

    @field_validator("modules", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        patterns = (value,) if isinstance(value, str) else value
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(
                f"found {value!r}; expected patterns over qualified names of modules, such as ['decoder.*'], or [] for none"
            )
        return patterns

    @field_validator("modules")
    @classmethod
    def _patterns(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in modules:
            if problem := pattern_problem(pattern):
                raise ValueError(
                    f"found {pattern!r}, {problem}; expected a pattern over qualified names of modules, such as 'decoder.*'"
                )
        return modules


class CapturePolicy(_Section):
    """What is written to disk.

    Attributes:
        enabled: whether failed batches are captured.
        directory: folder of the captures, relative to the working directory.
        model: store parameters and buffers, so that the replay is bit-exact.
        optimizer: store the optimizer's state too.
        max_count: captures in the folder after which no more are written.
        max_gib: size of the folder in GiB after which no more are written.
    """

    enabled: StrictBool = True
    directory: Folder = Path("nanguard_captures")
    model: StrictBool = True
    optimizer: StrictBool = False
    max_count: Count = 20
    max_gib: Amount = 10


class Scaler(_Section):
    """When the skips of a GradScaler, which are part of its work, become an incident.

    Attributes:
        max_consecutive_skips: skips in a row that are tolerated.
        min_scale: the loss scale below which scaling has failed.
    """

    max_consecutive_skips: StrictInt = Field(default=20, ge=1)
    min_scale: Amount = 1.0


class Policy(_Section):
    """The whole policy; every key has a default, and the default captures and raises.

    Raises:
        PolicyError: naming each key that cannot be used, its value and what is allowed.
    """

    version: Version = 1
    stabilize: Stabilize = Stabilize()
    rules: tuple[Rule, ...] = (Rule(action="raise"),)
    budget: Budget = Budget()
    accumulation: Literal["window"] = "window"
    hold_global_step: StrictBool = False
    diagnosis: Diagnosis = Diagnosis()
    watch: Watch = Watch()
    capture: CapturePolicy = CapturePolicy()
    scaler: Scaler = Scaler()

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PolicyError(describe(error, type(self), _CONSTRUCTOR)) from None

    @model_validator(mode="after")
    def _rules_can_match(self) -> Policy:
        for position, rule in enumerate(self.rules[:-1]):
            if rule.when == When():
                raise ValueError(
                    f"rules[{position}] matches every incident, so the rules after it can never be reached"
                )
        return self

    @classmethod
    def parse(cls, data: Any, *, where: str = "policy") -> Policy:
        """Builds a policy from plain data, such as parsed YAML.

        Raises:
            PolicyError: naming `where`, the key, the value and what is allowed.
        """
        check_keys(data, where)
        try:
            return cls.model_validate({} if data is None else data)
        except PolicyError as error:
            raise PolicyError(str(error).replace(_CONSTRUCTOR, where, 1)) from None
        except ValidationError as error:
            raise PolicyError(describe(error, cls, where)) from None

    def action(self, *, trigger: str, cause: str, step: int) -> RuleAction:
        """The action of the first rule that matches; ``raise`` where none does."""
        for rule in self.rules:
            if rule.when.matches(trigger=trigger, cause=cause, step=step):
                return rule.action
        return "raise"

    def may_continue(self) -> bool:
        """Whether any rule lets the run go on without the batch, so that a step must be able to be undone."""
        return any(rule.action in ("skip_step", "stop") for rule in self.rules)

    def stores_weights(self) -> bool:
        """Whether a capture holds the weights, which then have to be those from before the step."""
        return self.capture.enabled and self.capture.model

    def to_yaml(self) -> str:
        """The effective policy, defaults included, as YAML that `load_policy` reads back."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_policy(path: str | Path) -> Policy:
    """Reads a policy from a YAML file.

    Raises:
        PolicyError: where the file is missing, is no YAML, repeats a key, or holds an unknown key or value; the
            message names the file, the key, the value and what is allowed.
    """
    from nanguard.policy_errors import read_yaml

    return Policy.parse(read_yaml(Path(path)), where=str(path))


def with_overrides(
    policy: Policy, *, action: str | None = None, captures: str | Path | None = None, stabilize: bool | None = None
) -> Policy:
    """The policy with the commonest settings replaced.

    Args:
        policy: what to start from.
        action: one action for every incident.
        captures: directory of the captures.
        stabilize: whether the stabiliser is on.

    Raises:
        PolicyError: where a value is not allowed.
    """
    data = policy.model_dump()
    if action is not None:
        data["rules"] = [{"action": action}]
    if captures is not None:
        data["capture"] = {**data["capture"], "directory": captures}
    if stabilize is not None:
        data["stabilize"] = {**data["stabilize"], "enabled": stabilize}
    return Policy.parse(data, where="NanGuard(...)")
