# SPDX-License-Identifier: Apache-2.0
"""Reads a data set of the Hugging Face hub, or a local folder in the same form, with `datasets`. Runs no code of the hub."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.progress import shows_bars
from nemo_tied_lora.tasks.source_settings import Source
from nemo_tied_lora.tasks.sources import Found, Reader, stamp

__all__ = ["Hub"]


class Hub(Reader):
    """A data set whose splits are Parquet, JSONL or CSV files."""

    def __init__(self, source: Source) -> None:
        self._source, self._name = source, str(source.hub)
        self._origin: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """Of a local folder, its files. The hub's data set is what the settings name."""
        if importlib.util.find_spec("datasets") is None:
            raise ConfigError(
                [f"task.source.hub={self._name}: needs datasets, which is not installed; install nemo_tied_lora[nemo]"]
            )
        folder = Path(self._name)
        if not folder.is_dir():
            return {}
        files = sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
        if not files:
            raise ConfigError([f"task.source.hub={self._name}: is an empty folder"])
        return {"files": [stamp(path) for path in files]}

    def origin(self) -> dict[str, Any]:
        return self._origin

    def records(self, splits: Collection[str]) -> Iterator[Found]:
        found = self._loaded()
        missing = [split for split in splits if split not in found]
        if missing:
            raise ConfigError(
                [
                    f"task.source.hub={self._name}: has no split {', '.join(missing)}; its splits are "
                    f"{', '.join(map(str, found))}: set task.source.splits"
                ]
            )
        for split in splits:
            for number, record in enumerate(found[split]):
                yield split, f"{self._name}: {split}, record {number}", record

    def _loaded(self) -> Any:
        """The data set's splits.

        Raises:
            ConfigError: it cannot be loaded, for whatever reason.
        """
        import datasets

        source = self._source
        where = "reading" if Path(self._name).is_dir() else "getting from the hub"
        print(f"task.source.hub={self._name}: {where}", file=sys.stderr, flush=True)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each of its retries in four lines
        if not shows_bars(sys.stderr):
            datasets.disable_progress_bars()
        try:
            found = datasets.load_dataset(
                self._name,
                source.config,
                data_dir=source.data_dir,
                revision=source.revision,
                trust_remote_code=False,
            )
        except Exception as error:  # each of its parts has errors of its own: files, formats, network, hub
            text = " ".join(str(error).split())
            raise ConfigError(
                [
                    f"task.source.hub={self._name}: cannot be loaded ({type(error).__name__}: {text[:200]}); without the "
                    "hub, name a local copy: task.source.hub=FOLDER"
                ]
            ) from None
        self._origin = {
            split: {"records": len(records), "files": sorted(records.info.download_checksums or {})}
            for split, records in found.items()
        }
        return found
