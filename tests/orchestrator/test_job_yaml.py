"""The YAML of job files: what is read, what is refused, and that no input can hurt."""

import json
import random
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gangline.orchestrator import job_yaml
from gangline.orchestrator.job_scalars import dump_yaml
from gangline.orchestrator.job_yaml import NUM_MAX_BYTES, NUM_MAX_DEPTH, NUM_MAX_NODES, parse_yaml


@pytest.fixture(params=["libyaml", "pure Python"])
def parser(request, monkeypatch):
    """Run a test with both parsers of PyYAML: libyaml is an optional part of it."""
    if request.param == "libyaml" and not yaml.__with_libyaml__:
        pytest.skip("this PyYAML is built without libyaml")
    chosen = yaml.CSafeLoader if request.param == "libyaml" else yaml.SafeLoader
    monkeypatch.setattr(job_yaml, "_PARSER", chosen)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("y", "y"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"), ("0b11", "0b11"), ("+x", "+x"), ("-x", "-x"), (".", "."), ("1e", "1e"),
        ("true", True), ("FALSE", False), ("tRue", "tRue"), ("~", None), ("Null", None),
        ("12", 12), ("-0", 0), ("+7", 7), ("0o14", 12), ("0xff", 255), ("-0x1", "-0x1"),
        ("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("2.", 2.0), ("-1.5e+3", -1500.0),
        ("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63)),
        ("'012'", "012"), ('"null"', "null"), ("'true'", "true"), ('"\\U0001F600"', "😀"),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text, value, parser):
    document = parse_yaml(f"a: {text}\n")
    assert document.problems == []
    assert document.value == {"a": value}
    assert type(document.value["a"]) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("a: 012", (1, 4), "leading zeros"),
        ("a: -01", (1, 4), "leading zeros"),
        ("a: .inf", (1, 4), ".inf"),
        ("a: 1e999", (1, 4), "1e999"),
        ("a: " + "9" * 5000, (1, 4), "64 bits"),
        ("a: 0x" + "f" * 17, (1, 4), "64 bits"),
        ("a: 1\nb: 2\na: 3", (3, 1), "'a' a second time (first on line 1)"),
        ("a: &x 1", (1, 4), "anchor &x"),
        ("a: 1\nb: *x", (2, 4), "alias *x"),
        ("a: !!str 1", (1, 4), "tag '!!str'"),
        ("a: !x 1", (1, 4), "tag '!x'"),
        ("1: a", (1, 1), "key '1'"),
        ("~: a", (1, 1), "key '~'"),
        ("? [a]\n: b", (1, 3), "a collection as a key"),
        ("a: 1\n---\nb: 2", (2, 1), "second document"),
        ("%YAML 1.1\n---\na: 1", (1, 1), "directive"),
        ("a: [1, 2", None, "broken YAML"),
        ("a: b: c", (1, 5), "mapping values are not allowed"),
        ("a:\n\tb: 1", (2, 1), "broken YAML"),
        ('a: "x\\0y"', (1, 4), "U+0000"),
        ("a: x\x00", (1, 5), "control character U+0000"),
        ("a: é\x1b", (1, 5), "control character U+001B"),
        ("a: x\u2028", (1, 5), "control character U+2028"),
    ],
)
def test_each_fault_has_its_place(text, place, said, parser):
    problems = parse_yaml(text).problems
    assert len(problems) == 1
    assert said in problems[0].render("job.yaml")
    if place is not None:
        assert (problems[0].line, problems[0].column) == place


def test_several_faults_are_reported_together(parser):
    text = "a: 012\nb: {c: &x 1, c: 2}\nd: [*x, .nan]\ne: !y z\n"
    assert [(p.path, p.line) for p in parse_yaml(text).problems] == [
        ("a", 1), ("b.c", 2), ("b", 2), ("d[0]", 3), ("d[1]", 3), ("e", 4),
    ]  # fmt: skip


def test_faults_after_broken_syntax_are_not_guessed():
    document = parse_yaml("a: 012\nb: ]\nc: 012\n")
    assert document.broken
    assert ["leading zeros" in p.found for p in document.problems] == [True, False]


@pytest.mark.parametrize("data", [b"\xff\xfea", b"a: \xed\xa0\x80", b"a: \xc3", b"\x80"])
def test_only_utf_8(data):
    [problem] = parse_yaml(data).problems
    assert "0x" in problem.found
    assert problem.allowed == "UTF-8"


def test_text_with_a_lone_surrogate_is_refused():
    assert parse_yaml("a: \ud800").broken


def test_a_byte_order_mark_is_no_fault():
    assert parse_yaml(b"\xef\xbb\xbfa: 1").value == {"a": 1}


def test_limits():
    fits = "- x\n" * (NUM_MAX_NODES - 1)
    assert not parse_yaml(fits).broken
    assert "values" in parse_yaml(fits + "- x\n").problems[0].found
    assert not parse_yaml("[" * NUM_MAX_DEPTH + "]" * NUM_MAX_DEPTH).broken
    assert "nesting" in parse_yaml("[" * 21 + "]" * 21).problems[0].found
    assert not parse_yaml("#" * NUM_MAX_BYTES).broken
    assert "bytes" in parse_yaml("#" * (NUM_MAX_BYTES + 1)).problems[0].found


@pytest.mark.parametrize(
    "unit",
    ["[", "{a: ", "- ", "? ", "[a: ", "a: 1\n", "!", "&a ", "*a ", "#", "a", "'", '"', "\n", ": ",
     "-\n", "k: [1, 2]\n", " ", "%", ",", "- - - -\n", ",[{", '"\\x41"', "a: |\n x\n", "- &a x\n",
     "{", '{"a":', "\\\\", "\\ud83d\\ude00"],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", '{"a": "'])
def test_hostile_files_are_answered_soon(unit, prefix):
    text = (prefix + unit * (NUM_MAX_BYTES // len(unit) + 1))[:NUM_MAX_BYTES]
    seconds = []
    for _ in range(3):
        start_s = time.process_time()
        parse_yaml(text)
        seconds.append(time.process_time() - start_s)
    assert min(seconds) < 0.05


def test_an_alias_bomb_is_refused():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 20)]
    document = parse_yaml("\n".join(lines))
    assert len(document.problems) >= 40
    assert len(str(document.value)) < 2000


def test_places_of_keys_and_values():
    marks = parse_yaml("a:\n  - x\n  - {b:  2}\n").marks
    assert marks[("a",)].key == (1, 1)
    assert marks[("a", 0)].value == (2, 5)
    assert (marks[("a", 1, "b")].key, marks[("a", 1, "b")].value) == ((3, 6), (3, 10))


def test_what_was_written_is_kept_for_scalars_that_are_no_text():
    assert parse_yaml("a: [1e-3, no, 0o14, true, null, '5']").raw == {
        ("a", 0): "1e-3", ("a", 2): "0o14", ("a", 3): "true",
    }  # fmt: skip


# Any text but NUL and surrogates, which no field can hold.
texts = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60
) | st.sampled_from(
    ["no", "Null", "0o14", "012", "1e-4", "1:30", "=", "<<", "a: b", "a #b", "-", "? x", "\u2028",
     "\x85", "\\", "\\ud83d\\ude00"]
)  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
trees = st.dictionaries(
    texts,
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=12,
    ),
    max_size=6,
)


@given(trees)
def test_what_is_written_is_read_back(tree):
    text = dump_yaml(tree)
    document = parse_yaml(text)
    assert document.problems == []
    assert _typed(document.value or {}) == _typed(tree)
    # And by a reader of YAML 1.1.
    assert _typed(yaml.safe_load(text) or {}) == _typed(tree)


@given(trees)
def test_json_is_read_too(tree):
    for ensure_ascii in (True, False):
        document = parse_yaml(json.dumps(tree, ensure_ascii=ensure_ascii))
        assert document.problems == []
        assert _typed(document.value) == _typed(tree)


def test_pairs_of_escapes_are_joined_in_json_only():
    assert parse_yaml(r'{"a": "\\\ud83d\ude00"}').value == {"a": "\\😀"}
    assert parse_yaml(r'{"a": "\\ud83d\\ude00"}').value == {"a": r"\ud83d\ude00"}
    assert parse_yaml(r"{a: '\ud83d\ude00'}").value == {"a": r"\ud83d\ude00"}
    assert parse_yaml(r'{"a": "\ud83d"}').problems
    assert parse_yaml('{"a": "\x7f"}').value == {"a": "\x7f"}
    assert parse_yaml('{a: "\x7f"}').problems


def _typed(value):
    """Return a form in which 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return {key: _typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_typed(inner) for inner in value]
    return type(value).__name__, repr(value)


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_any_bytes_are_read_or_refused(data):
    document = parse_yaml(data)
    assert document.problems or not document.broken


def test_both_parsers_give_the_same_values(monkeypatch):
    if not yaml.__with_libyaml__:
        pytest.skip("this PyYAML is built without libyaml")
    rng = random.Random(0)
    alphabet = "ab:- \n[]{},#'\"10.!&*|>"
    num_read = 0
    for _ in range(3000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12)))
        answers = []
        for parser in (yaml.CSafeLoader, yaml.SafeLoader):
            monkeypatch.setattr(job_yaml, "_PARSER", parser)
            answers.append(parse_yaml(text))
        if not (answers[0].problems or answers[1].problems):
            num_read += 1
            assert answers[0].value == answers[1].value, repr(text)
    assert num_read > 300
