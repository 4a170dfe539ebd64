"""The text that Python brings along: English, each once, always the same, never run."""

import ast
import textwrap
from pathlib import Path

import pytest

from gangline.trainers.data_errors import DataError
from gangline.trainers.python_docs import _docstrings, python_docs_documents, python_docs_files


def test_gives_english_once_and_always_the_same():
    files = python_docs_files()
    texts = list(python_docs_documents(files))
    assert sum(len(text.encode()) for text in texts) > 1_500_000
    assert len(set(texts)) == len(texts)
    assert texts[0].startswith('The "assert" statement')
    words = " ".join(texts).lower().split()
    # English: "the" is about one word in seventeen.
    assert 0.03 < words.count("the") / len(words) < 0.1
    assert not [path for path in files if {"test", "tests", "site-packages"} & {*path.parts}]
    assert texts == list(python_docs_documents(python_docs_files()))


def make_library(folder, module):
    (folder / "pydoc_data").mkdir()
    (folder / "pydoc_data" / "topics.py").write_text("topics = {'b': 'two', 'a': 'one'}\n")
    (folder / "test").mkdir()
    (folder / "test" / "left_out.py").write_text("'''This must not be there.'''")
    (folder / "module.py").write_text(module)


def read(folder, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
    return list(python_docs_documents(python_docs_files()))


def test_takes_each_docstring_once_in_the_order_of_the_source(tmp_path, monkeypatch):
    module = '''
        """The module is first."""
        class A:
            """The class is second."""
            def f():
                """The method is third."""
                def inner():
                    """Inside is the fourth."""
            async def g():
                """The method is third."""
        if True:
            def h():
                """TBD"""
                "This is no docstring at all."
            def i():
                """The function
                   is fifth."""
    '''
    make_library(tmp_path, textwrap.dedent(module))
    assert read(tmp_path, monkeypatch) == [
        "one\n",
        "two\n",
        "The module is first.\n\nThe class is second.\n\nThe method is third.\n\n"
        "Inside is the fourth.\n\nThe function\nis fifth.\n",
    ]


def test_never_runs_what_it_reads(tmp_path, monkeypatch):
    make_library(tmp_path, '"""Three good words."""\nraise SystemExit("was run")')
    assert "Three good words.\n" in read(tmp_path, monkeypatch)


@pytest.mark.parametrize("missing", ["pydoc_data/topics.py", "module.py"])
def test_a_python_without_its_texts_is_refused(tmp_path, monkeypatch, missing):
    make_library(tmp_path, "")
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=r"set data\.source to text files of your own"):
        read(tmp_path, monkeypatch)


@pytest.mark.parametrize("module", ["def f(:", "x = '\0'"])
def test_a_broken_module_is_named(tmp_path, monkeypatch, module):
    make_library(tmp_path, module)
    with pytest.raises(DataError, match=r"module\.py"):
        read(tmp_path, monkeypatch)


def test_topics_of_another_shape_are_refused(tmp_path, monkeypatch):
    make_library(tmp_path, "'''Three good words.'''")
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = []\n")
    with pytest.raises(DataError, match="no table of topics"):
        read(tmp_path, monkeypatch)


def test_every_docstring_that_ast_knows_is_found():
    # Against the slow, obvious walk.
    path = Path(ast.__file__)
    tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    wanted = {
        docstring.strip()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node))
        if len(docstring.split()) >= 3
    }
    assert set(_docstrings(tree)) == wanted
