"""Names of tensors as their kinds and numbers."""

import pytest

from tpshard.storage.tensor_names import numbered, with_numbers


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        ("lm_head.weight", "lm_head.weight", ()),
        ("h.3.mlp.experts.17.w1.weight", "h.0.mlp.experts.0.w1.weight", (3, 17)),
        ("0.weights.12", "0.weights.0", (0, 12)),
        ("7", "0", (7,)),
        ("h.00.w1", "h.00.w1", ()),
        ("h.01.x2.-1.1e3.²", "h.01.x2.-1.1e3.²", ()),
        ("h.٣.w", "h.٣.w", ()),
    ],
)
def test_components_of_digits_are_numbers(name: str, kind: str, numbers: tuple[int, ...]) -> None:
    assert numbered(name) == (kind, numbers)
    assert with_numbers(kind, numbers) == name
