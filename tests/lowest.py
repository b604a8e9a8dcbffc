"""Prints, as constraints of pip, the oldest version that pyproject.toml admits of everything that it names a version of."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def floors():
    """Of each distribution."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    needed = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {}
    for requirement in (Requirement(text) for texts in needed for text in texts):
        for specifier in requirement.specifier:
            assert specifier.operator == ">="
            assert found.setdefault(requirement.name, specifier.version) == specifier.version
    return found


if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in sorted(floors().items())), sep="\n")
