# SPDX-License-Identifier: Apache-2.0
"""Makes a Hugging Face folder of a GGUF file: transformers reads and dequantises the weights, the file says how to tokenize."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

from nemo_tied_lora.conversion.gguf_file import GgufFile
from nemo_tied_lora.conversion.gguf_vocabulary import adds_bos, write_tokenizer
from nemo_tied_lora.conversion.hf_tokenizer import texts_not_given_back
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.progress import Progress

__all__ = ["gguf_notes", "write_hf_folder"]

# Llama 3.1 and 3.2. A GGUF file holds only the factors that follow from such numbers.
_LLAMA3 = [
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
]


def gguf_notes(source: GgufFile) -> list[str]:
    """What the user should know about the file."""
    verb = "dequantised" if source.is_quantised else "read"
    bos = "BOS; set model.data.train_ds.add_bos=true" if adds_bos(source.vocabulary) else "no BOS"
    return [
        f"{verb} from {source.main_type}: {source.path.name} holds {source.quantisation}",
        f"the vocabulary of {source.path.name} begins a text with {bos}",
    ]


def write_hf_folder(source: GgufFile, folder: Path) -> list[str]:
    """Fills a new folder with the model in float32, its config.json and its tokenizer.

    Returns:
        Notes: sample texts that are others after a way through the tokenizer.

    Raises:
        ConfigError: transformers or the tokenizer's library cannot read the file.
    """
    folder.mkdir(parents=True)
    start = f"path={source.path}"
    try:
        config = _config(source)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with _progress():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(source.path.parent),
                gguf_file=source.path.name,
                config=config,
                torch_dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except ConfigError:
        raise
    except Exception as error:  # whatever transformers raises
        raise ConfigError([f"{start}: transformers cannot read it: {_first_line(error)}"]) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise ConfigError([f"{start}: transformers finds no numbers for {missing}"])
    model.save_pretrained(folder)
    try:
        write_tokenizer(source.vocabulary, folder, int(source.get("context_length")))
        changed = texts_not_given_back(folder)
    except Exception as error:  # whatever a damaged vocabulary raises
        raise ConfigError([f"{start}: its vocabulary is damaged: {_first_line(error)}"]) from error
    return [f"the tokenizer loses something of {text!r}" for text in changed]


def _config(source: GgufFile) -> Any:
    """transformers' config, with what it does not take from the file."""
    config = transformers.AutoConfig.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    config.vocab_size = source.rows
    if source.architecture == "gpt2":
        config.n_positions, config.n_inner = source.get("context_length"), source.get("feed_forward_length")
        for name in ("n_ctx", "feed_forward_length"):
            config.__dict__.pop(name, None)
    else:
        # Without one in the file: MistralConfig's default would limit the sequence.
        config.sliding_window = source.get("attention.sliding_window")
        if config.model_type == "qwen2":
            config.use_sliding_window = False
        if source.get("rope.scaling.type") == "linear":
            config.rope_scaling = {"rope_type": "linear", "factor": float(source.get("rope.scaling.factor", 1.0))}
        if source.rope_factors is not None:
            config.rope_scaling = _llama3_scaling(source)
    return config


def _llama3_scaling(source: GgufFile) -> dict[str, Any] | None:
    """The scaling that has the file's factors. None: all factors are 1.

    Raises:
        ConfigError: Llama 3.1 and 3.2 have other factors.
    """
    factors = source.rope_factors or ()
    if all(factor == 1.0 for factor in factors):
        return None
    theta = float(source.get("rope.freq_base", 10000.0))
    for scaling in _LLAMA3:
        expected = [_factor(theta ** (-i / len(factors)), scaling) for i in range(len(factors))]
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected, strict=True)):
            return dict(scaling)
    raise ConfigError(
        [
            f"path={source.path}: rope_freqs.weight holds other rotary factors than Llama 3.1 and 3.2 have; "
            "import the model's Hugging Face folder instead"
        ]
    )


def _factor(frequency: float, scaling: dict[str, Any]) -> float:
    """By how much Llama 3 divides a rotary frequency: 1 for short waves, `factor` for long ones, and smoothly between."""
    length, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = length * frequency / (2 * math.pi)
    smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
    return float(1.0 / ((1.0 - smooth) / scaling["factor"] + smooth))


@contextmanager
def _progress() -> Iterator[None]:
    """Shows this project's progress in place of transformers' bar, which fills a log."""
    theirs = modeling_gguf_pytorch_utils.tqdm

    def bar(tensors: Any, desc: str = "", **_: Any) -> Any:
        return Progress(tensors, desc="dequantising", unit="tensor", disable=len(tensors) < 100)

    modeling_gguf_pytorch_utils.tqdm = bar
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = theirs


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
