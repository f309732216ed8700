"""Policies: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanguard import NanGuardError, Policy, PolicyError, load_policy
from nanguard.policy import with_overrides

CONFIGS = Path(__file__).parent.parent / "configs"


def policy_from(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return load_policy(path)


def error_from(tmp_path, text):
    with pytest.raises(PolicyError) as caught:
        policy_from(tmp_path, text)
    return str(caught.value).replace(str(tmp_path), "DIR")


def test_defaults_capture_and_raise():
    policy = Policy()
    assert policy.action(trigger="loss", cause="unknown", step=0) == "raise"
    assert policy.capture.enabled
    assert policy.stabilize.enabled
    assert not policy.may_continue()


@pytest.mark.parametrize("name", ["default", "survive", "pretraining", "debug"])
def test_shipped_policies_load_and_round_trip(name, tmp_path):
    policy = load_policy(CONFIGS / f"{name}.yaml")
    assert policy_from(tmp_path, policy.to_yaml()) == policy


def test_an_empty_file_is_the_default_policy(tmp_path):
    assert policy_from(tmp_path, "# nothing\n") == Policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stablize: {enabled: true}",
            "DIR/policy.yaml: 1 thing in this policy cannot be used\n  stablize: unknown key; allowed here: version, "
            "stabilize, rules, budget, accumulation, hold_global_step, diagnosis, watch, capture, scaler. Did you mean "
            "'stabilize'?",
        ),
        (
            "rules: [{action: skip}]",
            "DIR/policy.yaml: 1 thing in this policy cannot be used\n  rules[0].action: found 'skip'; expected one of "
            "'raise', 'skip_step', 'record', 'stop'. Did you mean 'skip_step'?",
        ),
        (
            "budget: {consecutive: -1}",
            "DIR/policy.yaml: 1 thing in this policy cannot be used\n  budget.consecutive: found -1; expected greater than "
            "or equal to 0",
        ),
        (
            "rollback: {keep: 2}",
            "DIR/policy.yaml: 1 thing in this policy cannot be used\n  rollback: this version does not do that yet; "
            "use skip_step, or remove the key",
        ),
        (
            "rules: [{action: rollback}]",
            "DIR/policy.yaml: 1 thing in this policy cannot be used\n  rules[0].action: found 'rollback', which this "
            "version does not do yet; use skip_step",
        ),
        (
            "capture: 3",
            "DIR/policy.yaml: 1 thing in this policy cannot be used\n  capture: found 3; expected a mapping of keys to values",
        ),
        (
            "on: 4",
            "DIR/policy.yaml: found the key True; expected text (YAML reads the bare words on, off, yes and no as truth "
            "values); put it in quotes, or remove it",
        ),
    ],
)
def test_errors_name_the_key_the_value_and_what_is_allowed(tmp_path, text, message):
    assert error_from(tmp_path, text) == message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rules: [{when: {trigger: [losss]}, action: raise}]", ["rules[0].when.trigger[0]", "'losss'", "'loss'"]),
        ("rules: [{when: {steps: [5, 1]}, action: raise}]", ["rules[0].when.steps", "first step"]),
        ("rules: [{when: {cause: nonsense}, action: raise}]", ["cause", "'nonsense'", "'bad_input'"]),
        ("rules: [{action: raise}, {action: skip_step}]", ["rules[0] matches every incident"]),
        ("- 1\n- 2", ["the file", "mapping"]),
        ("just text", ["the file", "mapping"]),
        ("version: 2", ["version", "found 2"]),
        ("capture: {directory: a}\ncapture: {directory: b}", ["'capture'", "twice"]),
        ("stabilize: {enabled: maybe}", ["stabilize.enabled", "'maybe'"]),
        ("stabilize: {saturated: raise}", ["stabilize.saturated", "'raise'", "'report', 'repair'"]),
        ("accumulation: micro_batch", ["accumulation", "micro_batch", "use window"]),
        ("budget: {total: .nan}", ["budget.total"]),
        ("watch: {every_n_steps: 0}", ["watch.every_n_steps: found 0", "greater than or equal to 1"]),
        ("watch: {every_n_steps: often}", ["watch.every_n_steps: found 'often'", "integer"]),
        ("watch: {validation: 1}", ["watch.validation: found 1"]),
        ("watch: {every_n_steps: true}", ["watch.every_n_steps: found True", "integer"]),
        ("watch: {every_n_steps: '5'}", ["watch.every_n_steps: found '5'", "integer"]),
        ("budget: {consecutive: true}", ["budget.consecutive: found True", "integer"]),
        ("capture: {max_gib: off}", ["capture.max_gib: found False", "expected a number"]),
        ("rules: [{when: {steps: [no, yes]}, action: raise}]", ["rules[0].when.steps[0]: found False", "a number"]),
        ("version: yes", ["version: found True", "expected a number"]),
        ("capture: {directory: ''}", ["capture.directory: found ''", "a folder"]),
        ('capture: {directory: "a\\0b"}', ["capture.directory", "null character"]),
        ("watch: {modules: 3}", ["watch.modules: found 3", "patterns over qualified names of modules"]),
        ("watch: {modules: [3]}", ["watch.modules: found [3]", "patterns over qualified names", "'decoder.*'"]),
        ("watch: {modules: }", ["watch.modules: found None", "patterns over qualified names", "[] for none"]),
        ("watch: {modules: [' decoder']}", ["watch.modules: found ' decoder', with spaces around it", "'decoder.*'"]),
        ("watch: {modules: ['decoder..attn']}", ["watch.modules: found 'decoder..attn', with an empty name"]),
        ("watch: {modules: ['decoder.[0']}", ["with a bracket that is not closed"]),
        ("watch: {infinities: negative}", ["watch.infinities: found 'negative'", "'none', 'positive', 'all'"]),
        ("watch: {module: [a]}", ["watch.module: unknown key", "Did you mean 'modules'?"]),
        ("a: [", ["not valid YAML"]),
        ("a: !!python/object/apply:os.system [echo]", ["not valid YAML"]),
        ("{" * 3000, ["nested too deeply"]),
    ],
)
def test_what_else_is_refused(tmp_path, text, parts):
    message = error_from(tmp_path, text)
    assert all(part in message for part in parts), message


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    message = error_from(tmp_path, "a: 1\nbudget: {total: x, then: never}\n")
    assert "3 things" in message


def test_a_missing_file_lists_its_neighbours(tmp_path):
    (tmp_path / "other.yaml").write_text("")
    with pytest.raises(PolicyError, match=r"nope\.yaml: there is no such file; in .* there are other\.yaml"):
        load_policy(tmp_path / "nope.yaml")
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path / "latin.yaml")


def test_the_constructor_speaks_the_same_language():
    with pytest.raises(NanGuardError, match=r"Policy\(\.\.\.\).*\n  bogus: unknown key"):
        Policy(bogus=1)


def test_what_to_watch(tmp_path):
    assert Policy().watch == policy_from(tmp_path, "watch: {modules: [], every_n_steps: 50, validation: false}").watch
    assert policy_from(tmp_path, "watch: {modules: 'decoder.*'}").watch.modules == ("decoder.*",)
    assert policy_from(tmp_path, "watch: {modules: ['', 'block[0-9].norm?']}").watch.modules == ("", "block[0-9].norm?")


def test_numbers_in_exponent_notation_are_numbers(tmp_path):
    assert policy_from(tmp_path, "capture: {max_gib: 1e-3}").capture.max_gib == 1e-3


def test_the_first_rule_that_matches_decides(tmp_path):
    policy = policy_from(
        tmp_path,
        """
        rules:
          - when: {trigger: loss, steps: [10, 20]}
            action: skip_step
          - when: {cause: [bad_input, overflow]}
            action: record
          - action: stop
        """,
    )
    assert policy.action(trigger="loss", cause="unknown", step=10) == "skip_step"
    assert policy.action(trigger="loss", cause="overflow", step=21) == "record"
    assert policy.action(trigger="gradients", cause="unknown", step=15) == "stop"
    assert policy.may_continue()


def test_no_rule_that_matches_means_raise():
    assert Policy(rules=[]).action(trigger="loss", cause="unknown", step=0) == "raise"


@given(first=st.integers(0, 50), last=st.integers(50, 99), step=st.integers(0, 120))
def test_steps_include_both_ends(first, last, step):
    policy = Policy(rules=[{"when": {"steps": [first, last]}, "action": "record"}])
    expected = "record" if first <= step <= last else "raise"
    assert policy.action(trigger="loss", cause="unknown", step=step) == expected


def test_overrides_replace_what_they_name_and_nothing_else():
    policy = load_policy(CONFIGS / "survive.yaml")
    changed = with_overrides(policy, action="record", captures="here", stabilize=False)
    assert changed.action(trigger="loss", cause="unknown", step=0) == "record"
    assert changed.capture.directory == Path("here")
    assert not changed.stabilize.enabled
    assert changed.budget == policy.budget
    with pytest.raises(PolicyError, match=r"NanGuard\(\.\.\.\).*\n  rules\[0\]\.action: found 'explode'"):
        with_overrides(policy, action="explode")
