"""The verb behind `tpshard verify`: finds the source, compares bytes as `check` does, and runs the shards beside it.

`tpshard.verify` computes and knows nothing of rules and plans; what needs them is done here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tpshard.errors import CorruptError, DifferentError, HubError, UnsupportedError, UsageError
from tpshard.inputs.checkpoint import config_in
from tpshard.storage.local import cached_repo
from tpshard.storage.names import MANIFEST
from tpshard.verifier import launch
from tpshard.verifier.options import Say, silent
from tpshard.verifier.options import VerifyOptions as VerifyOptions
from tpshard.verifier.ranks.names import width
from tpshard.verifier.report.verdict import Tier, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from tpshard.verifier.group import Processes

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process speaks for its group: the only one, or rank 0 of those that torchrun or SLURM started."""
    group = launch.surroundings()
    return group is None or group.rank == 0


def has_spoken() -> None:
    """The process that speaks for its group has said all it has to say, and the others may end."""
    launch.spoken()


def was_spoken_for() -> bool:
    """Whether the one that speaks for this process has done so, which is waited for: torchrun stops it otherwise."""
    return launch.heard()


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
    allow_not_run: Sequence[str] = (),
    follow_symlinks: bool = False,
    say: Say = silent,
) -> Verdict:
    """Judge whether shards, run tensor-parallel, compute the function of the unsharded model.

    The options are those of `tpshard verify`; `VerifyOptions` describes them. A difference is in the verdict; what
    cannot be judged at all raises. In a group of processes that torchrun or SLURM started, every rank gets the verdict.
    """
    source = None if source is None else str(source)
    chosen, kept = None if tiers is None else tuple(tiers), None if layers is None else tuple(layers)
    how = (device, tokens, seed, float32, kept, stream, sequence_parallel, reference, engine, prompt)
    options = VerifyOptions(
        Path(shards), source, chosen, *how, revision, rules, allow_pickle, nproc, tuple(allow_not_run), follow_symlinks
    )
    return verify_with(options, say)


def verify_with(options: VerifyOptions, say: Say) -> Verdict:
    """The verdict that the options ask for."""
    if isinstance(options.rules, str):
        from tpshard.rules.architecture import given_architecture

        architecture, by_name = given_architecture(options.rules)
        options = replace(options, model_type=architecture.model_types[0] if by_name else None)
    group = launch.surroundings()
    if group is not None:
        if options.nproc is not None:
            raise UsageError("a group of processes is here already", found=f"{group.size} processes of {group.starter}")
        talk = say if group.rank == 0 else silent
        return launch.join(group, options.device, lambda team, sharing: judge(options, team, sharing, talk))
    tp = width(options.shards)
    count = _processes(options, tp)
    if count == 1:
        return judge(options, None, 1, say)
    verdict: Verdict = launch.start("tpshard.api.verify_worker", options, count, say)
    return verdict


def _processes(options: VerifyOptions, tp: int) -> int:
    """How many processes to start here: 1 or tp."""
    if options.nproc not in (None, 1, tp):
        expected = f"--nproc-per-node 1 or {tp}"
        message = "one process for all ranks, or one for each"
        raise UsageError(message, path=options.shards, expected=expected, found=options.nproc)
    if not options.computed or not find_spec("torch"):
        return 1
    if options.nproc is None and options.device in ("auto", "cuda") and tp > 1:
        import torch

        return tp if torch.cuda.device_count() > 1 else 1
    return options.nproc or 1


def judge(options: VerifyOptions, team: Processes | None, sharing: int, say: Say) -> Verdict:
    """The verdict, by the ranks of `team`, or by threads of this process. `sharing`: processes with one device."""
    asked = options.tiers is not None or options.engine != "auto"
    computed = options.computed
    skipped: list[Tier] = []
    if computed and not find_spec("torch"):
        if asked:
            raise UnsupportedError("this needs torch, which is not installed", hint="pip install torch")
        reason = "torch is not installed, so nothing ran; `--tier bytes` asks for bytes alone"
        skipped, computed = [Tier(name, "inconclusive", reason=reason) for name in computed], ()
    source = _together(team, lambda: find_source(options, say))
    name = cached_repo(source)[0] or source.absolute().name

    def compare() -> Tier:
        say("bytes tier")
        return bytes_tier(options, source, alone=not computed)

    try:
        if computed:
            return replace(_computed(options, source, team, sharing, compare, say), source=name)
    except UnsupportedError as error:
        if asked:
            raise
        reason = f"{error}: {error.hint}" if error.hint else str(error)
        # What no package would mend is no matter of this machine: nothing has run these shards.
        status = "inconclusive" if find_spec("transformers") else "skipped"
        skipped = [Tier(each, status, reason=reason) for each in computed]
    return Verdict(
        tiers=(compare() if team is None else team.once(compare), *skipped),
        model_type=str(_config(source).get("model_type")),
        tp=width(options.shards),
        source=name,
        shards=options.shards.name,
        canaries=(),
        settings={"tiers": ["bytes"]},
    )


def _together(team: Processes | None, work: Callable[[], T]) -> T:
    return work() if team is None else team.together(work)


def _computed(
    options: VerifyOptions, source: Path, team: Processes | None, sharing: int, compare: Callable[[], Tier], say: Say
) -> Verdict:
    from tpshard.verifier.run import verify as run

    text = options.prompt
    return run(
        options,
        source,
        prompt=None if text is None else _together(team, lambda: prompt_tokens(text, source)),
        team=team,
        sharing=sharing,
        first=compare if options.runs("bytes") else None,
        say=say,
    )


def find_source(options: VerifyOptions, say: Say) -> Path:
    """The unsharded model's directory or file, downloaded if it is a Hub repo; by the manifest where none is given."""
    if not options.shards.is_dir():
        hint = "give the directory that `tpshard split` wrote"
        raise UsageError("no such directory", path=options.shards, hint=hint)
    if options.source is not None:
        return _local(options.source, options.revision, options.allow_pickle, say)
    named = _recorded(options.shards)
    name = str(named.get("name") or "")
    repo, revision = named.get("repo_id"), options.revision or named.get("revision")
    reason = None
    if repo:
        try:
            return _local(repo, revision, options.allow_pickle, say)
        except HubError as error:
            reason = str(error)
    base = name.rpartition("/")[2]
    for place in (options.shards.absolute().parent, Path.cwd()):
        found = place / base
        if base and (found / "config.json").is_file() and not (found / MANIFEST).exists():
            say(f"source: {found}")
            return found
    unnamed = "the shards do not name the model that was split"
    what = f"the model that was split was not found: {name}" if name else unnamed
    raise UsageError(what, path=options.shards, found=reason, hint="give the model that was split with --source")


def _local(source: str, revision: str | None, allow_pickle: bool, say: Say) -> Path:
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise UsageError("--revision is for a Hub repo", path=path, hint="leave it out for a local path")
        return path
    from tpshard.storage import hub

    if not hub.is_repo_id(source):
        hint = "give a directory, a .safetensors file, or a Hub repo as org/name with --source"
        raise UsageError("no such file or directory", path=path, hint=hint)
    with hub.named(source):
        snapshot = hub.download(source, revision, allow_pickle=allow_pickle)
    if snapshot.note:
        say(snapshot.note)
    return snapshot.path


def _recorded(shards: Path) -> Mapping[str, Any]:
    """What the manifest says of the source; nothing when it cannot be read, which the tiers will complain of."""
    try:
        source = json.loads((shards / MANIFEST).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return source if isinstance(source, dict) else {}


def bytes_tier(options: VerifyOptions, source: Path, *, alone: bool) -> Tier:
    """What `tpshard check --source` finds. Where other tiers judge as well, files that contradict each other differ."""
    from tpshard.api.check import check

    try:
        report = check(
            options.shards,
            source,
            rules=options.rules,
            allow_pickle=options.allow_pickle,
            follow_symlinks=options.follow_symlinks,
        )
    except (CorruptError, DifferentError, UsageError, UnsupportedError) as error:
        contradicting = isinstance(error, (CorruptError, DifferentError)) and (options.shards / MANIFEST).exists()
        if contradicting and not alone:
            return Tier("bytes", "fail", reason=str(error))
        if options.tiers is not None or isinstance(error, DifferentError):
            raise
        return Tier("bytes", "skipped", reason=str(error))
    found, reason = {"differences": len(report.differences)}, None if report.equal else report.summary
    return Tier("bytes", "pass" if report.equal else "fail", {"differences": 0}, found, reason=reason)


def _config(source: Path) -> Mapping[str, Any]:
    config = config_in(source if source.is_dir() else source.parent)
    return config if isinstance(config, dict) else {}


def prompt_tokens(text: str, source: Path) -> Tensor:
    """A text as token ids [1, length], by the model's tokenizer; no code of the model's is run."""
    import torch

    directory = source if source.is_dir() else source.parent
    if not (find_spec("transformers") or find_spec("tokenizers")):
        raise UnsupportedError("--prompt needs a tokenizer", hint="pip install transformers, or tokenizers")
    try:
        if find_spec("transformers"):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            ids = tokenizer(text)["input_ids"]
        else:
            from tokenizers import Tokenizer

            ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    except Exception as error:  # transformers raises whatever its parts raise, tokenizers bare Exceptions
        found, hint = str(error).split("\n")[0], "leave out --prompt: token ids then come from --seed"
        raise UsageError("the model's tokenizer cannot be used", path=directory, found=found, hint=hint) from None
    if not ids:
        raise UsageError("the prompt has no tokens", found=repr(text), hint="give a longer text with --prompt")
    return torch.tensor([ids])
