"""The command line. Exit status 0: clean, 1: findings, 2: usage. Imports torch only to replay."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nanguard
from nanguard.errors import NanGuardError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

CLEAN, FINDINGS, USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status. Errors go to stderr as one message."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # What the terminal cannot show is better shown escaped than not at all.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except NanGuardError as error:
        return _fail(str(error))
    except SystemExit as error:
        return _fail(f"the code that was to be replayed has ended the program (status {error.code!r})")
    except BrokenPipeError:  # the reader has seen enough; nothing more may be flushed into the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLEAN
    except OSError as error:
        return _fail(f"cannot read or write: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanguard", description="A numerical guard for PyTorch training runs.")
    parser.add_argument("--version", action="version", version=f"nanguard {nanguard.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    show = commands.add_parser("show", help="what happened in a captured step, and what of it is stored")
    show.add_argument("capture", metavar="CAPTURE", help="directory of a capture")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(run=_show)

    replay = commands.add_parser("replay", help="run a captured step again; status 1 where it is not finite")
    replay.add_argument("capture", metavar="CAPTURE", help="directory of a capture")
    replay.add_argument(
        "--module",
        required=True,
        metavar="PKG.MOD:FACTORY",
        help="class or function that builds the module; also path/to/file.py:FACTORY",
    )
    replay.add_argument(
        "--step",
        choices=("training_step", "validation_step"),
        default=None,
        help="method to run; default: the one that was captured",
    )
    replay.add_argument("--weights", choices=("captured", "current"), default="captured", help="default: captured")
    replay.add_argument("--attributes", choices=("captured", "current"), default="captured", help="default: captured")
    replay.add_argument(
        "--stabilize", action=argparse.BooleanOptionalAction, default=None, help="default: as in the captured run"
    )
    replay.add_argument(
        "--device", default=None, help="such as cpu or cuda:0; default: where the factory puts the module"
    )
    replay.set_defaults(run=_replay)

    policy = commands.add_parser("policy", help="check a policy and print all of it")
    policy.add_argument("file", metavar="FILE", nargs="?", help="YAML; without it the default policy is printed")
    policy.set_defaults(run=_policy)

    rule = commands.add_parser("rule", help="what a rule of the stabiliser does")
    rule.add_argument("code", metavar="CODE", nargs="?", help="such as NG101; without it all rules are listed")
    rule.set_defaults(run=_rule)
    return parser


def _show(options: argparse.Namespace) -> int:
    from nanguard.capture.contents import summary
    from nanguard.capture.load import load_capture
    from nanguard.report.terminal import render_capture

    capture = load_capture(options.capture)
    if options.json:
        print(json.dumps(summary(capture), indent=2))
    else:
        _print(render_capture(capture))
    return CLEAN


def _replay(options: argparse.Namespace) -> int:
    from nanguard.capture.factory import build_module, find_factory
    from nanguard.capture.load import load_capture

    capture = load_capture(options.capture)
    factory = find_factory(options.module)
    module = build_module(factory, capture)
    try:
        if options.device is not None:
            module = module.to(options.device)
        result = nanguard.replay(
            capture,
            module,
            weights=options.weights,
            attributes=options.attributes,
            stabilize=options.stabilize,
            step=_method(capture, module, options.step),
        )
    except NanGuardError:
        raise
    except Exception as error:
        return _fail(f"{capture.path}: the step cannot be replayed: {type(error).__name__}: {error}{_place(error)}")
    return _report(capture, result, options.module)


def _method(capture: Any, module: Any, name: str | None) -> Any:
    """The method to run, where it is not the one that was captured."""
    if name in (None, capture.function):
        return None
    if not callable(getattr(type(module), str(name), None)):
        raise NanGuardError(
            f"--step: found {name!r}, which {type(module).__name__} does not have; expected a method of it"
        )
    return getattr(type(module), str(name))


def _report(capture: Any, result: Any, reference: str) -> int:
    from dataclasses import replace

    from nanguard.capture.manifest import replay_command
    from nanguard.report.terminal import render_incident

    for note in result.notes:
        print(f"note: {note}")
    if result.incident is None:
        loss = (
            "none"
            if result.loss is None
            else f"{float(result.loss):.9g}"
            if result.loss.numel() == 1
            else str(result.loss)
        )
        was = "" if capture.loss is None else f" (when captured: {capture.loss:.9g})"
        rest = (
            "all gradients are finite" if capture.function == "training_step" else "all that the step gives is finite"
        )
        print(f"finite: loss={loss}{was}, and {rest}")
        return CLEAN
    incident = replace(result.incident, replay=replay_command(capture.path, reference, capture.function))
    _print(render_incident(incident))
    if not result.reproduced:
        print(f"note: it failed otherwise when it was captured: {capture.incident.render().splitlines()[0]}")
    return FINDINGS


def _policy(options: argparse.Namespace) -> int:
    from nanguard.policy import Policy, load_policy

    policy = Policy() if options.file is None else load_policy(options.file)
    print(policy.to_yaml(), end="")
    return CLEAN


def _rule(options: argparse.Namespace) -> int:
    from nanguard.algebra.registry import lookup, rules

    if options.code is None:
        for known in rules():
            print(f"{known.code}  {known.name}")
        return CLEAN
    try:
        found = lookup(options.code)
    except KeyError as error:
        return _fail(f"{error.args[0]}; `nanguard rule` lists them")
    text = f"# {found.code} {found.name}\n\n{found.documentation}"
    if sys.stdout.isatty():
        from rich.markdown import Markdown

        _console().print(Markdown(text))
    else:
        print(text, end="")
    return CLEAN


def _print(renderable: Any) -> None:
    _console().print(renderable, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    # What is piped into a file must not be cut to the width of a terminal that is not there.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def _fail(message: str) -> int:
    print(f"nanguard: {message}", file=sys.stderr)
    return USAGE


def _place(error: BaseException) -> str:
    """Where the user's code raised: a message without its place is no help."""
    trace, place = error.__traceback__, ""
    own = str(Path(__file__).parent)
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(own) and "site-packages" not in file:
            place = f" ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
