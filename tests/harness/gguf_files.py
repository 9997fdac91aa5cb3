# SPDX-License-Identifier: Apache-2.0
"""Writes models of transformers as GGUF files, in the form of llama.cpp's converter: names, row orders, vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type

__all__ = ["bpe_vocabulary", "llama_cpp_rows", "sentencepiece_vocabulary", "write_gguf"]

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write_gguf(
    path: Path,
    model: Any,
    vocabulary: Mapping[str, Any],
    *,
    kind: Type = Type.F32,
    metadata: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes the model, and rounds its own weights to those that the file holds, so that it is the file's oracle.

    Args:
        vocabulary: the metadata below `tokenizer.ggml.`.
        kind: of all matrices whose rows it can hold. Vectors are F32, as llama.cpp stores them.
        metadata: more or other metadata; None as a value leaves a key out.
        drop: tensors to leave out.
        tensors: more tensors.
    """
    config = model.config
    name = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, name)
    for key, value in {**_metadata(config, name), **_prefixed(vocabulary), **(metadata or {})}.items():
        if value is not None:
            _add(writer, key, value)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name), 99)
    for theirs, tensor in model.named_parameters():
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if ours in drop:
            continue
        stored = tensor.data.T if theirs.endswith(_TRANSPOSED) else tensor.data
        heads = _heads(config, theirs)
        if heads is not None:
            stored = llama_cpp_rows(stored, heads)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        used = kind if stored.dim() == 2 and stored.shape[-1] % block == 0 else Type.F32
        data = gguf.quantize(stored.contiguous().numpy(), used)
        writer.add_tensor(ours, data, raw_dtype=used)
        rounded = torch.from_numpy(gguf.dequantize(data, used).copy())
        if heads is not None:
            rounded = _hugging_face_rows(rounded, heads)
        tensor.data.copy_(rounded.T if theirs.endswith(_TRANSPOSED) else rounded)
    for ours, extra in (tensors or {}).items():
        writer.add_tensor(ours, extra.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bpe_vocabulary(tokenizer: Any, pre: str, rows: int, **more: Any) -> dict[str, Any]:
    """The vocabulary of a fast byte-level BPE tokenizer. The rows that are left get unused tokens, as in llama.cpp."""
    import json

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = tokenizer.get_vocab()
    tokens = [word for word, _ in sorted(ids.items(), key=lambda item: item[1])]
    special = {token["content"] for token in described["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]
    kinds = [3 if word in special else 1 for word in tokens]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, *(f"[PAD{n}]" for n in range(len(tokens), rows))],
        "token_type": [*kinds, *([5] * (rows - len(tokens)))],
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **more,
    }


def sentencepiece_vocabulary(model: Path, rows: int, **more: Any) -> dict[str, Any]:
    """The vocabulary of a sentencepiece model."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    size = pieces.get_piece_size()
    kinds = [
        2 if pieces.is_unknown(n) else 3 if pieces.is_control(n) else 6 if pieces.is_byte(n) else 1
        for n in range(size)
    ]
    return {
        "model": "llama",
        "tokens": [*(pieces.id_to_piece(n) for n in range(size)), *(f"[PAD{n}]" for n in range(size, rows))],
        "scores": [*(pieces.get_score(n) for n in range(size)), *([-1000.0] * (rows - size))],
        "token_type": [*kinds, *([5] * (rows - size))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }


def _metadata(config: Any, name: str) -> dict[str, Any]:
    if name == "gpt2":
        own = {
            "block_count": config.n_layer,
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    else:
        own = {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": config.rope_theta,
            "vocab_size": config.vocab_size,
        }
        if name == "llama":
            own["rope.dimension_count"] = config.head_dim
        if config.model_type == "mistral":
            own["attention.sliding_window"] = config.sliding_window
    return {"general.name": "a tiny model", **{f"{name}.{key}": value for key, value in own.items()}}


def _prefixed(vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _heads(config: Any, name: str) -> int | None:
    """The number of heads in the rows of a matrix that llama.cpp reorders, if it is one."""
    if config.model_type not in ("llama", "mistral"):
        return None
    if name.endswith("q_proj.weight"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if name.endswith("k_proj.weight") else None


def llama_cpp_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbours: its rows of a head are the first of each half, the second of each half, and so on."""
    return tensor.reshape(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)


def _hugging_face_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.reshape(heads, -1, 2, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
