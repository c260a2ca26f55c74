"""The faults, as ``faults.ini`` lists them: where each is planted, what it makes of the code, and who is to notice."""

import re
from configparser import ConfigParser, ExtendedInterpolation
from pathlib import Path
from typing import NamedTuple

CODE = ("fwpkm/ops", "fwpkm/memory", "fwpkm/functional")  # each module has faults


class Fault(NamedTuple):
    """One place of a module gone wrong."""

    name: str
    file: str
    function: str  # its qualified name
    rule: str  # of tests/faults/rewriting.py: the code as it is => as it becomes
    tests: tuple[str, ...]  # node ids
    why: str = ""  # why no test can notice it, if so


def listed(path: Path) -> list[Fault]:
    """The faults of a list, in its order."""
    table = ConfigParser(delimiters="=", interpolation=ExtendedInterpolation())
    table.read_string(path.read_text(encoding="utf-8"), str(path))
    found = []
    for file in table.sections():
        for name, value in table[file].items():
            if name not in table.defaults() and name != "tests":
                written, _, why = value.partition("\nwhy: ")
                place, *tests = re.split(r"\s+(?=tests/)", written)
                function, rule = re.split(r":\s+", place, maxsplit=1)
                tests = tests or table[file]["tests"].split()
                found.append(Fault(name, file, function, rule.replace("\n", " "), tuple(tests), why))
    return found


FAULTS = listed(Path(__file__).with_name("faults.ini"))
