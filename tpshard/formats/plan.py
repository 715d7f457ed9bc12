"""From a model and options to a planned split."""

from collections.abc import Mapping, Sequence

from tpshard.errors import UnsupportedError
from tpshard.formats import format_of
from tpshard.formats.base import Format
from tpshard.formats.manifest import dump
from tpshard.formats.split import Options, Split
from tpshard.planning.join import OutputFile, assert_coverage, uncollected
from tpshard.planning.model import Model


@uncollected
def plan_split(model: Model, options: Options) -> Split:
    """Plan a tensor-parallel split of a model. UnsupportedError when a unit would be cut."""
    format = format_of(options.format)
    require_held(format, model, options)
    layouts = format.lay(model, options)
    assert_coverage([tensor for tensor in model.tensors if tensor.name not in layouts.dropped], layouts.rows)
    return Split(model, options, format, layouts)


def require_held(format: Format, model: Model, options: Options) -> None:
    """UnsupportedError where a format holds no such models, no stages or no whole experts; `lay` says the rest."""
    if model.quantisation and format.no_quantised:
        what = f"--format {options.format} takes no quantised models: {format.no_quantised}"
        found = f"quantised by {model.quantisation['method']}"
        raise UnsupportedError(what, expected="plain weights", found=found, hint="use --format native")
    if options.pp > 1 and not format.has_stages:
        what = f"--format {options.format} holds no pipeline stages"
        raise UnsupportedError(what, expected="pp 1", found=f"pp {options.pp}", hint="use --format native")
    if options.ep > 1 and not format.has_experts:
        what = f"--format {options.format} is not written with --ep"
        raise UnsupportedError(what, expected="ep 1", found=f"ep {options.ep}", hint="use --format native")


def record(split: Split, rank: int, files: Sequence[OutputFile], sha256: Mapping[str, str | None]) -> bytes:
    """`rank-….json`: the size and sha256 of each file of a rank; written when they are complete."""
    parts = [{"file": f.name, "size": f.size, "sha256": sha256[f.name]} for f in files]
    return dump({"set": split.set_id, "rank": rank, "tp": split.options.tp, "parts": parts})
