# SPDX-License-Identifier: Apache-2.0
"""One process: negative controls of adapter files and merges. Each test must fail if its guard is switched off."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_tied_lora import save_adapter
from nemo_tied_lora.checkpoint import nemo_adapter_format, read_nemo_adapter, seeded_factors, tar, write_nemo_adapter
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.conversion.merging import adapter_updates, merge
from tests.checkpoint import test_nemo_file as file_tests
from tests.checkpoint import test_nemo_file_damaged as bad_input
from tests.checkpoint import test_nemo_file_durability as durability
from tests.checkpoint import test_nemo_file_refused as refusals
from tests.conversion import test_merge
from tests.harness.adapter_files import tiny_adapter
from tests.harness.llama_adapter import build
from tests.harness.ranks import single_process


def nothing(*_: Any, **__: Any) -> None:
    """A guard that checks nothing."""


def all_finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones(tensor.shape, dtype=torch.bool)


def written_in_place(path: Path, write: Callable[[Any], object]) -> Path:
    with path.open("wb") as file:
        write(file)
    return path


class _EqualToAll:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def fuzzed(test: Callable[..., None], *more: Any) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """A test of damaged files, on a file that was written with all guards on."""

    def run(folder: Path, patch: pytest.MonkeyPatch) -> None:
        whole = folder.parent / "whole.nemo"
        test(folder, whole.read_bytes(), read_adapter(whole), *more)

    return run


def with_saved(test: Callable[..., None], *more: Any) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def run(folder: Path, patch: pytest.MonkeyPatch) -> None:
        test(save_adapter(build(), folder / "saved.nemo"), *more)

    return run


def with_adapter(test: Callable[..., None]) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def run(folder: Path, patch: pytest.MonkeyPatch) -> None:
        sizes = {"layers": test_merge.LAYERS, "hidden": test_merge.HIDDEN, "alpha": 5.0}
        test(folder, read_adapter(tiny_adapter(folder / "adapter.nemo", **sizes)))

    return run


# The guard: (its module or class, its name, the replacement, the test, a part of the test's failure).
Control = tuple[Any, str, Any, Callable[[Path, pytest.MonkeyPatch], Any], str]
NOT_REFUSED = "DID NOT RAISE"
CONTROLS: dict[str, Control] = {
    "a file beside the target, renamed": (
        write_nemo_adapter,
        "replace_file",
        written_in_place,
        lambda folder, _: durability.test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(folder),
        "adapter.nemo: ",  # empty or truncated, depending on the moment of the kill
    ),
    "the tensors' checksum": (
        read_nemo_adapter,
        "content_facts",
        lambda _: _EqualToAll(),
        fuzzed(bad_input.test_a_flipped_bit_anywhere_is_refused_or_harmless),
        "== []",
    ),
    "extended headers": (
        tar,
        "_check_pax",
        nothing,
        fuzzed(bad_input.test_what_a_tar_can_do_beyond_plain_files_is_refused, "a pax path"),
        "assert not True",
    ),
    "a factor stored as its seed, in writing": (
        seeded_factors.FrozenFactors,
        "check",
        lambda self, name, tensor: self.draw(name, tensor.dtype),
        lambda folder, _: file_tests.test_a_factor_that_is_not_what_the_seed_draws_is_not_stored_as_the_seed(folder),
        NOT_REFUSED,
    ),
    "a factor stored as its seed, in reading": (
        seeded_factors.FrozenFactors,
        "compare",
        nothing,
        file_tests.test_a_generator_that_draws_other_numbers_is_an_error,
        NOT_REFUSED,
    ),
    "names, shapes, dtypes and values of the state": (
        read_nemo_adapter,
        "check_state",
        nothing,
        with_saved(refusals.test_a_file_with_other_content_is_refused_and_the_model_left_alone, "integers"),
        "is torch.int32, not a",
    ),
    "finite numbers, in writing": (
        nemo_adapter_format.torch,
        "isfinite",
        all_finite,
        with_saved(file_tests.test_a_tensor_that_would_not_load_again_is_not_saved),
        NOT_REFUSED,
    ),
    "finite numbers in a merge": (
        adapter_updates.torch,
        "isfinite",
        all_finite,
        with_adapter(test_merge.test_a_merge_that_is_not_finite_is_not_written),
        NOT_REFUSED,
    ),
    "each element of a merge once": (
        adapter_updates.Updates,
        "check_complete",
        nothing,
        lambda folder, _: test_merge.test_a_base_that_lacks_a_layer_is_refused(folder),
        NOT_REFUSED,
    ),
    "the base of a merge": (
        merge,
        "_check_base",
        nothing,
        with_adapter(test_merge.test_another_base_is_refused_unless_allowed),
        NOT_REFUSED,
    ),
}


@pytest.mark.parametrize("guard", CONTROLS)
def test_without_the_guard_its_test_fails(guard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single_process()
    tiny_adapter(tmp_path / "whole.nemo")
    place, name, replacement, test, failure = CONTROLS[guard]
    assert callable(getattr(place, name))
    folder = tmp_path / "folder"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(place, name, replacement)
        failures = (AssertionError, pytest.fail.Exception, read_nemo_adapter.AdapterFileError)
        with pytest.raises(failures, match=re.escape(failure)):
            test(folder, patch)
