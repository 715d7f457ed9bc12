"""Each format's formula against its definition, number by number; test_references has what quantisers' code says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.storage.local import read_header
from tpshard.verifier.dequantise.find import Recipe, recipes
from tpshard.verifier.dequantise.view import DequantisedWeights
from tpshard.verifier.ranks.open import FileWeights

Tensors = Mapping[str, Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def files(path: Path, tensors: Tensors) -> FileWeights:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return FileWeights(read_header(path).tensors)


def seen(
    path: Path, tensors: Tensors, found: Mapping[str, Recipe] | None = None, **settings: Any
) -> DequantisedWeights:
    """Tensors as the verifier reads them; of a rank, by what was `found` in the source."""
    weights = files(path, tensors)
    return DequantisedWeights(weights, recipes(weights, settings) if found is None else found, weights)


def weight(path: Path, tensors: Tensors, name: str = "m.weight", **settings: Any) -> Tensor:
    """A weight, of which pieces are read like the whole."""
    view = seen(path, tensors, **settings)
    whole = view.get(name)
    assert whole.dtype == torch.float64 and tuple(whole.shape) == view.shape(name)
    pieces = [view.rows(name, start, min(start + 5, len(whole))) for start in range(0, len(whole), 5)]
    assert same(torch.cat(pieces), whole)
    return whole


def same(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are, the sign of a zero included."""
    assert one.shape == other.shape and one.dtype == other.dtype
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def number(row: Tensor, bits: int, at: int) -> int:
    """The number at a place of a row of words, which are one long integer."""
    whole = int.from_bytes(row.contiguous().numpy().tobytes(), "little")
    return whole >> at * bits & (1 << bits) - 1


def e4m3(*shape: int) -> Tensor:
    return torch.randn(shape).mul(20).to(torch.float8_e4m3fn)


def exponents(*shape: int) -> Tensor:
    return torch.randint(110, 140, shape, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_a_partial_last_block(tmp_path: Path) -> None:
    """As of DeepSeek's kv_a, of 576 rows: the scale of the last block is that of what there is of it."""
    values, scale = e4m3(200, 130), torch.rand(2, 2)
    found = weight(tmp_path / "x", {"m.weight": values, "m.weight_scale_inv": scale})
    spread = scale.double().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :130]
    assert same(found, values.double() * spread)


@pytest.mark.parametrize(
    "settings", [{"weight_block_size": [64, 32]}, {"config_groups": {"g": {"weights": {"block_structure": [64, 32]}}}}]
)
def test_blocks_of_another_size(settings: dict[str, Any], tmp_path: Path) -> None:
    values, scale = e4m3(128, 96), torch.rand(2, 3)
    found = weight(tmp_path / "x", {"m.weight": values, "m.weight_scale_inv": scale}, **settings)
    assert same(found, values.double() * scale.double().repeat_interleave(64, 0).repeat_interleave(32, 1))


@pytest.mark.parametrize("shape", [(), (1,), (11,), (11, 1)])
@pytest.mark.parametrize("values", [e4m3(11, 32), torch.randint(-128, 128, (11, 32), dtype=torch.int8)])
def test_a_scale_for_all_or_a_row(values: Tensor, shape: tuple[int, ...], tmp_path: Path) -> None:
    scale = torch.rand(shape)
    found = weight(tmp_path / "x", {"m.weight": values, "m.weight_scale": scale, "m.input_scale": torch.ones(())})
    assert same(found, values.double() * scale.double().view(-1, 1))


def test_blocks_with_four_dims(tmp_path: Path) -> None:
    values, scale = e4m3(256, 384), torch.rand(2, 1, 3, 1)
    found = weight(tmp_path / "x", {"m.weight": values, "m.weight_scale": scale})
    spread = scale.double().view(2, 3).repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert same(found, values.double() * spread)


@pytest.mark.parametrize("kind", ["compressed-tensors", "modelopt", "mx"])
def test_four_bit_floats(kind: str, tmp_path: Path) -> None:
    packed, whole = torch.randint(0, 256, (6, 32), dtype=torch.uint8), torch.rand(1)
    scale = exponents(6, 2) if kind == "mx" else e4m3(6, 4).abs()
    tensors = {"m.weight" if kind == "modelopt" else "m.weight_packed": packed, "m.weight_scale": scale}
    if kind != "mx":
        tensors["m.weight_global_scale" if kind == "compressed-tensors" else "m.weight_scale_2"] = whole
    found = weight(tmp_path / "x", tensors)
    for n in range(6):
        for k in range(64):
            code = int(packed[n, k // 2]) >> 4 * (k % 2) & 15
            value = (-1.0 if code & 8 else 1.0) * E2M1[code & 7]
            wanted = value * (2.0 ** (int(scale[n, k // 32]) - 127) if kind == "mx" else float(scale[n, k // 16]))
            wanted = wanted / whole.item() if kind == "compressed-tensors" else wanted
            wanted = wanted * whole.item() if kind == "modelopt" else wanted
            assert float(found[n, k]).hex() == wanted.hex()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("zeros", [True, False])
def test_compressed_integers(bits: int, group: int | None, zeros: bool, tmp_path: Path) -> None:
    rows, columns = 7, 64
    groups = 1 if group is None else columns // group
    packed, scale = words(rows, columns * bits // 32), torch.rand(rows, groups).bfloat16()
    tensors = {"m.weight_packed": packed, "m.weight_scale": scale, "m.weight_shape": torch.tensor([rows, columns])}
    zero = words(-(-rows * bits // 32), groups)
    found = weight(tmp_path / "x", tensors | ({"m.weight_zero_point": zero} if zeros else {}))
    for n in range(rows):
        for k in range(0, columns, 3):
            g = 0 if group is None else k // group
            middle = number(zero[:, g], bits, n) if zeros else 1 << bits - 1
            assert float(found[n, k]) == (number(packed[n], bits, k) - middle) * float(scale[n, g])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits: int, version: str, tmp_path: Path) -> None:
    rows, columns, groups = 8, 64, 4
    packed, zero = words(columns * bits // 32, rows), words(groups, rows * bits // 32)
    scale, group = torch.rand(groups, rows).half(), torch.randint(0, groups, (columns,), dtype=torch.int32)
    tensors = {"m.qweight": packed, "m.qzeros": zero, "m.scales": scale, "m.g_idx": group}
    found = weight(tmp_path / "x", tensors, checkpoint_format=version)
    for n in range(rows):
        for k in range(columns):
            g = int(group[k])
            middle = (number(zero[g], bits, n) + (version == "gptq")) % (1 << bits)
            assert float(found[n, k]) == (number(packed[:, n], bits, k) - middle) * float(scale[g, n])


def test_awq(tmp_path: Path) -> None:
    rows, columns, groups = 24, 32, 2
    packed, zero, scale = words(columns, rows // 8), words(groups, rows // 8), torch.rand(groups, rows).half()
    found = weight(tmp_path / "x", {"m.qweight": packed, "m.qzeros": zero, "m.scales": scale})

    def value(row: Tensor, n: int) -> int:
        return int(row[n // 8]) >> AWQ_SHIFTS[n % 8] & 15

    for n in range(rows):
        for k in range(columns):
            wanted = (value(packed[k], n) - value(zero[k // 16], n)) * float(scale[k // 16, n])
            assert float(found[n, k]) == wanted


def test_awq_of_modelopt(tmp_path: Path) -> None:
    """What its inputs are multiplied by is taken into the weight; the second scale is of a format between."""
    packed, scale = torch.randint(0, 256, (4, 256), dtype=torch.uint8), torch.rand(8, 2)
    tensors = {"m.weight": packed, "m.weight_scale": scale, "m.weight_scale_2": torch.rand(())}
    plain, factor = weight(tmp_path / "x", tensors), torch.rand(256).bfloat16()
    for n in range(8):
        for k in range(0, 256, 7):
            code = int(packed[n // 2, k]) >> 4 * (n % 2) & 15
            assert float(plain[n, k]) == (code - 16 * (code > 7)) * float(scale[n, k // 128])
    assert same(weight(tmp_path / "y", tensors | {"m.pre_quant_scale": factor}), plain * factor.double())


@pytest.mark.parametrize("sorted_groups", [True, False])
@pytest.mark.parametrize("renumbered", [True, False])
def test_the_groups_of_a_rank(sorted_groups: bool, renumbered: bool, tmp_path: Path) -> None:
    """Sorted groups are cut with their scales, whether they are counted anew or not; of others all scales are kept."""
    rows, columns, groups = 8, 128, 4
    order = torch.arange(columns) if sorted_groups else torch.randperm(columns)
    whole = {
        "m.qweight": words(columns // 8, rows),
        "m.qzeros": words(groups, rows // 8),
        "m.scales": torch.rand(groups, rows).half(),
        "m.g_idx": (order // 32).to(torch.int32),
    }
    source = seen(tmp_path / "x", whole)
    half = {
        name: tensor.chunk(2)[1] if sorted_groups or tensor is whole["m.qweight"] else tensor
        for name, tensor in whole.items()
    }
    half["m.g_idx"] = whole["m.g_idx"].chunk(2)[1] - (2 if sorted_groups and renumbered else 0)
    rank = seen(tmp_path / "y", half, source.recipes)
    assert same(rank.get("m.weight"), source.get("m.weight")[:, 64:].contiguous())


def test_what_a_rank_states_of_its_shape(tmp_path: Path) -> None:
    """compressed-tensors' weight_shape may be the source's: 3-bit values of 96 inputs are as many words as 100's."""
    whole = {
        "m.weight_packed": words(6, 18),
        "m.weight_scale": torch.rand(6, 1),
        "m.weight_shape": torch.tensor([6, 192]),
    }
    source = seen(tmp_path / "x", whole)
    half = whole | {"m.weight_packed": whole["m.weight_packed"][:, 9:]}
    rank = seen(tmp_path / "y", half, source.recipes)
    assert same(rank.get("m.weight"), source.get("m.weight")[:, 96:].contiguous())


def test_names_and_sizes(tmp_path: Path) -> None:
    """What a weight is made of is not there, what is beside it is; sizes are those of the files."""
    tensors = {"n.weight": torch.rand(3), "m.weight": e4m3(8, 16), "m.weight_scale": torch.rand(8, 1)}
    view = seen(tmp_path / "x", tensors | {"m.input_scale": torch.ones(())})
    assert set(view.names()) == {"n.weight", "m.weight", "m.input_scale"}
    assert view.nbytes == 3 * 4 + 8 * 16 + 8 * 4 + 4 and view.infos["m.weight"].nbytes == 8 * 8 * 16
    assert view.dtype("m.weight") == torch.float64 and view.get("n.weight").dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("m.weight_scale_inv", torch.rand(3, 2), "does not fit"),
        ("m.weight_scale_inv", None, "is missing"),
        ("g.g_idx", torch.full((64,), 2, dtype=torch.int32) + torch.arange(64).int() % 3, "without scales"),
    ],
)
def test_a_rank_whose_tensors_do_not_fit(name: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    tensors = {"m.weight": e4m3(256, 256), "m.weight_scale_inv": torch.rand(2, 2)}
    tensors |= {"g.qweight": words(8, 8), "g.qzeros": words(2, 1), "g.scales": torch.rand(2, 8).half()}
    tensors["g.g_idx"] = torch.arange(64).int() // 32
    source = seen(tmp_path / "x", tensors)
    changed = {key: value for key, value in tensors.items() if key != name} | ({} if tensor is None else {name: tensor})
    rank = seen(tmp_path / "y", changed, source.recipes)
    with pytest.raises(DifferentError, match=message):
        rank.get(f"{name[0]}.weight")


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"m.weight": e4m3(256, 256), "m.weight_scale": torch.rand(3, 2)}, {}, "what the scales of m.weight stand for"),
        ({"m.qweight": words(64, 8), "m.qzeros": words(2, 2), "m.scales": torch.rand(2, 16)}, {}, "is packed"),
        (
            {"m.qweight": words(64, 1), "m.qzeros": words(2, 1), "m.scales": torch.rand(2, 8)},
            {"version": "gemv"},
            "gemv",
        ),
        ({"m.qweight": words(64, 8), "m.qzeros": words(2, 2)}, {}, "no scale"),
    ],
)
def test_what_is_not_known(tensors: Tensors, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        seen(tmp_path / "x", tensors, **settings)
