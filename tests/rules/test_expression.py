"""The expressions of architecture files: Python's arithmetic on a few node types, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.rules.expression import ExpressionError, evaluate, evaluate_count, names, parse

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "heads": 4,
    "kv": None,
    "flag": True,
    "off": False,
    "kind": "wide",
    "layers": [0, 2],
    "listed": "3,4, 15",
    "kinds": ["sparse", "dense"],
    "inner": {"heads": 8},
    "by_layer": {"1": {"width": 24}},
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hidden_size // heads", 16),
        ("head_dim or hidden_size // heads", 16),
        ("kv or heads", 4),
        ("nothing", None),
        ("kv", None),
        ("4 * hidden_size", 256),
        ("hidden_size - 2 * heads + 1", 57),
        ("2 * (hidden_size + heads)", 136),
        ("1 if flag else 2", 1),
        ("1 if off else heads if flag else 3", 4),
        ("flag and not off", True),
        ("off and missing // 0", False),  # like Python's, `and` and `or` stop early
        ("heads or missing // 0", 4),
        ("off or 0", 0),
        ("kv or off", False),
        ("kind == 'wide'", True),
        ("heads != 4", False),
        ("heads < 5 and heads <= 4 and heads > 3 and heads >= 4", True),
        ("missing == None", True),
        ("(heads + 3) % 5", 2),
        ("2 in layers", True),
        ("2 not in layers or heads in layers", False),
        ("(flag or off) and kind", "wide"),
        ("kinds[heads - 3]", "dense"),
        ("layers[1] + inner['heads']", 10),
        ("kind[1]", "i"),
        ("kinds[2]", None),
        ("kinds[0 - 1]", None),
        ("nothing[0]", None),
        ("inner['kv']", None),
        ("len(kinds) + len(kind)", 6),
        ("len(nothing) or heads", 4),
        ("int(heads * 3 // 2)", 6),
        ("heads in numbers(listed) and 5 not in numbers(listed)", True),  # not as parts of a string
        ("1 in numbers(layers)", False),
        ("numbers(nothing)", None),
        ("inner['3']['x'] or 1", 1),
        ("by_layer[heads - 3]['width']", 24),  # a table by layer, as JSON has it
        ("by_layer[0]['width']", None),
    ],
)
def test_the_value_is_pythons(text: str, value: object) -> None:
    assert evaluate(text, CONFIG) == value
    assert type(evaluate(text, CONFIG)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "__import__('os').system('true')",
        "().__class__",
        "hidden_size.real",
        "kinds[0:1]",
        "kinds[f()]",
        "len(a, b)",
        "len(a or b)",
        "int(a, b)",
        "int()",
        "max(a)",
        "(a or b)[0]",
        "[1, 2]",
        "{}",
        "lambda: 1",
        "[x for x in y]",
        "(a := 1)",
        "1.5",
        "b'x'",
        "1j",
        "...",
        "f'{a}'",
        "a ** 2",
        "a / 2",
        "a << 2",
        "a | b",
        "-a",
        "~a",
        "a is None",
        "1 < a < 3",
        "*a",
        "await a",
        "1 or __import__('os')",  # never reached, refused all the same
        "1 if flag else print()",
    ],
)
def test_anything_else_is_refused_before_it_has_a_value(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse(text)
    with pytest.raises(ExpressionError):
        evaluate(text, CONFIG)


@pytest.mark.parametrize("text", ["", " ", "a b", "a +", "(", "\0", "a\nb", "import os", "a = 1"])
def test_what_is_no_expression_is_named(text: str) -> None:
    with pytest.raises(ExpressionError, match="cannot read the expression"):
        parse(text)


@pytest.mark.parametrize(
    "text", ["(" * 100_000, "not " * 50_000 + "1", "1" + "+1" * 50_000, "-" * 999 + "1", "a " + "{" * 200 + " b"]
)
def test_an_expression_cannot_exhaust_the_stack(text: str) -> None:
    with pytest.raises(ExpressionError) as error:
        parse(text)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("text", ["1" + "+1" * 499, "not " * 249 + "1"])
def test_the_longest_expression_has_a_value(text: str) -> None:
    assert evaluate(text, {}) == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        "kv + 1",
        "heads // 0",
        "kind - 1",
        "missing < 3",
        "kind * kind",
        "kind % heads",
        "2 in kv",
        "heads[0]",
        "layers[kind]",
        "len(heads)",
    ],
)
def test_an_expression_without_a_value_for_this_config_is_named(text: str) -> None:
    with pytest.raises(ExpressionError, match="has no value for this config"):
        evaluate(text, CONFIG)


@pytest.mark.parametrize("value", [0, -4, True, None, "4", 4.0, [4]])
def test_a_count_is_a_positive_int(value: object) -> None:
    with pytest.raises(ExpressionError, match="'n' must be a positive integer, got .* from n="):
        evaluate_count("n", {"n": value})
    assert evaluate_count("n", {"n": 4}) == 4


def test_names_are_the_config_keys() -> None:
    assert names("b or a // (b + 1) if not c else len(d) + f[e]") == ("a", "b", "c", "d", "e", "f")


atoms = st.integers(0, 9).map(str) | st.sampled_from(["a", "b", "c"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(
            inner, st.sampled_from(["+", "-", "*", "//", "%", "or", "and", "==", "!=", "<", "<=", ">", ">="]), inner
        ).map(lambda part: f"({part[0]} {part[1]} {part[2]})"),
        inner.map(lambda part: f"(not {part})"),
        st.tuples(inner, inner, inner).map(lambda part: f"({part[0]} if {part[1]} else {part[2]})"),
    ),
    max_leaves=8,
)


@given(expressions, st.fixed_dictionaries({name: st.integers(-3, 9) for name in "abc"}))
def test_a_random_expression_means_what_python_means(text: str, config: dict[str, int]) -> None:
    try:
        meant = eval(text, {}, dict(config))
    except ZeroDivisionError:
        with pytest.raises(ExpressionError):
            evaluate(text, config)
    else:
        found = evaluate(text, config)
        assert (found, type(found)) == (meant, type(meant))


@given(st.text(max_size=30))
def test_no_text_does_more_than_raise_its_error(text: str) -> None:
    try:
        evaluate(text, CONFIG)
    except ExpressionError as error:
        assert str(error)
