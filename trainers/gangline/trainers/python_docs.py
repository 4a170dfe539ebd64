"""Text that is there without a download: the English in which Python describes itself.

Two parts, in a fixed order: the reference topics behind `help()` (`pydoc_data.topics`, one document
each), then the docstrings of the standard library, one document per module. Modules are parsed,
never imported. Left out are tests, generated topics and whatever was installed beside the library.

Measured with CPython 3.11.7: 79 topics and 637 modules give 716 documents, 2,243,175 bytes, in
1.3 s on one idle core; `prepare_dataset` keeps the tokens, so this is paid once. Other versions of
Python give other text, and therefore another dataset digest.
"""

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gangline.trainers.data_errors import DataError

PYTHON_DOCS = "python-docs"

_LEFT_OUT = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
# A docstring below this says nothing ("TBD", a lone character in a table of names).
_MIN_WORDS = 3
_MEND = (
    "use a full CPython (on Debian the packages libpython3-stdlib and python3), or set data.source "
    "to text files of your own"
)


def python_docs_files() -> list[Path]:
    """List the files that the text is taken from: the topics, then the modules in sorted order.

    Raises: DataError if this Python ships without its topics or its sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise DataError(
            f"data.source is {PYTHON_DOCS!r}, but this Python has no reference topics at "
            f"{str(topics)!r}; {_MEND}"
        )
    modules = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(
            name for name in subfolders if name not in _LEFT_OUT and not name.startswith("config-")
        )
        modules += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    if not modules:
        raise DataError(
            f"data.source is {PYTHON_DOCS!r}, but this Python has no sources of its standard "
            f"library under {str(library)!r}; {_MEND}"
        )
    return [topics, *modules]


def python_docs_documents(files: list[Path]) -> Iterator[str]:
    """Give one document per topic and per module of `python_docs_files`, each text only once.

    Raises: DataError, naming the file, if one of them is not valid Python.
    """
    topics, *modules = files
    seen: set[str] = set()
    for text in _topics(_parse(topics), topics):
        if text not in seen:
            seen.add(text)
            yield text
    for path in modules:
        fresh = []
        for docstring in _docstrings(_parse(path)):
            if docstring not in seen:
                seen.add(docstring)
                fresh.append(docstring)
        if fresh:
            yield "\n\n".join(fresh) + "\n"


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"data.source is {PYTHON_DOCS!r}, but {str(path)!r} of the standard library cannot be "
            f"read as Python: {error}; {_MEND}"
        ) from error


def _topics(tree: ast.Module, path: Path) -> list[str]:
    """Read the one literal dict that the generated module assigns to `topics`, sorted by name."""
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name].strip() + "\n" for name in sorted(topics)]
    raise DataError(
        f"data.source is {PYTHON_DOCS!r}, but {str(path)!r} holds no table of topics; {_MEND}"
    )


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Give the docstrings of module, classes and functions in the order of the source."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = (ast.get_docstring(node) or "").strip()
            if len(docstring.split()) >= _MIN_WORDS:
                yield docstring
        if isinstance(node, (ast.stmt, ast.Module, ast.ExceptHandler, ast.match_case)):
            pending.extend(reversed(list(ast.iter_child_nodes(node))))
