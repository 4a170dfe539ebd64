"""Which files `data.source` means: order, globs, links, and what is refused how."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from gangline.trainers.data_errors import DataError
from gangline.trainers.source_files import find_files
from gangline.trainers.text_sources import read_pieces


def found(source, below: Path):
    return [os.path.relpath(file.path, below) for file in find_files(source)]


def refused(source):
    """Give the message of the refusal; any other exception fails the test."""
    with pytest.raises(DataError) as caught:
        find_files(source)
    message = str(caught.value)
    assert "data.source" in message
    assert "wanted" in message
    return message


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.txt",
        "a/2.md",
        "a/10.rst",
        "a/deep/er/x.jsonl",
        "c.TXT",
        "a/skipped.py",
        ".git/hidden.txt",
        "a/.hidden.txt",
        "z.txt.gz",
        "README",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return tmp_path


def test_a_folder_gives_its_known_files_in_order(tree):
    wanted = ["a/10.rst", "a/2.md", "a/deep/er/x.jsonl", "b.txt", "c.TXT", "z.txt.gz"]
    assert found(str(tree), tree) == wanted


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.txt", ["b.txt"]),
        ("**/*.md", ["a/2.md"]),
        ("**/*.txt", ["b.txt"]),
        ("a/*.[mr]*", ["a/10.rst", "a/2.md"]),
        ("?/deep/**/x.*", ["a/deep/er/x.jsonl"]),
        ("a/**", ["a/10.rst", "a/2.md", "a/deep/er/x.jsonl"]),
        ("a*", ["a/10.rst", "a/2.md", "a/deep/er/x.jsonl"]),
        ("**/**/x.jsonl", ["a/deep/er/x.jsonl"]),
        (".g*/*.txt", [".git/hidden.txt"]),
        ("a/.h*", ["a/.hidden.txt"]),
    ],
)
def test_a_glob(tree, pattern, wanted):
    assert found(str(tree / pattern), tree) == wanted


def test_entries_keep_their_order_and_a_file_comes_once(tree):
    source = [str(tree / "z.txt.gz"), str(tree / "a"), str(tree), "python-docs", "python-docs"]
    (tree / "link.txt").symlink_to("b.txt")
    assert [Path(file.path).name for file in find_files(source)] == [
        "z.txt.gz", "10.rst", "2.md", "x.jsonl", "b.txt", "c.TXT", "python-docs",
    ]  # fmt: skip


def test_a_name_with_glob_signs_that_exists_is_taken_as_it_is(tmp_path):
    (tmp_path / "v[1].txt").write_text("x")
    (tmp_path / "v1.txt").write_text("y")
    assert found(str(tmp_path / "v[1].txt"), tmp_path) == ["v[1].txt"]


def test_relative_and_home_paths(tree, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    assert find_files("b.txt")[0].path == "b.txt"
    assert found("~/*.txt", tree) == ["b.txt"]
    assert [Path(file.path) for file in find_files("*.txt")] == [Path("b.txt")]


def test_loops_of_links_end(tree):
    # Two loops in each folder: a walk that only bounds the depth would visit 2**40 paths.
    for number in range(2):
        (tree / f"loop{number}").symlink_to(tree)
        (tree / "a" / f"loop{number}").symlink_to(tree)
    (tree / "self").symlink_to("self")
    script = f"""
        from gangline.trainers.source_files import find_files
        for source in ({str(tree)!r}, {str(tree / "**" / "*.md")!r}):
            print(len(find_files(source)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        timeout=30,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["6", "1"]


def test_a_linked_folder_is_read(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "linked.txt").write_text("x")
    (tree / "a" / "there").symlink_to(other)
    assert "a/there/linked.txt" in found(str(tree / "a"), tree)


def test_a_fifo_or_socket_never_blocks(tree):
    os.mkfifo(tree / "fifo.txt")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tree / "s.txt"))
        assert "fifo.txt" not in found(str(tree), tree)
    assert "regular file" in refused(str(tree / "fifo.txt"))


def test_a_very_deep_folder_is_no_recursion_error(monkeypatch):
    # Not in tmp_path: it is too deep for pytest's own clearing, should this test be killed.
    folder = tempfile.mkdtemp()
    try:
        monkeypatch.chdir(folder)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("x.txt").write_text("x")
        os.chdir(folder)
        assert len(find_files(".")) == 1
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("missing.txt", "does not exist"),
        ("missing/*.txt", "no file at all"),
        ("*.doc", "no file at all"),
        ("READ*", "1 files, none of a known format"),
        ("README", "has the suffix ''"),
        ("a/skipped.py", "has the suffix '.py'"),
        ("b.txt/x.txt", "does not exist"),
        ("x\0y.txt", "cannot be read"),
        ("n" * 300 + ".txt", "cannot be read"),
    ],
)
def test_refusals_name_entry_and_mend(tree, name, part):
    message = refused(str(tree / name))
    assert part in message
    assert repr(str(tree / name)) in message


def test_an_empty_folder_is_refused(tmp_path):
    assert "no file at all" in refused(str(tmp_path))


def test_a_broken_link_is_refused_by_name(tree):
    (tree / "a" / "gone.txt").symlink_to("nowhere")
    assert "gone.txt" in refused(str(tree))


def test_names_that_are_not_utf8_can_be_read_and_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_bytes(b"\xff")
    assert found(str(tmp_path), tmp_path) == [name]
    with pytest.raises(DataError) as caught:
        list(read_pieces(find_files(str(tmp_path))[0], "text"))
    assert "caf\\udce9.txt" in str(caught.value)
    str(caught.value).encode()


def test_what_may_not_be_read_is_refused(tree, monkeypatch):
    # The tests may run as root, who may read everything.
    real_listdir = os.listdir

    def listdir(folder):
        if Path(folder).name == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return real_listdir(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    message = refused(str(tree))
    assert "Permission denied" in message
    assert str(tree / "a" / "deep") in message
