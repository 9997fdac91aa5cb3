# SPDX-License-Identifier: Apache-2.0
"""NeMo's GPT fine-tuning model with Tied-LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingBatchSampler,
)
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.collections.nlp.parts.peft_config import PEFTConfig
from omegaconf import open_dict

from nemo_tied_lora.adapter.inject import inject
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.checkpoint.base_identity import tokenizer_identity
from nemo_tied_lora.checkpoint.read_nemo_adapter import is_adapter_file
from nemo_tied_lora.checkpoint.save_load_on_any_layout import load_adapter, save_adapter
from nemo_tied_lora.checkpoint.training_checkpoint import is_checkpoint, read_description
from nemo_tied_lora.nemo.guarded_training import GuardedTrainingMixin
from nemo_tied_lora.nemo.learning_rate_groups import learning_rate_groups
from nemo_tied_lora.nemo.legacy_weights import tensors_only
from nemo_tied_lora.nemo.peft_config import TiedLoraPEFTConfig, register
from nemo_tied_lora.nemo.stored_tokenizer import StoredTokenizerMixin
from nemo_tied_lora.planning.training_loop_checks import check_loop
from nemo_tied_lora.versions import installed_version

__all__ = ["MegatronGPTTiedLoraModel", "TiedLoraModelMixin"]

register()


class TiedLoraModelMixin:
    """In front of a NeMo model that has `NLPAdapterModelMixin`: adds the scheme `tied_lora`, leaves the others alone.

    Its gradients are complete after the forward and backward passes, before NeMo clips them: with
    `mcore_distributed_optim` megatron-core sums the tied ones itself, reading the parameters' flags; otherwise
    `training_step_fwd_bwd_step_call` does. NeMo sums what sequence parallelism and data parallelism leave partial.
    """

    tied_lora: Adapter | None = None
    tokens_seen: int = 0
    """Tokens that this rank's microbatches have held so far, padding included."""

    @classmethod
    def restore_from(cls, *args: Any, **kwargs: Any) -> Any:
        """NeMo's, but a legacy base is read with `weights_only=True`."""
        with tensors_only():
            return super().restore_from(*args, **kwargs)  # type: ignore[misc]

    def add_adapter(self, peft_cfgs: PEFTConfig | list[PEFTConfig]) -> None:
        """NeMo's entry. A `TiedLoraPEFTConfig` is injected into every chunk and stage; the base is frozen.

        Raises:
            ConfigError: it does not fit the model. ValueError: it is combined with another scheme.
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
        """NeMo's entry. A Tied-LoRA `.nemo`, written on any layout, is injected and loaded; others go to NeMo.

        Raises:
            AdapterFileError: it is damaged, or made for a base with other shapes.
            BaseMismatchError: it was trained on a base with another architecture, other weights or another tokenizer;
                the last two are let through where `model.peft.allow_other_base` is true.
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
        """The base alone again."""
        if self.tied_lora is not None:
            self.tied_lora.remove()
            self.tied_lora, self.use_peft = None, False

    def setup_optimizer_param_groups(self) -> None:
        """NeMo's groups for the base, ours for an adapter."""
        if self.tied_lora is None:
            super().setup_optimizer_param_groups()  # type: ignore[misc]
            return
        self._optimizer_param_groups = learning_rate_groups(self.tied_lora)

    def configure_optimizers(self) -> Any:
        """NeMo's, but O2 sums over data parallelism once, after the backward pass.

        While it runs, NeMo's O2 starts an all-reduce each time a parameter's gradient arrives and waits for none: with
        several microbatches one may still run when the next gradient is added; and it counts arrivals, so that a tied
        tensor, whose gradient arrives once per layer under recomputation, would never be summed at all.
        """
        if self.tied_lora is not None:
            with open_dict(self.cfg):  # type: ignore[attr-defined]
                self.cfg.async_grad_allreduce = False  # type: ignore[attr-defined]
        return super().configure_optimizers()  # type: ignore[misc]

    def training_step_fwd_bwd_step_call(self, dataloader_iter: Any, forward_only: bool) -> Any:
        """Forward and backward over the microbatches, then the pipeline's sum of the tied gradients."""
        loss = super().training_step_fwd_bwd_step_call(dataloader_iter, forward_only)  # type: ignore[misc]
        if self.tied_lora is not None and not self.use_mcore_dist_optim:  # type: ignore[attr-defined]
            in_main_grad = any(hasattr(parameter, "main_grad") for parameter in self.tied_lora.parameters())
            self.tied_lora.reduce_gradients("main_grad" if in_main_grad else "grad", tensor_parallel=False)
        return loss

    def build_data_loader(self, dataset: Any, data_cfg: Any, consumed_samples: int = 0) -> Any:
        """NeMo's, but a resumed run goes on behind the samples that it has consumed.

        NeMo's sampler counts the remaining batches while Lightning's counter starts at the restored one, so that a
        resumed epoch ends early and the batches after the resume point come a second time.
        """
        loader = super().build_data_loader(dataset, data_cfg, consumed_samples)  # type: ignore[misc]
        if consumed_samples and type(loader.batch_sampler) is MegatronPretrainingBatchSampler:
            loader.batch_sampler.__class__ = _WholeRunSampler
        return loader

    def _extract_consumed_samples_from_ckpt(self, ckpt_path: str) -> int:
        """From the checkpoint itself; NeMo reads the file's name, which a run may be told to format otherwise."""
        if is_checkpoint(ckpt_path):
            return int(read_description(ckpt_path)["consumed_samples"])
        return super()._extract_consumed_samples_from_ckpt(ckpt_path)  # type: ignore[misc]

    def save_to(self, save_path: str) -> None:
        """With an adapter: the adapter's `.nemo`, layout-free. Without: NeMo's, the whole model."""
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
        """What the adapter's YAML says beyond the adapter."""
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
    """`MegatronGPTSFTModel` that knows `peft_scheme: tied_lora`.

    Its config is NeMo's, with `model.peft.tied_lora` beside NeMo's own sections.
    """


class _WholeRunSampler(MegatronPretrainingBatchSampler):
    """Counts all batches of the run, also those before the resume point."""

    def __len__(self) -> int:
        return self.total_samples // self.global_batch_size


class _AdapterKeys:
    """NeMo's bookkeeping around an injection: which state-dict keys are the adapter's."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._base_keys = self._model._get_all_keys()

    def __exit__(self, failure: Any, *_: Any) -> None:
        if failure is None:
            self._model.use_peft = True
            self._model.adapter_keys = self._model._get_all_keys() - self._base_keys
            self._model.tunable_base_param_keys = set()
