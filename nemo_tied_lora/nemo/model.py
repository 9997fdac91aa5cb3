# SPDX-License-Identifier: Apache-2.0
"""NeMo's GPT fine-tuning model with Tied-LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingBatchSampler,
)
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.collections.nlp.parts.peft_config import PEFTConfig
from omegaconf import open_dict

from nemo_tied_lora.adapter.inject import inject
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.quantized.quantize_base import QuantizedBase, precision_facts
from nemo_tied_lora.checkpoint.base_identity import tokenizer_identity
from nemo_tied_lora.checkpoint.read_nemo_adapter import is_adapter_file
from nemo_tied_lora.checkpoint.save_load_on_any_layout import load_adapter, save_adapter
from nemo_tied_lora.checkpoint.training_checkpoint import is_checkpoint, read_description
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.nemo.answer_truncation import check_answers, special_token_problems
from nemo_tied_lora.nemo.guarded_training import GuardedTrainingMixin
from nemo_tied_lora.nemo.learning_rates import FactorRatesMixin
from nemo_tied_lora.nemo.legacy_weights import tensors_only
from nemo_tied_lora.nemo.peft_config import TiedLoraPEFTConfig, register
from nemo_tied_lora.nemo.sft_datasets import leave_room_only_to_generate, own_datasets
from nemo_tied_lora.nemo.stored_tokenizer import StoredTokenizerMixin
from nemo_tied_lora.nemo.token_rows import rowless_note
from nemo_tied_lora.planning.settings.training_loop_checks import FLOAT32_UNDER_O2, check_loop
from nemo_tied_lora.planning.versions import installed_version

__all__ = ["MegatronGPTTiedLoraModel", "TiedLoraModelMixin"]

register()


class TiedLoraModelMixin(FactorRatesMixin):
    """A mixin in front of a NeMo model with `NLPAdapterModelMixin`: adds the scheme `tied_lora`, keeps all others.

    Gradients are complete before NeMo clips them. With `mcore_distributed_optim`, megatron-core sums the tied ones by
    the parameters' flags; otherwise `training_step_fwd_bwd_step_call` does. NeMo sums what sequence parallelism and
    data parallelism leave partial.
    """

    tied_lora: Adapter | None = None
    quantized_base: QuantizedBase | None = None
    """What `restored_base` has quantised. None: nothing."""
    weight_differences: Mapping[str | None, float | None] = {}
    """The precision that an adapter records to how far the quantised weights are from it; see `restored_base`."""
    answers_checked: bool = False
    """Whether `early_answer_check` has counted the answers that do not fit."""
    tokens_seen: int = 0
    """The number of tokens in this rank's microbatches so far, padding included."""

    @classmethod
    def restore_from(cls, *args: Any, **kwargs: Any) -> Any:
        """NeMo's, except that a legacy base is read with `weights_only=True`."""
        with tensors_only():
            return super().restore_from(*args, **kwargs)  # type: ignore[misc]

    def add_adapter(self, peft_cfgs: PEFTConfig | list[PEFTConfig]) -> None:
        """NeMo's entry point. Injects a `TiedLoraPEFTConfig` into every chunk and freezes the base.

        Raises:
            ConfigError: the configuration does not fit the model.
            ValueError: it is combined with another scheme.
        """
        configs = peft_cfgs if isinstance(peft_cfgs, list) else [peft_cfgs]
        tied = [config for config in configs if isinstance(config, TiedLoraPEFTConfig)]
        if not tied:
            super().add_adapter(peft_cfgs)  # type: ignore[misc]
            return
        if len(configs) > 1:
            raise ValueError("peft_scheme: tied_lora cannot be combined with another scheme; name it alone")
        with self._adapter_keys_of_tied_lora():
            self.tied_lora = inject(self._unwrap_model_list(), tied[0].tied_lora)  # type: ignore[attr-defined]

    def load_adapters(self, filepath: str, peft_cfgs: Any = None, map_location: str | None = None) -> None:
        """NeMo's entry point. Injects and loads a Tied-LoRA `.nemo` from any layout; leaves other adapters to NeMo.

        Raises:
            AdapterFileError: the file is damaged, or made for a base with other shapes.
            BaseMismatchError: the adapter was trained on a base with another architecture, other weights or another
                tokenizer. `model.peft.allow_other_base=true` allows other weights and another tokenizer.
        """
        asked = peft_cfgs if isinstance(peft_cfgs, list) else [peft_cfgs]
        tied = any(isinstance(config, TiedLoraPEFTConfig) for config in asked)
        if not tied and (peft_cfgs or not is_adapter_file(filepath)):
            with tensors_only():
                super().load_adapters(filepath, peft_cfgs, map_location)  # type: ignore[misc]
            return
        with self._adapter_keys_of_tied_lora():
            self.tied_lora = load_adapter(
                self._unwrap_model_list(),  # type: ignore[attr-defined]
                filepath,
                allow_other_base=bool((self.cfg.get("peft") or {}).get("allow_other_base")),  # type: ignore[attr-defined]
                tokenizer=tokenizer_identity(self.tokenizer),  # type: ignore[attr-defined]
            )

    def remove_adapter(self) -> None:
        """Removes the adapter; the base stays."""
        if self.tied_lora is not None:
            self.tied_lora.remove()
            self.tied_lora, self.use_peft = None, False

    def configure_optimizers(self) -> Any:
        """NeMo's; a rank budget follows the optimizer. O2 sums over data-parallel ranks once, after the backward pass.

        By default NeMo's O2 starts an all-reduce whenever a gradient arrives, during the backward pass, and waits for
        none. With several microbatches, one may still run when the next gradient is added. NeMo also counts arrivals.
        Under recomputation a tied tensor's gradient arrives once per layer, so it would never be summed.

        Raises:
            ConfigError: O2's optimizer would not average the gradients of an adapter in float32. The adapter's file may
                ask for float32 although the run's configuration does not.
        """
        if self.tied_lora is not None:
            half = self.megatron_amp_O2 and not self.use_mcore_dist_optim  # type: ignore[attr-defined]
            if half and self.tied_lora.config.dtype is not None:
                raise ConfigError([f"tied_lora.dtype={self.tied_lora.config.dtype}: {FLOAT32_UNDER_O2}"])
            with open_dict(self.cfg):  # type: ignore[attr-defined]
                self.cfg.async_grad_allreduce = False  # type: ignore[attr-defined]
        configured = super().configure_optimizers()
        if self.tied_lora is not None:
            self.tied_lora.follow_optimizer(self._optimizer, self.trainer.max_steps)  # type: ignore[attr-defined]
        return configured

    def training_step_fwd_bwd_step_call(self, dataloader_iter: Any, forward_only: bool) -> Any:
        """Runs forward and backward over the microbatches, then sums tied gradients over pipeline stages."""
        loss = super().training_step_fwd_bwd_step_call(dataloader_iter, forward_only)  # type: ignore[misc]
        if self.tied_lora is not None and not self.use_mcore_dist_optim:  # type: ignore[attr-defined]
            in_main_grad = any(hasattr(parameter, "main_grad") for parameter in self.tied_lora.parameters())
            self.tied_lora.reduce_gradients("main_grad" if in_main_grad else "grad", tensor_parallel=False)
        return loss

    def build_train_valid_test_datasets(self, stage: str | None) -> None:
        """NeMo's, with `sft_datasets`. Before a fit, names tokens without a row in the embedding, and says how many answers
        do not fit into max_seq_length, unless that was said before the base was loaded.

        Raises:
            ConfigError: on every rank; none fits, or the tokenizer lacks a special token.
        """
        data: Any = self.cfg.data  # type: ignore[attr-defined]
        Problems(special_token_problems(self, data)).raise_if_any()
        leave_room_only_to_generate(data)
        with own_datasets(in_file_order=data.train_ds.get("shuffle") is False):
            super().build_train_valid_test_datasets(stage)  # type: ignore[misc]
        if stage == "fit":
            if torch.distributed.get_rank() == 0:
                for note in rowless_note(self):
                    print(f"note: {note}", flush=True)
            sections = {"train_ds": self._train_ds.datasets}  # type: ignore[attr-defined]
            if self.trainer.limit_val_batches:  # type: ignore[attr-defined]
                sections["validation_ds"] = self._validation_ds  # type: ignore[attr-defined]
            if getattr(self, "_test_ds", None):
                sections["test_ds"] = self._test_ds  # type: ignore[attr-defined]
            if not self.answers_checked:
                check_answers(sections)

    def build_data_loader(self, dataset: Any, data_cfg: Any, consumed_samples: int = 0) -> Any:
        """NeMo's, except that a resumed run continues after the samples that it has consumed.

        NeMo's sampler counts the remaining batches, but Lightning's counter starts at the restored batch. A resumed
        epoch would end early, and the batches after the resume point would come twice.
        """
        loader = super().build_data_loader(dataset, data_cfg, consumed_samples)  # type: ignore[misc]
        if consumed_samples and type(loader.batch_sampler) is MegatronPretrainingBatchSampler:
            loader.batch_sampler.__class__ = _WholeRunSampler
        return loader

    def _extract_consumed_samples_from_ckpt(self, ckpt_path: str) -> int:
        """Reads the number from the checkpoint. NeMo parses the file's name, whose format a run can change."""
        if is_checkpoint(ckpt_path):
            return int(read_description(ckpt_path)["consumed_samples"])
        return super()._extract_consumed_samples_from_ckpt(ckpt_path)  # type: ignore[misc]

    def save_to(self, save_path: str) -> None:
        """Writes the adapter's `.nemo`, which loads on any layout. Without an adapter, NeMo writes the whole model."""
        if self.tied_lora is None:
            super().save_to(save_path)  # type: ignore[misc]
        else:
            guarded = bool(self.guards.tie_guard_every_n_steps)  # type: ignore[attr-defined]
            save_adapter(self.tied_lora, save_path, self._facts(), tie_guard=guarded)

    def _make_data_iterator_list(self, data_iterator: Iterator[Any]) -> Any:
        return super()._make_data_iterator_list(self._counted(data_iterator))  # type: ignore[misc]

    def _counted(self, data_iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in data_iterator:
            self.tokens_seen += batch["tokens"].numel()
            yield batch

    def _adapter_keys_of_tied_lora(self) -> _AdapterKeys:
        check_loop(self.cfg)  # type: ignore[attr-defined]
        return _AdapterKeys(self)

    def _facts(self) -> dict[str, Any]:
        """Facts for the adapter's YAML: the base, the versions and the training."""
        cfg: Any = self.cfg  # type: ignore[attr-defined]
        trainer: Any = getattr(self, "_trainer", None)
        metrics = {} if trainer is None else {key: float(value) for key, value in trainer.callback_metrics.items()}
        names = ("nemo_tied_lora", "nemo_toolkit", "megatron_core", "torch")
        return {
            "base": {
                "name": Path(str(cfg.get("restore_from_path") or "")).name,
                "tokenizer": {
                    "library": cfg.tokenizer.get("library"),
                    "type": cfg.tokenizer.get("type"),
                    **tokenizer_identity(self.tokenizer),  # type: ignore[attr-defined]
                },
            },
            **precision_facts(self._unwrap_model_list()),  # type: ignore[attr-defined]
            "versions": {name: installed_version(name) for name in names},
            "training": {
                "steps": 0 if trainer is None else trainer.global_step,
                "seed": cfg.get("seed"),
                "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
                "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
                "metrics": metrics,
            },
        }


class MegatronGPTTiedLoraModel(StoredTokenizerMixin, TiedLoraModelMixin, GuardedTrainingMixin, MegatronGPTSFTModel):
    """`MegatronGPTSFTModel` with `peft_scheme: tied_lora`.

    Its config is NeMo's, plus the section `model.peft.tied_lora`.
    """


class _WholeRunSampler(MegatronPretrainingBatchSampler):
    """Counts all batches of the run, including those before the resume point."""

    def __len__(self) -> int:
        return self.total_samples // self.global_batch_size


class _AdapterKeys:
    """A context around an injection that records, for NeMo, which state-dict keys belong to the adapter."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._base_keys = self._model._get_all_keys()

    def __exit__(self, failure: Any, *_: Any) -> None:
        if failure is None:
            self._model.use_peft = True
            self._model.adapter_keys = self._model._get_all_keys() - self._base_keys
            self._model.tunable_base_param_keys = set()
