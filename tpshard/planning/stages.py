"""Pipeline stages: which layers each of them has, and what stands before and behind the layers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tpshard.errors import UnsupportedError, UsageError
from tpshard.planning.deal import Range


@dataclass(frozen=True)
class Layers:
    """The layers of a model: `count` of them, whose names are `within` and a number.

    before: the modules beside them that come before the first one. All others come behind the last one, and so do
    layers of higher numbers, which predict further tokens.
    """

    within: str
    count: int
    before: tuple[str, ...] = ()

    def position(self, name: str) -> int:
        """Where a tensor stands, by its name in the rules: the layer's number, -1 before them, `count` behind them."""
        if name.startswith(self.within):
            number = name[len(self.within) :].partition(".")[0]
            if number.isdecimal():
                return min(int(number), self.count)
        ahead = any(name == module or name.startswith(f"{module}.") for module in self.before)
        return -1 if ahead else self.count


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline: `ranges` of layers, one behind the other.

    twice: modules that the first stage has, and the last one as well (an embedding that is the head too).
    """

    layers: Layers
    ranges: tuple[Range, ...]
    twice: Collection[str] = ()

    def of(self, name: str, full_name: str) -> tuple[int, ...]:
        """The stages that hold a tensor, by its name and the one that the rules have for it."""
        position, last = self.layers.position(full_name), len(self.ranges) - 1
        if any(each.startswith(f"{module}.") for module in self.twice for each in (name, full_name)):
            return tuple(sorted({0, last}))
        return self.of_layer(position)

    def of_layer(self, layer: int) -> tuple[int, ...]:
        """The stage that has a layer, the first what comes before layers, the last what comes behind them."""
        last = len(self.ranges) - 1
        return (next((stage for stage, (_, end) in enumerate(self.ranges) if layer < end), last),)


def stages(layers: Layers | None, pp: int, given: Sequence[int] | None, twice: Collection[str] = ()) -> Stages:
    """The stages of `pp` ranks in a row. given: how many layers each has; None is `even_layers`.

    UnsupportedError where nothing says what comes before the layers, or they are fewer than the stages; UsageError for
    numbers that do not add up.
    """
    if layers is None or not layers.before:
        what = "nothing says which modules come before the layers, so that they have no stage"
        hint = (
            'name them in a rules file of your own: before = ["model.embed_tokens"]; where layers share parameters '
            "there are no stages"
        )
        raise UnsupportedError(what, expected="`before` or `tied` in the rules", found=f"pp {pp}", hint=hint)
    if pp > layers.count:
        what = f"{layers.count} layers on {pp} stages: a layer is never cut"
        raise UnsupportedError(
            what, expected=f"pp of at most {layers.count}", found=f"pp {pp}", hint="use a smaller pp"
        )
    sizes = even_layers(layers.count, pp) if given is None else tuple(given)
    if sum(sizes) != layers.count:
        listed = ",".join(map(str, sizes))
        hint = f"for example --pp-layers {','.join(map(str, even_layers(layers.count, pp)))}"
        what = f"--pp-layers {listed} are {sum(sizes)} layers, and the model has {layers.count}"
        raise UsageError(what, expected=f"{layers.count} layers", found=sum(sizes), hint=hint)
    return Stages(layers, tuple(pairwise(accumulate(sizes, initial=0))), twice)


def even_layers(count: int, pp: int) -> tuple[int, ...]:
    """How many layers each stage has where nobody says: as many, and of the rest one each from the last but one back.

    The last stage has the head as well. So deals vLLM (`get_pp_indices` in vllm/distributed/utils.py), so that files
    fit its default.
    """
    each, rest = divmod(count, pp)
    return tuple(each + (pp - 1 - rest <= stage < pp - 1) for stage in range(pp))
