"""`advise`: which tp fits the given devices."""

from pathlib import Path

from tpshard.api.options import AdviseOptions, ModelOptions
from tpshard.inputs.checkpoint import open_headers
from tpshard.inputs.model import from_checkpoint
from tpshard.report.advice import Advice, advice
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
) -> Advice:
    """Judge every tp from 1 to `gpus`. Of a Hub repo only config and headers are read.

    workload: what the devices are to do, with the memory of one; UsageError without it. revision, rules, dtype,
    follow_symlinks: as in `plan`. That the model fits on none is in the result, not raised.
    """
    source = ModelOptions(model, revision, rules, dtype, follow_symlinks=follow_symlinks)
    return advise_with(AdviseOptions(source, gpus, workload))


def advise_with(options: AdviseOptions) -> Advice:
    """The advice that the options ask for."""
    model = options.model
    checkpoint = open_headers(model.path, model.revision, **model.reading)
    built = from_checkpoint(checkpoint, model.rules, model.dtype)
    return advice(built, options.gpus, options.workload, checkpoint.warnings)
