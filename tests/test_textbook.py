"""The example that shows the failure in slow motion."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_it_runs_and_tells_the_story():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "examples/textbook.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = re.sub(r"\s+", " ", done.stdout)
    for expected in (
        "loss = inf",
        "p[target]",
        "nan nan nan",
        "exp(1000) = inf",
        "loss = 667.3",
        "0.3333 0 -0.3333",
        '-F.cross_entropy(logits, target, reduction="none")',
        "F.softmax(logits, dim=1)",
        "0 + 1000 - (-1000) = 2000",
    ):
        assert expected in text
