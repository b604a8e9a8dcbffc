"""What the site has besides the pages of this folder: the README as its first page, the command line as Typer tells it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here."""
    files.append(File.generated(config, "index.md", content=_home()))
    files.append(File.generated(config, "reference/command-line.md", content=_command_line()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside of this folder are their texts."""
    return re.sub(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


def _home() -> str:
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\(docs/([^)]*)\)", r"](\1)", text)
    outside = {path.name for path in ROOT.iterdir()}
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)#/]+)\)", lambda m: m[1] if m[2] in outside else m[0], text)


def _command_line() -> str:
    import typer
    from typer.cli import get_docs_for_click

    from sdtrt_backend.cli import app

    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="sdtrt", title="Command line")
