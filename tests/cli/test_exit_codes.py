"""docs/reference/exit-codes.md: each input that it names has a test that ends with that code."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import llama, tpshard
from tests.helpers.paths import TESTS
from tpshard.storage.files import Files

PAGE = TESTS.parent / "docs/reference/exit-codes.md"
EXAMPLES = {
    "`check` found a checksum or byte that differs": "test_shard_set.py::test_a_flipped_bit",
    "ranks that hold the same part differ": "test_shard_set.py::test_replicas_that_differ",
    "a set of another `--tp`": "test_shard_set.py::test_a_set_for_another_tp",
    "`advise` found no mesh with which the model fits": "test_capacity.py::test_advise_ends_with_1_where_nothing_fits",
    "an unknown option": "test_main.py::test_usage",
    "a path that is not there": "test_checkpoint.py::test_a_path_that_is_not_there",
    "a directory without a model": "test_checkpoint.py::test_a_directory_without_a_model",
    "the output is the source": "test_main.py::test_the_output_is_the_source",
    "a vocabulary that Megatron padded and nobody states the size of": (
        "test_from_megatron.py::test_a_vocabulary_whose_size_nobody_states"
    ),
    "a damaged header": "test_checkpoint.py::test_damaged_weights",
    "a shard missing": "test_checkpoint.py::test_listed_shards_missing",
    "an index that disagrees": "test_checkpoint.py::test_index_lists_a_tensor_in_another_shard",
    "two sets of the same weights": (
        "test_checkpoint.py::test_a_single_file_beside_an_index_that_does_not_name_it_is_a_second_set"
    ),
    "a Git-LFS pointer": "test_checkpoint.py::test_damaged_weights",
    "ranks missing or mixed": "test_shard_set.py::test_two_sets_in_one_directory",
    "a small file that `SHA256SUMS` contradicts": "test_checksums.py::test_check_compares_the_small_files_with_it",
    "config and tensors contradict each other": "test_checkpoint.py::test_config_that_contradicts_the_tensors",
    "a quantised weight without its scale": (
        "test_quantised.py::test_values_without_a_scale_and_a_scale_without_values"
    ),
    "`merge` or `reshard` reads a file that is not what its recorded checksum says": (
        "test_main.py::test_a_damaged_set_is_not_passed_on"
    ),
    "a tracker of Megatron that names a missing iteration": (
        "test_from_megatron.py::test_a_tracker_that_names_an_iteration_that_is_not_there"
    ),
    "no rules for the model_type": "test_checkpoint.py::test_unknown_model_type_names_the_closest",
    "a tp that cuts a unit": "test_checkpoint.py::test_a_tp_that_cuts_a_unit",
    "`--dtype` would make values infinite (`--allow-overflow`)": (
        "test_casts.py::test_what_would_become_infinite_is_refused"
    ),
    "a method of quantisation that is not known": "test_quantised.py::test_a_method_that_is_refused",
    "a directory that holds something else": "test_checkpoint.py::test_a_directory_that_holds_something_else",
    "names of a wrapper": "test_checkpoint.py::test_names_of_a_wrapper",
    "a hybrid model of Megatron": "test_from_megatron.py::test_a_hybrid_model",
    "an index or symlink that leaves the model": "test_checkpoint.py::test_a_symlink_that_leaves_the_model",
    "pickle without `--allow-pickle`": "test_torch_pickle.py::test_without_the_flag",
    "a pickle that calls functions": "test_torch_pickle.py::test_a_pickle_that_calls",
    "disk full": "test_exit_codes.py::test_a_disk_that_fails_in_the_middle",
    "no permission": "test_exit_codes.py::test_a_disk_that_fails_in_the_middle",
    "the disk reports an error": "test_exit_codes.py::test_a_disk_that_fails_in_the_middle",
    "the repo is not found or gated": "test_hub_repositories.py::test_not_on_the_hub",
    "the network fails": "test_hub_repositories.py::test_a_hub_that_fails",
    "offline and not in the cache": "test_hub_repositories.py::test_offline_without_a_copy",
    "what arrives is not what the Hub described": "test_hub_repositories.py::test_a_hub_that_lies_about_a_file",
    "or changes meanwhile": "test_hub_repositories.py::test_a_hub_that_moves_on_in_the_middle",
    "a tier of `verify` could not run": "test_verify_command.py::test_a_reference_that_was_asked_for_and_cannot_judge",
    "a fault injected on purpose was not noticed": "test_verdict.py::test_a_tier_that_misses_a_canary",
    "a tensor that nothing computes with is cut": "test_weights_tier.py::test_what_nothing_runs_and_is_cut",
    "a class of transformers is cut in a way that nobody here has seen": (
        "test_untried.py::test_a_cut_that_nobody_has_seen_is_named"
    ),
    "the device does not repeat itself: [inconclusive](../explanation/verdict.md#what-inconclusive-means)": (
        "test_weights_tier.py::test_a_device_that_does_not_repeat_itself"
    ),
    "the output exists": "test_main.py::test_the_output_exists",
    "another run is writing it": "test_main.py::test_a_second_run_on_the_same_target",
    "an unfinished run with other options left it": "test_main.py::test_ctrl_c_leaves_a_state_that_resumes",
    "a bug in tpshard: please report it": "test_main.py::test_a_bug_of_ours",
    "Ctrl-C: the same command resumes": "test_main.py::test_interrupted",
}


def documented() -> dict[str, int]:
    """Each example of the page, and its code."""
    found = {}
    for code, cell in re.findall(r"^\| (\d+) \|(?: `\w+`)? \| (.+?) \|$", PAGE.read_text(), re.M):
        found |= dict.fromkeys(re.split("[,;] ", cell), int(code))
    return found


def text_of(test: str, source: str) -> str:
    """A test's source (its name may go on), and that of the functions of its file that it calls."""
    functions = re.findall(r"^def (\w+)(\(.*?)(?=^\S(?<!\))|\Z)", source, re.M | re.S)
    found = [body for name, body in functions if name.startswith(test)]
    return "".join(found + [body for name, body in functions if any(f" {name}(" in each for each in found)])


def test_each_example_has_its_test() -> None:
    found = documented()
    assert found.pop("done") == found.pop("or judged equal") == 0
    assert list(found) == list(EXAMPLES)
    for example, where in EXAMPLES.items():
        file, test = where.split("::")
        expected = rf"\b{found[example]}\b"
        assert re.search(expected, text_of(test, next(TESTS.rglob(file)).read_text())), (
            f"{where} does not say {expected}"
        )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["pwritev", "preadv", "open_write"])
def test_a_disk_that_fails_in_the_middle(code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.chdir(tmp_path)
    llama(Path("model"))
    monkeypatch.setattr(Files, call, refuse)
    result = tpshard("split", "model", "--tp", 2, "--json")
    assert result.code == 6 and result.json["error"]["code"] == "io"
    assert os.strerror(code).lower() in result.err.lower() and not Path("model-tp2").exists()
