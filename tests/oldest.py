"""``python tests/oldest.py``: the oldest release of everything that ``pyproject.toml`` admits, as pip wants it said.

Runs before there is an environment, so it needs Python alone.
"""

import re
import tomllib
from pathlib import Path


def oldest() -> list[str]:
    """``torch>=2.11,<2.16`` is ``torch==2.11.*`` here: the lower bound, with what was mended in it since."""
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    return [re.sub(r">=([\d.]+).*", r"==\1.*", dependency) for dependency in dependencies]


if __name__ == "__main__":
    print(*oldest())
