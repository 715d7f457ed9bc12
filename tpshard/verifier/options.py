"""The options of a verification, as the command line and the library take them. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tpshard.errors import UsageError

COMPUTED_TIERS = ("weights", "exact", "native")
"""The tiers that look into tensors; the last two run the model."""
TIERS = ("bytes", *COMPUTED_TIERS)
Say = Callable[[str], None]
"""Takes lines about the progress."""


def silent(line: str) -> None:
    """A `Say` that drops its lines."""


@dataclass(frozen=True)
class VerifyOptions:
    """What is verified, and how. The fields are the options of `tpshard verify`.

    `tiers` None: all that can run here. `source` None: it is looked for by the name that the shards record. `layers`
    None: all; negative numbers count from the end. `stream` None: where memory is short. `prompt` is a text for the
    model's tokenizer; None: ids from `seed`. `reference` "transformers" adds that library's own model as a reference.
    `engine` says whose code runs the ranks; auto: transformers' where tpshard's does not cover the model. `nproc` None:
    a process for each rank on a host with several GPUs, otherwise one for all. `allow_not_run`: how the names of cut
    tensors begin that need not be run. `model_type`: as what a model of a type that nothing here runs is computed.
    """

    shards: Path
    source: str | None = None
    tiers: tuple[str, ...] | None = None
    device: str = "auto"
    tokens: int = 32
    seed: int = 0
    float32: bool = False
    layers: tuple[int, ...] | None = None
    stream: bool | None = None
    sequence_parallel: bool = False
    reference: str = "tpshard"
    engine: str = "auto"
    prompt: str | None = None
    revision: str | None = None
    rules: str | Path | None = None
    allow_pickle: bool = False
    nproc: int | None = None
    allow_not_run: tuple[str, ...] = ()
    follow_symlinks: bool = False
    model_type: str | None = None

    def __post_init__(self) -> None:
        for what, given, known in (
            ("tier", self.tiers or (), TIERS),
            ("device", (self.device.partition(":")[0],), ("auto", "cpu", "cuda")),
            ("reference", (self.reference,), ("tpshard", "transformers")),
            ("engine", (self.engine,), ("auto", "tpshard", "transformers")),
        ):
            for value in given:
                if value not in known:
                    raise UsageError(f"unknown {what} {value!r}", expected=", ".join(known))
        if self.tiers is not None and not self.tiers:
            raise UsageError("no tier to run", expected=", ".join(TIERS))
        if self.tokens < 0:
            raise UsageError("--tokens takes no negative number", found=self.tokens)

    @property
    def computed(self) -> tuple[str, ...]:
        """The tiers that run the model, as far as they were asked for."""
        return tuple(filter(self.runs, COMPUTED_TIERS))

    def runs(self, tier: str) -> bool:
        """Whether a tier was asked for."""
        return self.tiers is None or tier in self.tiers
