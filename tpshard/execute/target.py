"""What stands where an output shall go: is it ours to resume, ours to replace, or somebody's to leave alone?"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, LocalIOError, TargetError, local_error
from tpshard.execute.writer import read_journal
from tpshard.storage.checksums import read_sums
from tpshard.storage.files import Files, require_space
from tpshard.storage.lock import Lock
from tpshard.storage.names import LOCK, MANIFEST, PARTIAL, RANK_STEM, SUMS, journal_path, side_files

Ours = Callable[[str], bool]
"""Whether some format gives its files such a name."""
_MOUNTED = {"lost+found"}  # what a new ext4 file system holds
_RANK = RANK_STEM.replace("(\\d", "(?:\\d")
_TEMPORARY = re.compile(rf"\.(.+?)(\.{_RANK}\.lock)?\.(tmp|journal|lock)")
_SET = re.compile(rf"{_RANK}((-part-\d{{5}}-of-\d{{5}})?\.safetensors|\.json)?|tpshard(\.json)?|{SUMS}")
_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def is_empty(directory: Path) -> bool:
    """Whether nothing is in a directory that anybody put there."""
    return not names_in(directory)


def names_in(directory: Path) -> set[str]:
    """The files in a directory and its folders, and empty folders; not what the system keeps there."""
    found = set()
    for name in set(os.listdir(directory)) - _MOUNTED:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            found |= {f"{name}/{below}" for below in names_in(path)} or {name}
        else:
            found.add(name)
    return found


def remove_all(files: Files, directory: Path, names: set[str]) -> None:
    """Remove files of a directory, and the folders that held nothing else.

    Last go SHA256SUMS and the mark of a run of ours: while they are there, what is left is known as ours.
    """
    folders = folders_of(names)
    for name in sorted(names - {SUMS, LOCK}):
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            folders.add(name)
        else:
            files.unlink(str(path))
    for folder in sorted(folders, reverse=True):
        try:
            files.rmdir(str(directory / folder))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):  # something else is in it
                raise
    for name in (SUMS, LOCK):
        if name in names:
            files.unlink(str(directory / name))


def folders_of(names: Iterable[str]) -> set[str]:
    """The folders in which files of these names lie, without the directory itself."""
    return {str(folder) for name in names for folder in Path(name).parents} - {"."}


def replaceable(directory: Path) -> bool:
    """Whether a directory can be renamed over: not where a disk is mounted, nor where its parent is read-only."""
    if os.path.ismount(directory) or os.path.samefile(directory, os.curdir):
        return False
    return os.access(directory.parent, os.W_OK)


def strangers(directory: Path, expected: set[str], ours: Ours, *, models: bool) -> list[str]:
    """Names in a directory that tpshard never gives. ours: whether some format gives such a name.

    models: whether names of an ordinary checkpoint may be ours. Any other name is ours where SHA256SUMS lists it.
    """
    listed = _listed(directory)

    def is_ours(name: str) -> bool:
        folder, slash, name = name.rpartition("/")
        while match := _TEMPORARY.fullmatch(name):
            name = match[1]
        name = folder + slash + name
        name = name.removesuffix(PARTIAL)
        if _SET.fullmatch(name) or (models and _MODEL.fullmatch(name)) or side_files({name}):
            return True
        return name in expected or name in listed or ours(name)  # last of all: it looks into every format

    found = names_in(directory) - folders_of({*expected, *listed})  # which a run that was killed may have left empty
    return sorted(n for n in found if (directory / n).is_dir() or not (n in expected or is_ours(n)))


def _listed(directory: Path) -> Collection[str]:
    """What SHA256SUMS lists of an output of ours, whole or begun; nothing of another directory."""
    path = directory / SUMS
    if not any((directory / name).is_file() for name in (MANIFEST, LOCK)):
        return ()
    try:
        return read_sums(path.read_bytes()).keys()
    except (FileNotFoundError, ValueError):
        return ()
    except OSError as error:  # not known is not somebody else's
        raise local_error(error, "cannot read", path) from error


def check_target(out: Path, expected: set[str], ours: Ours, *, models: bool, overwrite: bool) -> None:
    """TargetError when `out` exists and is not empty, unless it is ours to replace."""
    if not out.exists() or (out.is_dir() and is_empty(out)):
        return
    if not out.is_dir():
        raise TargetError("the output exists and is not a directory", path=out, hint="give another with -o")
    if not overwrite:
        raise TargetError(
            "the output exists", path=out, hint="replace it with --overwrite, or give another directory with -o"
        )
    if not replaceable(out):
        what = "the output cannot be replaced as a whole: a disk is mounted there, or its parent is read-only"
        raise TargetError(what, path=out, hint="remove what is in it, or give another directory with -o")
    if found := strangers(out, expected, ours, models=models):
        message = "the output holds files that tpshard did not write, and is not replaced"
        raise TargetError(message, path=out, found=found[0], hint="move them away, or give another directory with -o")


def only_in_place(out: Path) -> bool:
    """Whether an output has to grow where it is: it cannot be renamed over, and is empty, or was begun so."""
    return out.is_dir() and not replaceable(out) and (is_empty(out) or (out / LOCK).exists())


def end_finished(files: Files, out: Path) -> None:
    """Remove the lock of a run that was killed between its last rename and its end.

    One that is just ending holds it: then it stays, and the output is there all the same.
    """
    if (out / LOCK).exists():
        with contextlib.suppress(LocalIOError), Lock(files, out / LOCK) as lock:
            lock.remove()


def check_room(files: Files, out: Path, needed: int, verb: str, *, shared: bool, overwrite: bool) -> None:
    """Refuse at once what cannot be written to `out`, before anything is planned in detail.

    TargetError when something is there, LocalIOError when the disk is too small for `needed` bytes even if all that an
    earlier run left were of use. `publish` looks more closely, also at what --overwrite would replace.
    """
    if overwrite:
        return
    try:
        out = named(out)
        if not shared and not only_in_place(out):
            end_finished(files, out)
            check_target(out, set(), lambda name: False, models=False, overwrite=False)
        left = [each for each in (out, out.with_name(out.name + PARTIAL)) if each.is_dir()]
        there = sum(entry.stat().st_size for each in left for entry in os.scandir(each) if entry.is_file())
        require_space(out, needed - there, hint=no_room(verb))
    except OSError as error:
        raise local_error(error, "cannot write") from error


def named(out: Path) -> Path:
    """The directory itself, where the path is a link or ends with none."""
    return out.resolve() if out.is_symlink() or out.name in ("", "..") else out


def no_room(verb: str) -> str:
    """The way out of a disk that is too small."""
    fewer = "" if verb == "merge" else ", or write some of the ranks here and the others elsewhere with --ranks"
    return f"free some space, or give another disk with -o{fewer}"


def check_leftovers(
    files: Files,
    work: Path,
    expected: set[str],
    ours: Ours,
    runs: Mapping[str, str],
    keep: set[str],
    *,
    overwrite: bool,
) -> None:
    """What an earlier run left in the staging directory is of these runs, or is removed with --overwrite.

    runs: by output file. keep: names of the locks that are held.
    """
    others = sorted(names_in(work) - expected) or other_runs(work, runs)
    if not others:
        return
    if found := strangers(work, expected, ours, models=True):
        what = "the directory for unfinished output holds files that tpshard did not write"
        raise TargetError(what, path=work, found=found[0], hint="move them away, or give another output with -o")
    if not overwrite:
        message = "an unfinished run with other options, or of another source, left its files here"
        hint = "repeat that command to finish it, or start anew with --overwrite"
        raise TargetError(message, path=work, found=others[0], hint=hint)
    remove_all(files, work, names_in(work) - keep)  # journals first, so that none vouches for what is gone


def check_shared(
    work: Path, expected: set[str], ours: Ours, manifest: bytes, runs: Mapping[str, str], records: Mapping[str, bytes]
) -> None:
    """A directory that several hosts write into is of this very set, and our ranks in it of these runs.

    records: by name, the files that say of a rank that it is complete, as `is_written` takes them.
    """
    path = work / MANIFEST
    if not path.exists() and (found := strangers(work, expected, ours, models=False)):
        hint = "give an empty directory, or one that does not exist, with -o"
        raise TargetError("the directory holds other files and no shard set", path=work, found=found[0], hint=hint)
    if path.exists() and path.read_bytes() != manifest:
        raise TargetError(
            "this directory holds another set",
            path=path,
            hint="every host must give the same model, revision and options; or give another directory with -o",
        )
    if done := [name for name, expected in records.items() if is_written(work / name, expected)]:
        what = "another run has just finished here"
        raise TargetError(what, path=work / done[0], hint="give the command again if ranks are missing")
    if others := other_runs(work, runs):
        raise TargetError(
            "an unfinished run with other options, or of another source, left its files here",
            path=work / others[0],
            hint=f"repeat that command to finish it, or remove {others[0]}* and .{others[0]}* to start anew",
        )


def is_written(path: Path, expected: bytes) -> bool:
    """Whether a rank is complete: its record at `path` is of this set, and the files beside it have their sizes.

    expected: the record as it is planned; its checksums do not count. CorruptError when the record cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise local_error(error, "cannot read", path) from error
    except ValueError:
        raise CorruptError(
            "the rank's record cannot be read", path=path, hint="remove it to write the rank again"
        ) from None
    planned = json.loads(expected)
    if _without_checksums(found) != _without_checksums(planned):
        return False
    files = [(path.parent / part["file"], part["size"]) for part in planned["parts"]]
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def _without_checksums(record: Any) -> Any:
    try:
        return record | {"parts": [part | {"sha256": None} for part in record["parts"]]}
    except (TypeError, KeyError):
        return None


def other_runs(work: Path, runs: Mapping[str, str]) -> list[str]:
    """The output files that another run has begun."""
    journals = {name: read_journal(journal_path(work, name)) for name in runs}
    return [name for name, journal in journals.items() if journal and journal["run"] != runs[name]]
