"""The verb behind `tpshard verify`: finds the source, compares bytes as `check` does, and runs the shards beside it.

`tpshard.verify` computes and knows nothing of rules and plans; what needs them is done here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpshard.errors import CorruptError, DifferentError, HubError, UnsupportedError, UsageError
from tpshard.storage.names import MANIFEST
from tpshard.verifier import launch
from tpshard.verifier.ranks.names import width
from tpshard.verifier.report.verdict import Tier, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from tpshard.verifier.group import Processes

TIERS = ("bytes", "exact", "native")
REFERENCES = ("tpshard", "transformers")
ENGINES = ("auto", "tpshard", "transformers")
DEVICES = ("auto", "cpu", "cuda")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is to be verified, and how. tiers None: all that can run here. source None: it is looked for.

    layers None: all. stream None: as memory asks. nproc None: a process for each rank on a host with several GPUs.
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
    rules: Path | None = None
    allow_pickle: bool = False
    nproc: int | None = None

    def __post_init__(self) -> None:
        for what, given, known in (
            ("tier", self.tiers or (), TIERS),
            ("device", (self.device.partition(":")[0],), DEVICES),
            ("reference", (self.reference,), REFERENCES),
            ("engine", (self.engine,), ENGINES),
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
        return tuple(tier for tier in TIERS[1:] if self.tiers is None or tier in self.tiers)


def is_first() -> bool:
    """Whether this process speaks for its group: the only one, or rank 0 of those that torchrun or SLURM started."""
    group = launch.surroundings()
    return group is None or group.rank == 0


def verify(
    shards: str | Path,
    source: str | Path | None = None,
    *,
    tiers: Sequence[str] | None = None,
    device: str = "auto",
    tokens: int = 32,
    seed: int = 0,
    float32: bool = False,
    layers: Sequence[int] | None = None,
    stream: bool | None = None,
    sequence_parallel: bool = False,
    reference: str = "tpshard",
    engine: str = "auto",
    prompt: str | None = None,
    revision: str | None = None,
    rules: str | Path | None = None,
    allow_pickle: bool = False,
    nproc: int | None = None,
    say: Say = lambda line: None,
) -> Verdict:
    """Judge whether shards, run tensor-parallel, compute the function of the unsharded model.

    The options are those of `tpshard verify`; `Request` describes them. A difference is in the verdict; what cannot be
    judged at all raises. In a group of processes that torchrun or SLURM started, every rank gets the verdict.
    """
    request = Request(
        shards=Path(shards),
        source=None if source is None else str(source),
        tiers=None if tiers is None else tuple(tiers),
        device=device,
        tokens=tokens,
        seed=seed,
        float32=float32,
        layers=None if layers is None else tuple(layers),
        stream=stream,
        sequence_parallel=sequence_parallel,
        reference=reference,
        engine=engine,
        prompt=prompt,
        revision=revision,
        rules=None if rules is None else Path(rules),
        allow_pickle=allow_pickle,
        nproc=nproc,
    )
    return verify_with(request, say)


def verify_with(request: Request, say: Say) -> Verdict:
    """The verdict that a request asks for."""
    group = launch.surroundings()
    if group is not None:
        if request.nproc is not None:
            raise UsageError("a group of processes is here already", found=f"{group.size} processes of {group.starter}")
        talk = say if group.rank == 0 else lambda line: None
        return launch.join(group, request.device, lambda team, sharing: judge(request, team, sharing, talk))
    tp = width(request.shards)
    count = _processes(request, tp)
    if count == 1:
        return judge(request, None, 1, say)
    verdict: Verdict = launch.start("tpshard.api.verify_worker", request, count, say)
    return verdict


def _processes(request: Request, tp: int) -> int:
    """How many processes to start here: 1 or tp."""
    if request.nproc not in (None, 1, tp):
        raise UsageError(
            "one process for all ranks, or one for each",
            path=request.shards,
            expected=f"--nproc-per-node 1 or {tp}",
            found=request.nproc,
        )
    if not request.computed or not find_spec("torch"):
        return 1
    if request.nproc is None and request.device in ("auto", "cuda") and tp > 1:
        import torch

        return tp if torch.cuda.device_count() > 1 else 1
    return request.nproc or 1


def judge(request: Request, team: Processes | None, sharing: int, say: Say) -> Verdict:
    """The verdict, by the ranks of `team`, or by threads of this process. `sharing`: processes with one device."""
    asked = request.tiers is not None or request.engine != "auto"
    computed = request.computed
    skipped: list[Tier] = []
    if computed and not find_spec("torch"):
        if asked:
            raise UnsupportedError("this needs torch, which is not installed", hint="pip install 'tpshard[torch]'")
        skipped += [Tier(name, "skipped", reason="torch is not installed") for name in computed]
        computed = ()
    source = _together(team, lambda: find_source(request, say))

    def compare() -> Tier:
        say("bytes tier")
        return bytes_tier(request, source, alone=not computed)

    if not computed:
        tier = compare() if team is None else team.once(compare)
        return _by_bytes(request, source, tier, skipped)
    try:
        verdict = _computed(request, source, team, sharing, computed, compare, say)
    except UnsupportedError as error:
        if asked:
            raise
        reason = f"{error}: {error.hint}" if error.hint else str(error)
        # What no package would mend is no matter of this machine: nothing has run these shards.
        status = "inconclusive" if find_spec("transformers") else "skipped"
        skipped = [Tier(name, status, reason=reason) for name in computed]
        tier = compare() if team is None else team.once(compare)
        return _by_bytes(request, source, tier, skipped)
    return replace(verdict, source=_name(source))


def _together(team: Processes | None, work: Callable[[], Path]) -> Path:
    return work() if team is None else team.together(work)


def _computed(
    request: Request,
    source: Path,
    team: Processes | None,
    sharing: int,
    tiers: Sequence[str],
    compare: Callable[[], Tier],
    say: Say,
) -> Verdict:
    from tpshard.verifier.run import verify as run

    ids = None
    if request.prompt is not None:
        text = request.prompt
        ids = team.together(lambda: prompt_tokens(text, source)) if team else prompt_tokens(text, source)
    return run(
        request.shards,
        source,
        tiers=tiers,
        device=request.device,
        tokens=request.tokens,
        seed=request.seed,
        float32=request.float32,
        layers=request.layers,
        stream=request.stream,
        sequence_parallel=request.sequence_parallel,
        reference=request.reference,
        engine=request.engine,
        prompt=ids,
        team=team,
        sharing=sharing,
        load_rank=lambda rank, device: _load_rank(request.shards, rank, device),
        first=compare if request.tiers is None or "bytes" in request.tiers else None,
        allow_pickle=request.allow_pickle,
        say=say,
    )


def _load_rank(shards: Path, rank: int, device: Any) -> Mapping[str, Tensor] | None:
    """A rank's tensors on a device; None where the set is not as its manifest says, which is for the tiers to judge."""
    from tpshard.api.load import load_rank

    try:
        return load_rank(shards, rank, device)
    except (CorruptError, UsageError):
        return None


def find_source(request: Request, say: Say) -> Path:
    """The unsharded model's directory or file, downloaded if it is a Hub repo; by the manifest where none is given."""
    if not request.shards.is_dir():
        hint = "give the directory that `tpshard split` wrote"
        raise UsageError("no such directory", path=request.shards, hint=hint)
    if request.source is not None:
        return _local(request.source, request.revision, request.allow_pickle, say)
    named = _recorded(request.shards)
    name = str(named.get("name") or "")
    repo, revision = named.get("repo_id"), request.revision or named.get("revision")
    reason = None
    if repo:
        try:
            return _local(repo, revision, request.allow_pickle, say)
        except HubError as error:
            reason = str(error)
    base = name.rpartition("/")[2]
    for place in (request.shards.absolute().parent, Path.cwd()):
        found = place / base
        if base and (found / "config.json").is_file() and not (found / MANIFEST).exists():
            say(f"source: {found}")
            return found
    raise UsageError(
        f"the model that was split was not found: {name}"
        if name
        else "the shards do not name the model that was split",
        path=request.shards,
        found=reason,
        hint="give the model that was split with --source",
    )


def _local(source: str, revision: str | None, allow_pickle: bool, say: Say) -> Path:
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise UsageError("--revision is for a Hub repo", path=path, hint="leave it out for a local path")
        return path
    from tpshard.storage import hub

    if not hub.is_repo_id(source):
        raise UsageError(
            "no such file or directory",
            path=path,
            hint="give a directory, a .safetensors file, or a Hub repo as org/name with --source",
        )
    snapshot = hub.download(source, revision, allow_pickle=allow_pickle)
    if snapshot.note:
        say(snapshot.note)
    return snapshot.path


def _name(source: Path) -> str:
    """The repo's name where the source is a snapshot in the Hub's cache, else the directory's."""
    real = source.absolute()
    repo = real.parent.parent.name
    if real.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    return real.name


def _recorded(shards: Path) -> Mapping[str, Any]:
    """What the manifest says of the source; nothing when it cannot be read, which the tiers will complain of."""
    try:
        source = json.loads((shards / MANIFEST).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return source if isinstance(source, dict) else {}


def bytes_tier(request: Request, source: Path, *, alone: bool) -> Tier:
    """What `tpshard check --source` finds. Where other tiers judge as well, files that contradict each other differ."""
    from tpshard.api.check import check

    try:
        report = check(request.shards, source, rules=request.rules, allow_pickle=request.allow_pickle)
    except (CorruptError, DifferentError) as error:
        if alone or not (request.shards / MANIFEST).exists():
            return _cannot(request, error)
        return Tier("bytes", "fail", reason=str(error))
    except (UsageError, UnsupportedError) as error:
        return _cannot(request, error)
    if report.equal:
        return Tier("bytes", "pass", {"differences": 0}, {"differences": 0})
    count = len(report.differences)
    return Tier("bytes", "fail", {"differences": 0}, {"differences": count}, reason=report.summary)


def _cannot(request: Request, error: Exception) -> Tier:
    """The bytes tier where it could not run: an error if it was asked for, else left out."""
    if request.tiers is not None or not isinstance(error, (UsageError, UnsupportedError, CorruptError)):
        raise error
    return Tier("bytes", "skipped", reason=str(error))


def _by_bytes(request: Request, source: Path, tier: Tier, skipped: Sequence[Tier]) -> Verdict:
    """The verdict where bytes were all that could be judged."""
    return Verdict(
        model_type=str(_config(source).get("model_type")),
        tp=width(request.shards),
        source=_name(source),
        shards=request.shards.name,
        tiers=(tier, *skipped),
        canaries=(),
        settings={"tiers": [tier.name]},
    )


def _config(source: Path) -> Mapping[str, Any]:
    path = (source if source.is_dir() else source.parent) / "config.json"
    config = json.loads(path.read_bytes())
    return config if isinstance(config, dict) else {}


def prompt_tokens(text: str, source: Path) -> Tensor:
    """A text as token ids [1, length], by the model's tokenizer; no code of the model's is run."""
    import torch

    directory = source if source.is_dir() else source.parent
    if find_spec("transformers"):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            ids = tokenizer(text)["input_ids"]
        except Exception as error:  # it raises whatever its parts raise
            raise _no_tokenizer(directory, str(error).split("\n")[0]) from None
    elif find_spec("tokenizers"):
        from tokenizers import Tokenizer

        try:
            ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
        except Exception as error:  # the library raises bare Exceptions
            raise _no_tokenizer(directory, str(error)) from None
    else:
        raise UnsupportedError("--prompt needs a tokenizer", hint="pip install transformers, or tokenizers")
    if not ids:
        raise UsageError("the prompt has no tokens", found=repr(text), hint="give a longer text with --prompt")
    return torch.tensor([ids])


def _no_tokenizer(directory: Path, found: str) -> UsageError:
    return UsageError(
        "the model's tokenizer cannot be used",
        path=directory,
        found=found,
        hint="leave out --prompt: token ids then come from --seed",
    )
