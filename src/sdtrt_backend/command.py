"""``sdtrt``, also where what the command line needs is not installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich", "PIL", "diffusers", "transformers")
NOT_INSTALLED = 2


def main() -> None:
    """Run the command line, or say what to install for it."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"error: sdtrt needs {', '.join(missing)}: pip install 'sdtrt_backend[cli]'", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    from .cli import main as run

    run()
