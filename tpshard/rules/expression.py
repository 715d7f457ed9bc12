"""Expressions over config values, as the architecture files use them: parsed, never evaluated as Python."""

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any


def _modulo(left: Any, right: Any) -> Any:
    """Whole numbers only: of a string, Python's `%` would be formatting."""
    if not isinstance(left, int):
        raise TypeError(f"{left!r} has no remainder")
    return left % right


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: _modulo,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}


def _item(items: Any, key: Any) -> Any:
    """What a list or string holds at a place, or a table under a name: None where it has none, as a config has."""
    if items is None:
        return None
    if isinstance(items, list | str) and isinstance(key, int):
        return items[key] if 0 <= key < len(items) else None
    if isinstance(items, dict):
        return items.get(key, items.get(str(key)))  # of a table by layer, JSON makes the number a name
    raise TypeError(f"{items!r} has no {key!r}")


def _numbers(items: Any) -> Any:
    """The whole numbers of a list, or of a string that has commas between them; None where there is neither."""
    return None if items is None else [int(each) for each in (items.split(",") if isinstance(items, str) else items)]


_FUNCTIONS = {"len", "int", "numbers"}
_LONGEST = 1000  # far more than any rule needs, and never so deep that walking it exhausts the stack


class ExpressionError(ValueError):
    """The expression is not of the language, or has no value for this config."""


@lru_cache(maxsize=1024)
def parse(text: str) -> ast.expr:
    """The syntax tree of an expression; ExpressionError when it is not one, or says more than the language can."""
    if len(text) > _LONGEST:
        raise ExpressionError(f"an expression of {len(text)} characters, of which {_LONGEST} are read")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last: nested too deep for the parser
        raise ExpressionError(f"cannot read the expression {text!r}: {error}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and not _is_known(node):
            part = ast.get_source_segment(text, node)
            raise ExpressionError(f"{part!r} is not part of the expression language")
    return tree


def _is_known(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=bool() | int() | str() | None) | ast.Name() | ast.BoolOp() | ast.IfExp():
            return True
        case ast.UnaryOp(op=ast.Not()) | ast.Subscript(value=ast.Name() | ast.Subscript()):
            return True
        case ast.Call(func=ast.Name(id="len" | "numbers"), args=[ast.Name()], keywords=[]):
            return True
        case ast.Call(func=ast.Name(id="int"), args=[_], keywords=[]):
            return True
        case ast.BinOp(op=op):
            return type(op) in _BINARY
        case ast.Compare(ops=[op]):
            return type(op) in _COMPARE
    return False


def names(text: str) -> tuple[str, ...]:
    """The config keys an expression mentions, sorted."""
    return tuple(sorted({node.id for node in ast.walk(parse(text)) if isinstance(node, ast.Name)} - _FUNCTIONS))


def evaluate(text: str, config: Mapping[str, Any]) -> Any:
    """The value of an expression; a key that the config lacks, or holds as null, is None.

    >>> evaluate("head_dim or hidden_size // num_attention_heads", {"hidden_size": 64, "num_attention_heads": 4})
    16
    """
    tree = parse(text)
    try:
        return _value(tree, config)
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise ExpressionError(f"{text!r} has no value for this config: {error}") from None


def count_or_none(text: str, config: Mapping[str, Any]) -> int | None:
    """`evaluate_count`, or None where the config gives no count."""
    try:
        return evaluate_count(text, config)
    except ExpressionError:
        return None


def evaluate_count(text: str, config: Mapping[str, Any], least: int = 1) -> int:
    """The value of an expression that must be an int of at least 1, or of at least 0."""
    value = evaluate(text, config)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        keys = ", ".join(f"{name}={config.get(name)!r}" for name in names(text))
        what = "a positive integer" if least else "an integer, 0 or more"
        raise ExpressionError(f"{text!r} must be {what}, got {value!r} from {keys}")
    return value


def _value(node: ast.expr, config: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | str() | None as value):
            return value
        case ast.Name(id=name):
            return config.get(name)
        case ast.BoolOp(op=op, values=values):
            for item in values:
                result = _value(item, config)
                if bool(result) is isinstance(op, ast.Or):  # this one decides: what follows is not looked at
                    break
            return result
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, config)
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, config), _value(right, config))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _COMPARE[type(op)](_value(left, config), _value(right, config))
        case ast.Subscript(value=of, slice=key):
            return _item(_value(of, config), _value(key, config))
        case ast.Call(func=ast.Name(id="int"), args=[of]):
            return int(_value(of, config))
        case ast.Call(func=ast.Name(id="numbers"), args=[of]):
            return _numbers(_value(of, config))
        case ast.Call(args=[of]):
            items = _value(of, config)
            return None if items is None else len(items)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, config) else orelse, config)
    raise AssertionError(f"{ast.dump(node)} is not of the language, and parse let it pass")
