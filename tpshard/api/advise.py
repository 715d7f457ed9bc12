"""`advise`: which tp fits the given devices."""

from __future__ import annotations

from pathlib import Path

from tpshard.errors import UsageError
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
) -> Advice:
    """Judge every tp from 1 to `gpus`. Of a Hub repo only config and headers are read.

    workload: what the devices are to do, with the memory of one; UsageError without it. revision, rules, dtype: as in
    `plan`. That the model fits on none is in the result, not raised.
    """
    from tpshard.inputs.checkpoint import open_headers
    from tpshard.inputs.model import from_checkpoint
    from tpshard.planning.model import check_dtype

    if gpus < 1 or workload.gpu_memory is None:
        expected = "at least one device, and its memory"
        raise UsageError("advice needs devices", expected=expected, hint="Workload(gpu_memory=80 * 10**9)")
    check_dtype(dtype)
    checkpoint = open_headers(model, revision)
    built = from_checkpoint(checkpoint, None if rules is None else Path(rules), dtype)
    return advice(built, gpus, workload, checkpoint.warnings)
