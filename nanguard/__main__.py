"""``python -m nanguard``."""

from __future__ import annotations

import sys

from nanguard.cli import main

if __name__ == "__main__":
    sys.exit(main())
