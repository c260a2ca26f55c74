"""What the plugin takes for granted of vLLM, looked up in vLLM's sources, which need not be importable.

``python -m tests.serving.interfaces FOLDER_OR_WHEEL`` says what is missing in
a release that cannot be installed here, for want of a GPU's libraries.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

PLUGIN = Path(__file__).parents[2] / "integrations" / "vllm" / "fwpkm_vllm"
Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


def reader(place: Path) -> Callable[[str], str | None]:
    """The text of a file of vLLM by its path in a folder that holds the package, or in a wheel."""
    if place.suffix == ".whl":
        wheel = zipfile.ZipFile(place)
        names = set(wheel.namelist())
        return lambda path: wheel.read(path).decode() if path in names else None
    return lambda path: (place / path).read_text() if (place / path).is_file() else None


class Sources:
    """Definitions in sources that are read and not run.

    Args:
        read: the text of a file, or None if there is none.
    """

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self.read = read
        self.trees: dict[str, ast.Module | None] = {}

    def tree(self, module: str) -> ast.Module | None:
        if module not in self.trees:
            path = module.replace(".", "/")
            text = self.read(f"{path}.py")
            text = self.read(f"{path}/__init__.py") if text is None else text
            self.trees[module] = None if text is None else ast.parse(text)
        return self.trees[module]

    def package(self, module: str) -> str:
        """What relative imports of a module begin at."""
        return module if self.read(f"{module.replace('.', '/')}/__init__.py") else module.rpartition(".")[0]

    def find(self, name: str, seen: frozenset[str] = frozenset()) -> tuple[str, Definition] | None:
        """The module and the definition that a dotted name stands for, through whatever imports."""
        module, _, own = name.rpartition(".")
        tree = self.tree(module)
        if tree is None or name in seen:
            return None
        for node in reversed(tree.body):  # what comes after overloads
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == own:
                return module, node
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node in tree.body:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(x, ast.Name) and x.id == own for x in targets):
                    return module, node
            if isinstance(node, ast.ImportFrom) and own in {x.asname or x.name for x in node.names}:
                (there,) = {x.name for x in node.names if (x.asname or x.name) == own}
                base = self.package(module).split(".")
                base = base[: len(base) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                found = self.find(f"{origin}.{there}", seen | {name})
                if found is not None:
                    return found
            if isinstance(node, ast.Dict):  # of a package that imports when it is asked: "name": ".module:name"
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == own and isinstance(value, ast.Constant):
                        inner, _, attribute = str(value.value).lstrip(".").partition(":")
                        if attribute and (found := self.find(f"{module}.{inner}.{attribute}", seen | {name})):
                            return found
        return None

    def ancestry(self, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and what it comes from, as far as it is vLLM's."""
        found = self.find(name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return
        module, node = found
        yield module, node
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                yield from self.ancestry(f"{module}.{base.id}")

    def method(self, name: str, method: str) -> ast.FunctionDef | None:
        """As the class has it, or what it comes from."""
        for _, node in self.ancestry(name):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and member.name == method:
                    return member
        return None

    def fields(self, name: str) -> set[str]:
        """Annotated names of a class and of what it comes from: what a data class is made of."""
        return {
            x.target.id
            for _, node in self.ancestry(name)
            for x in node.body
            if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)
        }


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names that a call may use, without ``self`` or ``cls``."""
    own = [x.arg for x in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return [x for x in own if x not in ("self", "cls")]


class Plugin:
    """What the plugin's sources take of vLLM."""

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {file.stem: ast.parse(file.read_text()) for file in sorted(PLUGIN.glob("*.py"))}

    def imported(self, tree: ast.Module) -> dict[str, str]:
        """The names of vLLM in a module, by what they are called there."""
        return {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
            for alias in node.names
        }

    def names(self) -> set[str]:
        return {name for tree in self.trees.values() for name in self.imported(tree).values()}

    def classes(self) -> Iterator[tuple[ast.ClassDef, set[str]]]:
        """The plugin's classes, each with those of vLLM that it comes from, through others of the plugin too."""
        bases: dict[str, set[str]] = {}
        for tree in self.trees.values():
            known = self.imported(tree)
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    own = [x.value if isinstance(x, ast.Subscript) else x for x in node.bases]
                    called = [x.id for x in own if isinstance(x, ast.Name)]
                    bases[node.name] = {known[x] for x in called if x in known}
                    bases[node.name] |= {y for x in called if x not in known for y in bases.get(x, ())}
                    yield node, bases[node.name]

    def calls(self) -> Iterator[tuple[str, set[str]]]:
        """Names of vLLM that are called, with the keywords."""
        for tree in self.trees.values():
            known = self.imported(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
                    yield known[node.func.id], {x.arg for x in node.keywords if x.arg}


def overridden(sources: Sources) -> dict[str, list[str]]:
    """Methods of vLLM that the plugin has its own of, ``Class.method``, and vLLM's parameters."""
    found = {}
    for node, bases in Plugin().classes():
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name != "__init__":
                for base in sorted(bases):
                    if (method := sources.method(base, member.name)) is not None:
                        found[f"{node.name}.{member.name}"] = parameters(method)
    return found


def complaints(sources: Sources) -> list[str]:
    """What the plugin takes for granted and the sources do not have, a line each."""
    plugin, said = Plugin(), []
    for name in sorted(plugin.names()):
        if sources.find(name) is None and sources.tree(name) is None:
            said.append(f"{name} is not there")
    given = overridden(sources)
    for node, _ in plugin.classes():
        for member in node.body:
            wanted = given.get(f"{node.name}.{getattr(member, 'name', '')}")
            if wanted is None or not isinstance(member, ast.FunctionDef):
                continue
            own, arguments = parameters(member), member.args
            for position, parameter in enumerate(wanted):
                by_name = parameter in own or arguments.kwarg is not None
                by_place = arguments.vararg is not None and position >= len(arguments.args) - 1
                if not by_name and not by_place and not parameter.startswith("_"):
                    said.append(f"{node.name}.{member.name} is called with {parameter}, which it does not take")
    for name, keywords in plugin.calls():
        found = sources.find(name)
        if found is None:
            continue
        function = sources.method(name, "__init__") if isinstance(found[1], ast.ClassDef) else found[1]
        if isinstance(function, ast.FunctionDef) and function.args.kwarg is None:
            taken = set(parameters(function))
        elif function is None:
            taken = sources.fields(name)
        else:
            continue
        said += [f"{name} does not take {keyword}" for keyword in sorted(keywords - taken)]
    return said


def main(place: str) -> None:
    """Say what is missing in a folder or wheel, and end with 1 if anything is."""
    said = complaints(Sources(reader(Path(place))))
    print("\n".join(said) or f"{len(Plugin().names())} names, and what is overridden and called, are there")
    sys.exit(bool(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
