# SPDX-License-Identifier: Apache-2.0
"""Counts the answers that `max_seq_length` cuts before the base is loaded: it takes the tokenizer and the data alone.

The tokenizer's files are read from the base's `.nemo`. Tokenizer and datasets are built by the methods of NeMo's model, on an
object that has no weights.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from nemo.collections.nlp.models.language_modeling.megatron_base_model import MegatronBaseModel
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.utils import AppState, logging
from omegaconf import DictConfig

from nemo_tied_lora.adapter.agreement import exchange
from nemo_tied_lora.nemo.answer_truncation import check_answers
from nemo_tied_lora.nemo.sft_datasets import leave_room_only_to_generate, own_datasets
from nemo_tied_lora.nemo.stored_tokenizer import StoredTokenizerMixin
from nemo_tied_lora.planning.nemo_archive import NemoFiles

__all__ = ["check_answers_early"]

_IN_THE_NEMO = "nemo:"


def check_answers_early(path: str, model_cfg: DictConfig, trainer: Trainer) -> bool:
    """Does what `check_answers` does when training starts. All ranks call it; it leaves `model_cfg` as it is.

    Returns:
        Whether it has counted, the same on every rank. Not for conversations and packed sequences, whose tokens depend on
        more than the tokenizer; nor if there is no process group yet, nor without a tokenizer that can be built of files.

    Raises:
        ConfigError: as `check_answers`.
    """
    cfg = copy.deepcopy(model_cfg)
    sections = ["train_ds", *(["validation_ds"] if trainer.limit_val_batches else [])]
    sections += ["test_ds"] if (cfg.data.get("test_ds") or {}).get("file_names") is not None else []
    packed = any(cfg.data[name].get("packed_sequence") for name in sections)
    if packed or cfg.data.get("chat") or not torch.distributed.is_initialized():
        return False
    AppState().local_rank = trainer.local_rank  # the first rank of each node makes the index of the lines
    leave_room_only_to_generate(cfg.data)
    with tempfile.TemporaryDirectory() as folder:
        reader: _DataReader | None = None
        try:
            reader = _DataReader(cfg, NemoFiles(Path(path)), Path(folder))
        except Exception as error:  # the same will be tried again with the base, which says so in full
            logging.info(f"the tokenizer is not built before the base: {type(error).__name__}: {error}")
        if not all(exchange(reader is not None)):
            return False
        assert reader is not None
        with own_datasets():
            check_answers({name: reader._build_dataset(cfg.data[name], is_train=False) for name in sections})
    return True


class _OfNemo:
    """The methods of NeMo's model that need its configuration alone."""

    _build_tokenizer = MegatronBaseModel._build_tokenizer
    _build_dataset = MegatronGPTSFTModel._build_dataset


class _DataReader(StoredTokenizerMixin, _OfNemo):
    """Has the tokenizer of a base, and builds datasets with it.

    Args:
        cfg: of the model.
        files: of the base's `.nemo`.
        folder: gets the tokenizer's files.

    Raises:
        Exception: whatever stands in the way, such as a compressed `.nemo`.
    """

    def __init__(self, cfg: DictConfig, files: NemoFiles, folder: Path) -> None:
        self.cfg = self._cfg = cfg
        self._files, self._folder = files, folder
        self.sep_id, self.virtual_tokens = cfg.get("sep_id", 49704), 0  # as NeMo's model has them
        self._build_tokenizer()

    def register_artifact(self, key: str, source: str | None) -> str | None:
        """The path of a file that the configuration names. NeMo calls it so."""
        if source is None or not source.startswith(_IN_THE_NEMO):
            return source
        if not self._files.can_seek:
            raise OSError("its .nemo is compressed, and is read once")
        name = source.removeprefix(_IN_THE_NEMO)
        file = self._folder / Path(name).name
        file.write_bytes(self._files.read(name, 0, self._files.sizes[name]))
        return str(file)
