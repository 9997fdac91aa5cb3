# SPDX-License-Identifier: Apache-2.0
"""Converts a Hugging Face folder or a GGUF file to a base `.nemo` that loads on any layout, and compares it with transformers."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_tied_lora.conversion.gguf_file import read_gguf
from nemo_tied_lora.conversion.hf_config import NemoKeys
from nemo_tied_lora.conversion.hf_folder import HfFolder, read_hf_folder
from nemo_tied_lora.conversion.hf_tokenizer import differing_texts, tokenizer_section
from nemo_tied_lora.conversion.hf_weights import megatron_tensors
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.files import folder_beside
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
    """Converts `cfg.path`, a Hugging Face folder or a GGUF file, to `cfg.output`. One rank calls it.

    The file gets its name only after a model restored from it agrees with transformers. All temporary files are in one
    folder beside the output: the Hugging Face folder that is made of a GGUF file, and what NeMo packs and unpacks.

    Raises:
        ConfigError: the model cannot be imported, its files are damaged or incomplete, or the logits differ by more
            than `cfg.tolerance` of the largest one.
    """
    output = Path(cfg.output)
    with folder_beside(output) as beside, _temporary_files_in(beside):
        if Path(cfg.path).is_dir():
            return _import_folder(cfg, Path(cfg.path), beside / output.name, {})
        return _import_gguf(cfg, beside)


def _import_gguf(cfg: DictConfig, beside: Path) -> tuple[NemoKeys, Comparison | None]:
    """Makes a Hugging Face folder of a GGUF file, and imports that."""
    from nemo_tied_lora.conversion.from_gguf import gguf_notes, write_hf_folder

    source = read_gguf(Path(cfg.path))
    folder = beside / "gguf" / source.name
    lossy = write_hf_folder(source, folder)
    record = {"file": source.path.name, "quantisation": source.quantisation}
    try:
        keys, comparison = _import_folder(cfg, folder, beside / Path(cfg.output).name, record)
    except ConfigError as error:
        raise ConfigError(line.replace(str(folder), str(cfg.path)) for line in error.problems) from error
    keys.notes[:0] = [*gguf_notes(source), *lossy]
    return keys, comparison


def _import_folder(
    cfg: DictConfig, folder: Path, written: Path, record: Mapping[str, str]
) -> tuple[NemoKeys, Comparison | None]:
    """Writes the model of a Hugging Face folder to `written`, compares it with transformers, and moves it to `cfg.output`.

    Args:
        record: goes into the base's `model.huggingface`.
    """
    source = read_hf_folder(folder, cfg.vocab_multiple)
    keys, tokenizer = source.keys, tokenizer_section(folder)
    dtype = source.dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    if dtype != source.dtype:
        keys.notes.append(f"the stored weights are {source.dtype}; dtype={cfg.dtype} rounds or widens them")
    expected = None
    if cfg.verify:
        tokens = _sample_tokens(source.config["vocab_size"], keys.model["encoder_seq_length"])
        expected = _transformers_logits(source, tokens)
    _write(cfg, source, tokenizer, dtype, written, record)
    comparison = None if expected is None else _compare(cfg, written, folder, tokens, expected)
    if comparison is not None and not comparison.relative <= cfg.tolerance:
        difference = f"{comparison.largest_difference:.2e}, {comparison.relative:.1e} of the largest"
        raise ConfigError([f"path={folder}: the imported model's logits differ by {difference}; nothing was written"])
    os.replace(written, cfg.output)
    return keys, comparison


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """NeMo packs and unpacks a `.nemo` in Python's temporary folder, and leaves the weights there if it is killed."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


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


def _write(
    cfg: DictConfig,
    source: HfFolder,
    tokenizer: Mapping[str, Any],
    dtype: torch.dtype,
    path: Path,
    record: Mapping[str, str],
) -> None:
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
            **record,
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
