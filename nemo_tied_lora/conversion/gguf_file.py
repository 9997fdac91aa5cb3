# SPDX-License-Identifier: Apache-2.0
"""Reads what a GGUF file says about its model, and accepts only what transformers reads without loss. Imports no torch.

transformers ignores metadata and drops tensors for which it has no place. So every key of the architecture and every
tensor must be known here, or is named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_tied_lora.conversion.gguf_vocabulary import vocabulary_problems
from nemo_tied_lora.errors import ConfigError, Problems, is_whole_number

__all__ = ["ARCHITECTURES", "GgufFile", "read_gguf"]

_WHOLE = ("F32", "F16", "BF16", "F64")
_REMEDY = "import the model's Hugging Face folder instead"
_NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_ROPE = ("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor")
_ATTENTION = ("attention.key_length", "attention.value_length", "attention.sliding_window")
_IGNORED = ("vocab_size", "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned")
_BLOCK = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    """The metadata and the tensors that a supported architecture has."""

    needed: tuple[str, ...]
    known: tuple[str, ...] = ()
    block: tuple[str, ...]
    """The tensors of a layer."""
    whole: tuple[str, ...]
    """The tensors outside the layers."""


_LLAMA = _Architecture(
    # Without head_count_kv, transformers leaves the rows of q and k in llama.cpp's order.
    needed=(*_NEEDED, "attention.head_count_kv", _RMS),
    known=(*_ROPE, *_ATTENTION, *_IGNORED, "expert_count", "expert_used_count"),
    block=tuple(f"{name}.weight" for name in _BLOCK),
    whole=("token_embd.weight", "output_norm.weight"),
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "qwen2": _Architecture(
        needed=_LLAMA.needed,
        known=_LLAMA.known,
        block=(*_LLAMA.block, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
        whole=_LLAMA.whole,
    ),
    "gpt2": _Architecture(
        needed=(*_NEEDED, _LAYER),
        known=("attention.head_count_kv", *_IGNORED),
        block=tuple(
            f"{name}.{kind}"
            for name in ["attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"]
            for kind in ("weight", "bias")
        ),
        whole=("token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"),
    ),
}
"""GGUF's word for an architecture -> what it holds. Mistral's files say llama."""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that can be imported."""

    path: Path
    metadata: Mapping[str, Any]
    """Key -> value, without the vocabulary."""
    vocabulary: Mapping[str, Any]
    """The metadata below `tokenizer.ggml.`, without that prefix, and the chat template as `chat_template`."""
    types: Mapping[str, str]
    """Tensor -> the type in which it is stored, such as Q4_1."""
    numbers: Mapping[str, int]
    """Tensor -> how many numbers it has."""
    rows: int
    """Rows of the embedding."""
    rope_factors: tuple[float, ...] | None
    """By which the rotary frequencies are divided, if the file holds such a tensor (Llama 3)."""

    @property
    def architecture(self) -> str:
        """GGUF's word for it."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own metadata."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def name(self) -> str:
        """The file's name without its quantisation."""
        return re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$", "", self.path.stem, flags=re.IGNORECASE) or self.path.stem

    @cached_property
    def main_type(self) -> str:
        """The type that holds the most tensors' numbers."""
        held: Counter[str] = Counter()
        for tensor, word in self.types.items():
            held[word] += self.numbers[tensor]
        linears = Counter({w: n for w, n in held.items() if w not in _WHOLE})
        return (linears or held).most_common(1)[0][0]

    @property
    def is_quantised(self) -> bool:
        """Whether the file holds less than the original weights."""
        return any(word not in _WHOLE for word in self.types.values())

    @property
    def quantisation(self) -> str:
        """How many tensors are stored in which type: "Q4_1 (210 tensors), F32 (61), Q8_0 (1)"."""
        counts = Counter(self.types.values()).most_common()
        return ", ".join(f"{word} ({count}{' tensors' * (i == 0)})" for i, (word, count) in enumerate(counts))


def read_gguf(path: Path) -> GgufFile:
    """Reads the metadata of a file and the names of its tensors, and checks that the model can be imported whole.

    Raises:
        ConfigError: the package gguf is missing, the file is damaged, or it holds something that the import would lose.
            Lists all problems.
    """
    reader = _open(path)
    metadata, vocabulary = _metadata(path, reader)
    start = f"path={path}"
    architecture = metadata.get("general.architecture")
    if metadata.get("general.type") == "adapter":
        raise ConfigError([f"{start}: holds a LoRA, not a model; name the model's own file"])
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(
            [f"{start}: general.architecture={architecture!r} is not supported; it must be one of {known}"]
        )
    if (metadata.get("split.count") or 1) > 1:
        fix = "join them with llama.cpp's llama-gguf-split --merge"
        raise ConfigError([f"{start}: is one of {metadata['split.count']} parts of a model; {fix}"])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    problems = Problems(f"{start}: {line}" for line in _key_problems(architecture, metadata))
    problems += [f"{start}: {line}" for line in vocabulary_problems(vocabulary)]
    if not problems:
        problems += [f"{start}: {line}" for line in _tensor_problems(architecture, metadata, tensors)]
    problems.raise_if_any()
    factors = tensors.get("rope_freqs.weight")
    return GgufFile(
        path=path,
        metadata=metadata,
        vocabulary=vocabulary,
        types={name: tensor.tensor_type.name for name, tensor in tensors.items()},
        numbers={name: int(tensor.n_elements) for name, tensor in tensors.items()},
        rows=int(tensors["token_embd.weight"].shape[-1]),
        rope_factors=None if factors is None else tuple(float(x) for x in factors.data),
    )


def _open(path: Path) -> Any:
    """gguf's reader. It reads past nothing: a file that lacks its last byte is refused."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError([f"path={path}: reading a GGUF file needs the package gguf: pip install gguf"]) from error
    with path.open("rb") as file:
        head = file.read(64)
    if not head.startswith((b"GGUF", b"FUGG")):
        if head.startswith(b"version https://git-lfs"):
            reason = "is git-lfs's pointer, not the model; run git lfs pull"
        else:
            reason = "is empty" if not head else "does not begin as a GGUF file does; it is another kind of file"
        raise ConfigError([f"path={path}: {reason}"])
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # whatever a damaged file raises
        raise ConfigError([f"path={path}: {_damage(error)}"]) from error


def _metadata(path: Path, reader: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields outside and inside the vocabulary."""
    prefix = "tokenizer.ggml."
    try:
        values = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # whatever a damaged file raises
        raise ConfigError([f"path={path}: {_damage(error)}"]) from error
    vocabulary = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    vocabulary["chat_template"] = values.get("tokenizer.chat_template")
    return {key: value for key, value in values.items() if not key.startswith("tokenizer.")}, vocabulary


def _damage(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "").strip()
    return f"is cut off or damaged ({type(error).__name__}: {text}); copy it again"


def _key_problems(architecture: str, metadata: Mapping[str, Any]) -> Iterator[str]:
    kind = ARCHITECTURES[architecture]
    own = {k.partition(".")[2]: value for k, value in metadata.items() if k.startswith(f"{architecture}.")}
    for key in kind.needed:
        if key not in own:
            yield f"{architecture}.{key}: missing; convert the model to GGUF again"
        elif key in (*_NEEDED, "attention.head_count_kv") and not is_whole_number(own[key]):
            yield f"{architecture}.{key}={_short(own[key])}: must be one whole number for all layers; {_REMEDY}"
    for key, value in own.items():
        if key not in (*kind.needed, *kind.known) and value not in (0, False, "", None):
            yield f"{architecture}.{key}={_short(value)}: this release does not know this key; {_REMEDY}"
    if own.get("expert_count"):
        yield f"{architecture}.expert_count={own['expert_count']}: experts cannot be imported; {_REMEDY}"
    if own.get("rope.scaling.type", "none") not in ("none", "linear"):
        yield f"{architecture}.rope.scaling.type={own['rope.scaling.type']!r}: cannot be imported; {_REMEDY}"
    heads, hidden = own.get("attention.head_count"), own.get("embedding_length")
    if not is_whole_number(heads) or not is_whole_number(hidden):
        return
    size = own.get("rope.dimension_count", hidden // heads)
    for key in ("attention.key_length", "attention.value_length"):
        if own.get(key, size) != size:
            yield f"{architecture}.{key}={own[key]}: a head has {size} rotated numbers; Megatron rotates all; {_REMEDY}"


def _tensor_problems(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[str]:
    kind = ARCHITECTURES[architecture]
    layers = range(metadata[f"{architecture}.block_count"])
    needed = {*kind.whole, *(f"blk.{layer}.{name}" for layer in layers for name in kind.block)}
    missing, extra = needed - tensors.keys(), tensors.keys() - needed - {"output.weight", "rope_freqs.weight"}
    if missing:
        yield f"lacks {_some(missing)}; it is not a whole model of {len(layers)} layers"
    if extra:
        yield f"holds {_some(extra)}, for which transformers has no place; {_REMEDY}"
    tokens = metadata.get(f"{architecture}.vocab_size")
    if not missing and tokens is not None and int(tensors["token_embd.weight"].shape[-1]) != tokens:
        rows = int(tensors["token_embd.weight"].shape[-1])
        yield f"{architecture}.vocab_size={tokens}: the embedding has {rows} rows; convert the model to GGUF again"
    yield from _unreadable(tensors)


def _unreadable(tensors: Mapping[str, Any]) -> Iterator[str]:
    """Yields the stored types that the package gguf cannot dequantise, by trying one block of each."""
    import gguf
    import numpy as np

    for kind in sorted({tensor.tensor_type for tensor in tensors.values()}):
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except Exception:  # whatever it raises: NotImplementedError, KeyError
            names = {name for name, tensor in tensors.items() if tensor.tensor_type == kind}
            yield f"{_some(names)}: stored as {kind.name}, which the installed gguf cannot dequantise; upgrade gguf"


def _some(names: set[str]) -> str:
    return f"{min(names)} and {len(names) - 1} more" if len(names) > 1 else min(names)


def _short(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 4:
        return f"{list(value[:4])}..."
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
