# SPDX-License-Identifier: Apache-2.0
"""Converts a Hugging Face folder to a base `.nemo` that loads on any layout, and compares it with transformers."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_tied_lora.conversion.hf_config import NemoKeys
from nemo_tied_lora.conversion.hf_folder import HfFolder, read_hf_folder
from nemo_tied_lora.conversion.hf_tokenizer import differing_texts, tokenizer_section
from nemo_tied_lora.conversion.hf_weights import megatron_tensors
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.nemo.generation import load_base, next_token_logits
from nemo_tied_lora.nemo.model import MegatronGPTTiedLoraModel
from nemo_tied_lora.nemo.process_groups import ensure_process_groups
from nemo_tied_lora.nemo.token_rows import rowless_note
from nemo_tied_lora.progress import Progress

__all__ = ["Comparison", "import_hf_base"]

_SAMPLE_ROWS, _SAMPLE_LENGTH = 2, 48


@dataclass(frozen=True)
class Comparison:
    """A comparison of the written `.nemo` with transformers: float32 logits on random tokens, and token ids."""

    largest_difference: float
    """Of the logits."""
    largest_logit: float
    differing_texts: tuple[str, ...]
    """The sample texts with other token ids."""
    not_compared: str | None = None
    """The reason why the tokenizers could not be compared."""

    @property
    def relative(self) -> float:
        """The difference as a share of the largest logit."""
        return self.largest_difference / max(self.largest_logit, 1e-30)


def import_hf_base(cfg: DictConfig) -> tuple[NemoKeys, Comparison | None]:
    """Converts `cfg.path` to `cfg.output`. One rank calls it.

    The file gets its name only after a model restored from it agrees with transformers.

    Raises:
        ConfigError: the model cannot be imported, its files are damaged or incomplete, or the logits differ by more
            than `cfg.tolerance` of the largest one.
    """
    folder, output = Path(cfg.path), Path(cfg.output)
    source = read_hf_folder(folder, cfg.vocab_multiple)
    keys, tokenizer = source.keys, tokenizer_section(folder)
    dtype = source.dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    if dtype != source.dtype:
        keys.notes.append(f"the stored weights are {source.dtype}; dtype={cfg.dtype} rounds or widens them")
    expected = None
    if cfg.verify:
        tokens = _sample_tokens(source.config["vocab_size"], keys.model["encoder_seq_length"])
        expected = _transformers_logits(source, tokens)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as beside:
        written = Path(beside) / output.name
        _write(cfg, source, tokenizer, dtype, written)
        comparison = None if expected is None else _compare(cfg, written, folder, tokens, expected)
        if comparison is not None and not comparison.relative <= cfg.tolerance:
            difference = f"{comparison.largest_difference:.2e}, {comparison.relative:.1e} of the largest"
            raise ConfigError(
                [f"path={folder}: the imported model's logits differ by {difference}; nothing was written"]
            )
        os.replace(written, output)
    return keys, comparison


def _sample_tokens(vocab_size: int, length: int) -> torch.Tensor:
    """Random tokens (2, at most 48), the same in every call."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(0, vocab_size, (_SAMPLE_ROWS, min(_SAMPLE_LENGTH, length)), generator=generator)


def _transformers_logits(source: HfFolder, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' logits in float32.

    Raises:
        ConfigError: transformers cannot load the model, or drops or invents a tensor.
    """
    import transformers

    folder = source.weights.folder
    try:
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=copy.deepcopy(source.described),
            torch_dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        with torch.no_grad():
            logits = loaded.eval()(tokens).logits
    except Exception as error:  # whatever transformers raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            [f"path={folder}: transformers cannot load it for the check: {reason}; or verify=false"]
        ) from error
    problems = [f"path={folder}: {name}: transformers fills it with random numbers" for name in info["missing_keys"]]
    Problems(problems).raise_if_any()
    return logits


class _EmptyModel(MegatronGPTTiedLoraModel):
    """The base with uninitialized weights in the dtype in which they will be stored."""

    storage_dtype = torch.float32

    def build_transformer_config(self) -> Any:
        config = super().build_transformer_config()
        config.params_dtype, config.perform_initialization = self.storage_dtype, False
        return config


def _write(cfg: DictConfig, source: HfFolder, tokenizer: Mapping[str, Any], dtype: torch.dtype, path: Path) -> None:
    folder, keys, config = source.weights.folder, source.keys, source.config
    model_cfg = copy.deepcopy(cfg.model)
    OmegaConf.resolve(model_cfg)
    with open_dict(model_cfg):
        model_cfg.pop("peft", None)  # only from=lora uses it
        for key, value in keys.model.items():
            model_cfg[key] = value
        model_cfg.tokenizer = tokenizer
        model_cfg.precision = cfg.trainer.precision
        model_cfg.huggingface = {
            "model_type": config["model_type"],
            "name": folder.name,
            "vocab_size": config["vocab_size"],
        }
        model_cfg.target = f"{MegatronGPTTiedLoraModel.__module__}.{MegatronGPTTiedLoraModel.__qualname__}"
    trainer: Trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer()
    _EmptyModel.storage_dtype = dtype
    model = _EmptyModel(model_cfg, trainer)
    ensure_process_groups(trainer)
    keys.notes += rowless_note(model)
    model.model.to(dtype)  # Megatron creates norms in float32
    _fill(model.model, source)
    model.save_to(str(path))


def _fill(body: Any, source: HfFolder) -> None:
    """Copies every weight into the model.

    Raises:
        ConfigError: a weight of the model has no counterpart, or another shape.
    """
    weights, keys = source.weights, source.keys
    parameters = dict(body.named_parameters())
    tensors = megatron_tensors(
        weights,
        source.family,
        source.sizes,
        qkv_bias=bool(keys.model["qkv_bias"]),
        bias=bool(keys.model["bias"]),
        shared=bool(keys.model["share_embeddings_and_output_weights"]),
        vocab_rows=keys.model["override_vocab_size"],
    )
    for name, tensor in Progress(
        tensors, desc="importing", unit="tensor", total=len(parameters), disable=len(parameters) < 100
    ):
        parameter = parameters.pop(_name_in(parameters, name))
        if parameter.shape != tensor.shape:
            raise ConfigError(
                [f"{name}: is {tuple(tensor.shape)} in the folder, {tuple(parameter.shape)} by config.json"]
            )
        parameter.data.copy_(tensor)
    problems = Problems(f"{name}: the folder has no counterpart" for name in parameters)
    problems += [f"{name}: the imported model has no place for it" for name in weights.left_over()]
    problems.raise_if_any()


# Transformer Engine's linears hold the norm before them.
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def _name_in(parameters: Mapping[str, Any], name: str) -> str:
    """The parameter's name with or without Transformer Engine."""
    if name not in parameters:
        for alone, fused in _FUSED_NORMS.items():
            if name.replace(alone, fused) in parameters:
                return name.replace(alone, fused)
        raise ConfigError([f"{name}: the model built from config.json has no such parameter"])
    return name


def _compare(cfg: DictConfig, path: Path, folder: Path, tokens: torch.Tensor, expected: torch.Tensor) -> Comparison:
    """Restores the written file in float32 and compares logits and tokens."""
    restored_cfg = copy.deepcopy(cfg)
    with open_dict(restored_cfg):
        restored_cfg.base = str(path)
        restored_cfg.model = {key: cfg.model[key] for key in _LAYOUT_KEYS}
    model = load_base(restored_cfg)
    got = torch.stack(next_token_logits(model, tokens.tolist()))[..., : expected.shape[-1]]
    texts: tuple[str, ...] = ()
    reason = None
    try:
        texts = differing_texts(folder, model.tokenizer)
    except RuntimeError as error:
        reason = str(error)
    return Comparison(
        largest_difference=float((got - expected).abs().max()),
        largest_logit=float(expected.abs().max()),
        differing_texts=texts,
        not_compared=reason,
    )


_LAYOUT_KEYS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "megatron_amp_O2",
    "gradient_as_bucket_view",
)
