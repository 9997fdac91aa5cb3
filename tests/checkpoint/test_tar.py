# SPDX-License-Identifier: Apache-2.0
"""Pure Python: how tars are written. The tests of adapter files cover how tars are read."""

from __future__ import annotations

import io
from pathlib import Path

from nemo_tied_lora.checkpoint.tar import write_tar
from tests.harness import adapter_files


def test_a_tar_is_to_the_byte_what_pythons_own_module_writes(tmp_path: Path) -> None:
    members = {"model_config.yaml": b"a: 1\n", "empty": b"", "a block": b"x" * 512, "large": b"y" * 20_000}
    written = io.BytesIO()
    write_tar(written, members)
    assert written.getvalue() == adapter_files.write_tar(tmp_path / "a.tar", members).read_bytes()
