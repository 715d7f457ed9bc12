"""An engine's parameters on pipeline stages: each has those of its layers, the ends what stands before and behind."""

from collections.abc import Iterable, Sequence

from tpshard.formats.engine_patterns import fits_any
from tpshard.formats.engine_tables import EngineFamily
from tpshard.planning.layout import Row, RowKind
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.stages import Stages
from tpshard.storage.names import NOT_LOADED
from tpshard.storage.tensor_names import numbered


def on_stages(rows: Iterable[Row], family: EngineFamily, model: Model, stages: Stages, mesh: Mesh) -> list[Row]:
    """Rows of one stage's ranks as rows of all stages' ranks.

    The embedding that is the head too has the head's name in the file of one stage; of several, the first has it under
    its own, and the last under the head's. What the engine does not load lies with the first rank.
    """
    embedding = next(iter(model.tied.values()), "")
    placed: dict[tuple[RowKind, tuple[int, ...]], RowKind] = {}
    found = []
    for row in rows:
        names = [row.name]
        if row.name.startswith(f"{NOT_LOADED}."):
            on: Sequence[tuple[int, ...]] = [(0,)]
        elif row.tensors:
            where = stages.of(row.tensors[0], model.full_name(row.tensors[0]))
            on = [where]
            if len(where) > 1 and (first := family.rename(f"{embedding}.weight")) != row.name:
                names, on = [first, row.name], [(stage,) for stage in where]
        else:
            _, numbers = numbered(row.name)
            on = [stages.of_layer(numbers[0] if numbers else stages.layers.count)]
        if fits_any(family.every_stage, row.name):
            names, on = [row.name], [tuple(range(mesh.pp))]
        for name, where in zip(names, on, strict=True):
            if (row.kind, where) not in placed:
                placed[row.kind, where] = _at(row.kind, where, mesh)
            found.append(Row(name, row.tensors, placed[row.kind, where]))
    return found


def _at(kind: RowKind, where: Sequence[int], mesh: Mesh) -> RowKind:
    """The kind whose shares the ranks of some stages have, and no others."""
    places = map(mesh.coordinate, range(mesh.size))
    return RowKind(tuple(kind.shares[tp] if pp in where else None for pp, tp in places))
