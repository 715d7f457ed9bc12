"""Record what each module of a reference run takes and gives, and replay it through a rank, module by module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tpshard.verifier.builtin.decoder import Probe, Summand
from tpshard.verifier.criteria import relative
from tpshard.verifier.report.verdict import Finding


@dataclass
class Record:
    """One module of the reference: input, output, wide activations and row summands inside."""

    input: Tensor
    output: Tensor
    shares: dict[str, Tensor] = field(default_factory=dict)
    summands: dict[str, Summand] = field(default_factory=dict)


class Recorder(Probe):
    """Keeps a Record of every module that runs, until `records` is cleared."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.shares: dict[str, Tensor] = {}
        self.summands: dict[str, Summand] = {}

    def module(self, name: str, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.shares, self.summands = {}, {}
        y = work(x)
        self.records[name] = Record(x, y, self.shares, self.summands)
        return y

    def share(self, name: str, x: Tensor, first: int) -> None:
        self.shares[name] = x

    def summand(self, name: str, partial: Tensor, compute: Summand, first: int, count: int) -> None:
        self.summands[name] = compute


class Replayer(Probe):
    """Feeds every module the reference's input and compares its output, and for those above `limit`, what is inside.

    What is inside belongs to this rank alone (its heads, its features, its summand), so it tells whose fault it is.
    """

    def __init__(self, records: Mapping[str, Record], rank: int, limit: float) -> None:
        self.records = records
        self.rank = rank
        self.limit = limit
        self.findings: list[Finding] = []
        self.inside: list[tuple[str, Callable[[Record], float]]] = []

    def module(self, name: str, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        record = self.records[name]
        self.inside = []
        y = work(record.input.to(x.dtype) if record.input.is_floating_point() else record.input)
        error = relative(y, record.output)
        culprit = None
        if error > self.limit:
            culprit = next((what for what, judge in self.inside if judge(record) > self.limit), None)
        self.findings.append(Finding(name, self.rank, error, culprit))
        return y

    def share(self, name: str, x: Tensor, first: int) -> None:
        def judge(record: Record) -> float:
            whole = record.shares[name]
            mine = whole[..., first : first + x.shape[-1]]
            # Padding beyond the reference's last feature is nobody's business here.
            return relative(x[..., : mine.shape[-1]], mine)

        self.inside.append((name, judge))

    def summand(self, name: str, partial: Tensor, compute: Summand, first: int, count: int) -> None:
        self.inside.append((name, lambda record: relative(partial, record.summands[name](first, count))))
