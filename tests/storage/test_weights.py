"""Which files hold the weights: what is read, and what is downloaded to be read, are selected alike."""

from __future__ import annotations

import json
from itertools import chain, combinations

import pytest

from tpshard.errors import CorruptError, TpshardError, UnsupportedError
from tpshard.storage.weights import files_to_download, preferred, weight_files

PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BINS = ["pytorch_model-00001-of-00001.bin"]
CONTENT = {
    "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", PARTS, strict=True))}).encode(),
    "pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": BINS[0]}, "metadata": {"total_size": 8}}).encode(),
}
FORMS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("present", list(chain.from_iterable(combinations(FORMS, n) for n in range(1, 5))))
def test_the_first_form_that_is_there_is_read_and_downloaded(present: tuple[str, ...]) -> None:
    """Safetensors before pickles, as transformers has it; an index whose files are not there is no set."""
    first = next(name for name in FORMS if name in present)
    files = {FORMS[1]: PARTS, FORMS[3]: BINS}.get(first, [first])
    names = {*present, *files}
    assert preferred(names, CONTENT.__getitem__, "model") == first
    read, weight_map, total = weight_files(names, CONTENT.__getitem__, "model")
    assert (read, weight_map is not None, total) == (files, first in CONTENT, 8 if first == FORMS[3] else None)
    if first in FORMS[:2]:  # of pickles, loose safetensors beside them are preferred
        for allow_pickle in (False, True):
            fetched = files_to_download(names, allow_pickle, CONTENT.__getitem__, "org/model")
            assert set(fetched) == {first, *files}


def test_pickles_are_downloaded_only_where_they_are_allowed_and_nothing_better_is_there() -> None:
    names = {"pytorch_model.bin.index.json", *BINS, "optimizer.bin"}
    assert files_to_download(names, False, CONTENT.__getitem__, "org/model") == ()
    assert files_to_download(names, True, CONTENT.__getitem__, "org/model") == ("pytorch_model.bin.index.json", *BINS)
    more = {*names, "ema.safetensors"}
    assert files_to_download(more, True, CONTENT.__getitem__, "org/model") == ("ema.safetensors",)


@pytest.mark.parametrize(("single", "index", "parts"), [(*FORMS[:2], PARTS), (*FORMS[2:], BINS)])
def test_two_sets_of_the_same_weights_are_refused(single: str, index: str, parts: list[str]) -> None:
    names = {single, index, *parts}
    for choose in (
        lambda: weight_files(names, CONTENT.__getitem__, "model"),
        lambda: files_to_download(names, True, CONTENT.__getitem__, "model"),
    ):
        with pytest.raises(CorruptError, match="two sets of the same weights") as caught:
            choose()
        assert single in str(caught.value.hint)
    listing = {"weight_map": {"a": single, "b": parts[0]}}
    read = {index: json.dumps(listing).encode()}.__getitem__
    assert weight_files(names, read, "model")[0] == sorted({single, parts[0]}), "the index lists both"


def test_weights_of_other_names_alone_are_refused_by_name() -> None:
    def unread(name: str) -> bytes:
        raise AssertionError(f"{name} is not needed")

    with pytest.raises(UnsupportedError) as caught:
        weight_files({"config.json", "b.gguf", "a.safetensors"}, unread, "place")
    assert (caught.value.path, caught.value.found) == ("place", "b.gguf")
    with pytest.raises(TpshardError, match="no weights found"):
        weight_files({"config.json"}, unread, "place")
