"""Casts of floating-point weights, by torch."""

import threading
from dataclasses import dataclass, field

from tpshard.errors import UnsupportedError
from tpshard.planning.model import DTYPE_NAMES
from tpshard.storage.torch_pickle import DTYPES  # before torch: it says what to do when torch is missing

import torch  # isort: skip  # noqa: E402

_LISTED = 5
_NAMES = {code: name for name, code in DTYPE_NAMES.items()}


@dataclass
class Cast:
    """Casts blocks, and counts by tensor the values that become zero and are not. Threads share it.

    refuse: whether a finite value that becomes infinite is an UnsupportedError.
    """

    refuse: bool = True
    lost: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    target: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, block: memoryview, source: str, target: str, tensor: str) -> memoryview:
        """A block of a tensor in another dtype, rounded as torch does; NaN becomes the target's default NaN.

        Shape [n] → [n].
        """
        before = torch.frombuffer(block, dtype=DTYPES[source])
        after = before.to(DTYPES[target])
        # What torch makes of a NaN's payload depends on the processor, and on where in the block it lies. A sum is NaN
        # where any element is, and takes a tenth of the time that looking at each does.
        if after.sum().isnan():
            after[after.isnan()] = torch.nan
        if torch.finfo(after.dtype).max < torch.finfo(before.dtype).max:
            self._look(before, after, target, tensor)
        return after.view(torch.uint8).numpy().data

    def _look(self, before: torch.Tensor, after: torch.Tensor, target: str, tensor: str) -> None:
        """Refuse what the target has no number for, and count what is too small for it."""
        beyond = after.isinf() & ~before.isinf()
        if self.refuse and bool(beyond.any()):
            largest, most = before[beyond].abs().max().item(), torch.finfo(after.dtype).max
            raise UnsupportedError(
                f"{tensor} has values that {_NAMES[target]} has no number for: they would become infinite",
                tensor=tensor,
                expected=f"at most {most:g}",
                found=f"{largest:g}",
                hint="--dtype bfloat16 has the range; --allow-overflow writes infinity in their place",
            )
        kept = int(after.count_nonzero())
        lost = int(before.count_nonzero()) - kept
        with self._lock:
            self.target = _NAMES[target]
            self.kept[tensor] = self.kept.get(tensor, 0) + kept
            if lost:
                self.lost[tensor] = self.lost.get(tensor, 0) + lost

    def notes(self) -> list[str]:
        """What became zero: the tensors of which least is left, and how many more there are."""
        share = {name: lost / (lost + self.kept[name]) for name, lost in self.lost.items()}
        worst = sorted(share, key=lambda name: (-share[name], name))
        notes = []
        for name in worst[:_LISTED]:
            lost, all_of = self.lost[name], self.lost[name] + self.kept[name]
            what = f"all {lost:,} values of {name}" if lost == all_of else f"{lost:,} of {all_of:,} values of {name}"
            notes.append(f"{what} became zero in {self.target}: they are too small for it")
        if more := worst[_LISTED:]:
            lost = sum(self.lost[name] for name in more)
            notes.append(f"{lost:,} values of {len(more)} more tensors became zero in {self.target}")
        return notes
