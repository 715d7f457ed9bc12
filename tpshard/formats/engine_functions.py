"""What an engine holds of a tensor that is a function of its numbers, as its table says it of a model's config."""

import re
from collections.abc import Mapping
from typing import Any

from tpshard.errors import CorruptError
from tpshard.planning.layout import FUNCTIONS, TIMES, StoredTensor
from tpshard.planning.model import CASTABLE, DTYPE_NAMES, Model

_ROOT = re.compile(r"\* root (\w+) / (\w+) if (\w+)")


def function_of(said: str, config: Mapping[str, Any]) -> str:
    """The function that a table's word is for a model; "" for none.

    `* root A / B if C` is the square root of the config's A / B, times which the numbers are where C is true.
    CorruptError for a config whose A and B are no counts.
    """
    root = _ROOT.fullmatch(said)
    if root is None:
        return said
    above, below, switch = root.groups()
    if not config.get(switch):
        return ""
    a, b = config.get(above), config.get(below)
    if type(a) is not int or type(b) is not int or a < 1 or b < 1:
        what = f"config.json says {switch}, and of {above} and {below} nothing to compute with"
        raise CorruptError(what, expected="two counts", found=f"{a!r:.20} and {b!r:.20}", hint="take the published one")
    return f"{TIMES}{(a / b) ** 0.5!r}"


def computed(share: StoredTensor, function: str, model: Model) -> StoredTensor:
    """What a function makes of a share's numbers; a product in the dtype that the engine computes the model in."""
    if not function.startswith(TIMES):
        return share._replace(dtype=FUNCTIONS[function], function=function)
    dtype = dtype_of(model)
    return share._replace(dtype=share.dtype if dtype in ("F32", "F64") else dtype, function=function)


def dtype_of(model: Model) -> str:
    """The dtype that the engine computes a model in."""
    named = model.dtype or model.config.get("dtype") or model.config.get("torch_dtype")
    found = DTYPE_NAMES.get(str(named).removeprefix("torch."), "F32")
    return found if found in CASTABLE else "F32"
