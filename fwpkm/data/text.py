"""Where text comes from: files, folders, data sets, and the sources of Python's standard library on every machine."""

import hashlib
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fwpkm.checks import require

Bytes = NDArray[np.uint8]
Document = Callable[[], bytes]  # reads its text when called, so that large collections need no memory


def standard_library() -> list[Path]:
    """The ``.py`` files of this Python's standard library, without packages installed beside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))


def help_topics() -> list[Document]:
    """The topics of Python's ``help()``, prose in English, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name].encode for name in sorted(topics)]


BUILT_IN: dict[str, Callable[[], list[Document]]] = {
    "code": lambda: split_documents(file_documents(standard_library()))[1],
    "help": help_topics,
}
_DATASET = "dataset:"
HELD_OUT = 0.1  # share of the documents


def named_documents(name: str, column: str = "text") -> list[Document]:
    """The documents of a name: ``"code"``, the files of Python's standard library that are held out from training;
    ``"help"``, the topics of its ``help()``; ``"dataset:NAME"``, a Hugging Face data set, of whose rows ``column`` has
    the text; anything else, a file or a folder of text files.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name.startswith(_DATASET):
        return dataset_documents(name.removeprefix(_DATASET), column)
    return file_documents(text_files(Path(name)))


def text_files(path: Path) -> list[Path]:
    """A file itself, or all files below a folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a text file or a folder of text files")
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def file_documents(paths: Sequence[Path]) -> list[Document]:
    """Each file as a document."""
    return [path.read_bytes for path in paths]


def dataset_documents(name: str, column: str = "text") -> list[Document]:
    """Each row of the ``train`` part of a Hugging Face data set as a document.

    Args:
        name: as ``datasets.load_dataset`` takes it, a folder too; ``name:configuration`` names a configuration.
        column: where the rows have their text.

    Raises:
        ValueError: if the package ``datasets`` is missing, or the data set, its ``train`` part or the column.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ValueError("a data set by name needs the package datasets: pip install 'fwpkm[data]'") from None
    path, _, configuration = name.partition(":")
    try:
        rows = load_dataset(path, configuration or None, split="train")
    except (DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"dataset is {name!r}; expected one that loads ({error})") from error
    require(column in rows.column_names, "column", repr(column), "one of {}", rows.column_names)
    return [partial(_row, rows, i, column) for i in range(len(rows))]


def _row(rows: Sequence[dict[str, str]], i: int, column: str) -> bytes:
    return rows[i][column].encode()


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Those for training and those for evaluation, each once. Which is which depends on their content only.

    Raises:
        ValueError: if there are not enough for both.
    """
    by_digest = {hashlib.sha256(read()).digest(): read for read in documents}
    ordered = [by_digest[digest] for digest in sorted(by_digest)]
    n_held_out = max(1, round(len(ordered) * HELD_OUT))
    train, held = ordered[n_held_out:], ordered[:n_held_out]
    given = len(documents)
    for name, part in (("training text", train), ("held-out text", held)):
        empty = not any(len(read()) for read in part)
        require(not empty, name, "empty", "text in the {} documents given (at least two different ones)", given)
    return train, held


def load_split(files: Sequence[Path]) -> tuple[Bytes, Bytes]:
    """Join files to two texts, for training and for evaluation, as :func:`split_documents` divides them."""
    train, held = split_documents(file_documents(files))
    return joined(train), joined(held)


def joined(documents: Sequence[Document]) -> Bytes:
    """Documents as one text, a line end between them."""
    return np.frombuffer(b"\n".join(read() for read in documents), dtype=np.uint8)
