"""What the examples print: acts, claims with the mark that they deserve, and a table at the end."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nanguard import NanGuardWarning


@dataclass
class Stage:
    """Prints the acts, remembers whether each showed what it promised, and sums them up."""

    console: Console
    failures: int = 0
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def title(self, name: str, sentence: str) -> None:
        """Opens an act."""
        self.console.print()
        self.console.rule(f"[bold]{name}", align="left")
        self.console.print(sentence, highlight=False)

    def show(self, text: str, style: str = "") -> None:
        """Prints something that nanguard says, word for word."""
        self.console.print(Padding(Text(text, style=style), (0, 0, 0, 4), expand=False))

    def check(self, holds: bool, claim: str) -> bool:
        """Prints a claim with the mark that it deserves."""
        self.failures += not holds
        self.console.print(
            f"  [green]ok[/]      {claim}" if holds else f"  [bold red]FAILED[/]  {claim}", highlight=False
        )
        return holds

    def summary(self) -> None:
        """The table at the end."""
        table = Table(title="Summary", title_justify="left", title_style="bold")
        for name in ("act", "result", "steps", "test accuracy", "incidents", "time"):
            table.add_column(name, justify="left" if name in ("act", "result") else "right")
        for row in self.rows:
            table.add_row(*row)
        self.console.print()
        self.console.print(table)


class told(warnings.catch_warnings):
    """Prints what nanguard warns of, set apart from the rest, when the run is over."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(record=True)
        self._stage = stage

    def __enter__(self) -> None:
        """Begins to listen."""
        self._log = super().__enter__()
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", NanGuardWarning)

    def __exit__(self, *details: Any) -> None:
        """Prints."""
        super().__exit__(*details)
        for entry in self._log or ():
            self._stage.show(f"{Path(entry.filename).name}:{entry.lineno}: {entry.message}\n", "yellow")
