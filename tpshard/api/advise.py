"""`advise`: which mesh fits the given devices."""

from pathlib import Path

from tpshard.api.options import AdviseOptions, ModelOptions
from tpshard.formats import DEFAULT_FORMAT
from tpshard.inputs.checkpoint import open_headers
from tpshard.inputs.model import from_checkpoint
from tpshard.report.advice import Advice, Devices, advice
from tpshard.report.capacity import Workload


def advise(
    model: str | Path,
    gpus: int,
    workload: Workload,
    *,
    revision: str | None = None,
    rules: str | Path | None = None,
    dtype: str | None = None,
    follow_symlinks: bool = False,
    nodes: int = 1,
    format: str = DEFAULT_FORMAT,
) -> Advice:
    """Judge every tp x pp x ep that `gpus` devices have room for. Of a Hub repo only config and headers are read.

    workload: what the devices are to do, with the memory of one; UsageError without it. nodes: in which as many of the
    devices each are, so that all-reduces are fast. format: whose ranks are judged; UnsupportedError where it does not
    hold the model. revision, rules, dtype, follow_symlinks: as in `plan`. That the model fits on none is in the result,
    not raised.
    """
    source = ModelOptions(model, revision, rules, dtype, follow_symlinks=follow_symlinks)
    return advise_with(AdviseOptions(source, gpus, workload, nodes, format))


def advise_with(options: AdviseOptions) -> Advice:
    """The advice that the options ask for."""
    model = options.model
    checkpoint = open_headers(model.path, model.revision, **model.reading)
    built = from_checkpoint(checkpoint, model.rules, model.dtype)
    devices = Devices(options.gpus, options.nodes)
    return advice(built, devices, options.workload, checkpoint.warnings, options.format)
