"""Rows of a plan: what is alike becomes one of them, in the table and in `--json --grouped`."""

from tpshard.report.plan_rows import fold


def folded(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The rows that become of these, without the names that each stands for."""
    return [(pattern, cell) for pattern, _, cell in fold(rows)]


def test_layers_that_are_alike_are_one_row() -> None:
    rows = [("embed", "a")]
    rows += [(f"layers.{layer}.{name}", cell) for layer in range(12) for name, cell in (("q", "x"), ("norm", "y"))]
    assert folded(rows) == [("embed", "a"), ("layers.{0-11}.q", "x"), ("layers.{0-11}.norm", "y")]


def test_layers_that_differ_are_rows_of_their_own() -> None:
    rows = [(f"h.{layer}.q", "wide" if layer in (2, 5) else "narrow") for layer in range(7)]
    assert folded(rows) == [("h.{0-1,3-4,6}.q", "narrow"), ("h.{2,5}.q", "wide")]
    assert folded([("h.3.q", "x")]) == [("h.3.q", "x")]


def test_experts_and_layers_that_are_alike_are_one_row() -> None:
    rows = [(f"layers.{layer}.experts.{expert}.w{n}", "x") for layer in range(3) for expert in range(4) for n in (1, 2)]
    assert folded(rows) == [("layers.{0-2}.experts.{0-3}.w1", "x"), ("layers.{0-2}.experts.{0-3}.w2", "x")]
    del rows[rows.index(("layers.1.experts.2.w1", "x"))]
    assert folded(rows)[:2] == [
        ("layers.{0,2}.experts.{0-3}.w1", "x"),
        ("layers.{0-2}.experts.{0-3}.w2", "x"),
    ]
    assert folded([("0.w", "x"), ("1.w", "x"), ("w2.x", "x")]) == [("{0-1}.w", "x"), ("w2.x", "x")]
