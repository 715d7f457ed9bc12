"""What all formats share: options, the planned split, and the interface of a format."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from tpshard.errors import CorruptError
from tpshard.formats.manifest import compact, integers
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.planning.axes import Axis
from tpshard.planning.box import corner
from tpshard.planning.join import OutputFile, output_file, parts_by_size
from tpshard.planning.layout import StoredTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.storage.local import Content
from tpshard.storage.names import CONFIG

_P = ParamSpec("_P")
_R = TypeVar("_R")


def reads_config(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function that does nothing but read a config.json raise CorruptError where a value is of another kind."""

    @wraps(function)
    def read(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what, found = "a value in config.json is not what its key asks for", f"{type(error).__name__}: {error}"
            raise CorruptError(what, path=CONFIG, found=found) from None

    return read


CUT_ANEW = "whoever loads it cuts it anew for ranks of its own"


class Format(ABC):
    """An on-disk format: what each rank stores, and in which files.

    side_names: small files that the source does not have. container: the files are no safetensors files, and all bytes
    of them but the tensors' follow from the split. own_names: each rank stores its share of each tensor of the model as
    one tensor under the same name, in the model's order. has_ranks: the files are those of a shard set. has_stages: it
    holds pipelines. has_experts: it holds whole experts that are dealt to ranks. no_quantised: why it holds no
    quantised models, empty where it does. no_advice: why its files are not what the ranks of an engine hold, so that
    nothing is advised about them; empty where they are. folder: in which the ranks' files lie, if not in the set's
    directory itself; names of files begin with it.
    """

    side_names: frozenset[str] = frozenset()
    container: bool = False
    own_names: bool = False
    has_ranks: bool = True
    has_stages: bool = False
    has_experts: bool = False
    no_quantised: str = ""
    no_advice: str = ""
    folder: str = ""

    @abstractmethod
    def lay(self, model: Model, options: Options) -> RankLayouts:
        """The ranks' stored tensors. UnsupportedError for a model or options that the format cannot hold."""

    @abstractmethod
    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """The name of a rank's file."""

    @abstractmethod
    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """What a file's name says of `rank` and `ranks` of a stage, `stage`, `part`, `parts`; None of other files."""

    def place(self, name: str, mesh: Mesh) -> Mapping[str, int] | None:
        """The same of a file in a set of this mesh, where the name alone leaves it open."""
        return self.parse_name(name)

    def notes(self, split: Split, out: Path | None = None) -> tuple[str, ...]:
        """What whoever loads the set must know of it. out: where it is written."""
        return ()

    def metadata(self, split: Split, tensors: Sequence[StoredTensor]) -> dict[str, str]:
        """What a file's safetensors metadata says beside what says every file's."""
        return {}

    def files(self, split: Split, rank: int) -> tuple[OutputFile, ...]:
        """The files of one rank. To be called through the split, which remembers them."""
        parts = parts_by_size(split.layout[rank], split.options.max_file_size)
        return tuple(
            output_file(
                self.file_name(rank, split.options.mesh, index, len(parts)),
                tensors,
                {**split.metadata(rank, index, len(parts)), **self.metadata(split, tensors)},
            )
            for index, tensors in enumerate(parts)
        )

    def side_files(self, split: Split, small: Mapping[str, Content]) -> dict[str, Content]:
        """The small files beside the ranks': the source's, and what the engine wants of its own."""
        return {**small, **self.derived(split)}

    def derived(self, split: Split) -> dict[str, bytes]:
        """Those of the side files that follow from the split alone: who opens a set compares every byte of them."""
        return {}


def bare(axis: Axis) -> Axis:
    """An axis for an engine that neither pads nor repeats it."""
    return replace(axis, pad=False, replicate=False, group=None)


def saved_offsets(tensors: Sequence[StoredTensor]) -> dict[str, str]:
    """torch's description of the rectangles that a safetensors file holds; its reader wants it of every tensor."""
    info = (f'{compact(each.name)}:{{"saved_offsets":{integers(corner(each.parts[0].box))}}}' for each in tensors)
    return {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": f"{{{','.join(info)}}}"}
