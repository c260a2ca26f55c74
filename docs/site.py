"""What makes a site of pages that also stand in the repository: a hook of mkdocs and one of griffe, see mkdocs.yml."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Pages that stand in the root."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of ``docs`` lead to the pages above, or to copies of what they name, which come along."""
    folder = ROOT if page.file.src_uri in ROOT_PAGES.values() else DOCS

    def link(found: re.Match[str]) -> str:
        target = (folder / found[1]).resolve()
        if target.is_relative_to(DOCS):
            return f"]({target.relative_to(DOCS).as_posix()}"
        name = target.relative_to(ROOT).as_posix()
        if name in ROOT_PAGES:
            return f"]({ROOT_PAGES[name]}"
        copy = f"files/{name}" + (".txt" if target.suffix in (".md", ".py") else "")  # a browser shows it as it is
        if target.is_file() and files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(target)))
        return f"]({copy}"

    return LINK.sub(link, markdown)


class FromCode(Extension):
    """Docstrings name things by roles, which Markdown does not know; fields are described in comments beside them."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r":(?:class|data|func|meth|mod):(?=`)", "", obj.docstring.value)

    def on_class_members(self, *, cls: Any, **_: Any) -> None:
        fields = {name: re.search(r"  # (?!noqa)(.+)$", field.source) for name, field in cls.attributes.items()}
        lines = [f"    {name}: {comment[1]}" for name, comment in fields.items() if comment]
        if lines and cls.docstring:
            cls.docstring.value = "\n".join([cls.docstring.value, "", "Attributes:", *lines])
