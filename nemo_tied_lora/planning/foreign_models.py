# SPDX-License-Identifier: Apache-2.0
"""Says what a file or folder is that was named in place of a `.nemo`, and what to do with it. Reads a few bytes of it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["not_a_nemo"]

_IMPORT = "make a base of it: tied-lora import from=hf-base path={folder} output=base.nemo"
_LORA = "make a tied adapter of it: tied-lora import from=lora path={folder} output=adapter.nemo"
_EXPORT_NEMO_2 = (
    "export it to Hugging Face's form (nemo.collections.llm.export_ckpt), then tied-lora import from=hf-base"
)
_HEAD = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")


def not_a_nemo(path: Path) -> str | None:
    """Returns what the path is, and the remedy. None: it may be a `.nemo`, packed or unpacked.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        return "is not a file"
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return _content(path, head)


def _folder(path: Path) -> str | None:
    has = {entry.name for entry in path.iterdir()}
    if "model_config.yaml" in has:
        return None
    if {"context", "weights"} <= has:
        return f"is a checkpoint of NeMo 2; {_EXPORT_NEMO_2}"
    if "adapter_config.json" in has:
        return f"is a peft adapter; {_LORA.format(folder=path)}"
    if "config.json" in has:
        return f"is a Hugging Face model; {_IMPORT.format(folder=path)}"
    if "latest_checkpointed_iteration.txt" in has:
        return "is a checkpoint of Megatron-LM; convert it to a Hugging Face model, then tied-lora import from=hf-base"
    if "checkpoint.json" in has:
        return "is a training checkpoint; tied-lora convert-checkpoint makes an adapter of it"
    if ".metadata" in has or "model_weights" in has:
        return (
            "is a distributed checkpoint without model_config.yaml; name the .nemo, or the folder it was unpacked to"
        )
    return f"is a folder without model_config.yaml{' (it is empty)' if not has else ''}; name a .nemo, or one unpacked"


def _content(path: Path, head: bytes) -> str | None:
    folder = path.resolve().parent
    if not head:
        return "is empty; copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the file; run git lfs pull"
    if head[257:262] == b"ustar" or head.startswith(_COMPRESSED):
        return None
    if head.startswith(b"PK\x03\x04") or head[:2] in (b"\x80\x02", b"\x80\x04"):
        return f"is a file of torch.save or a zip; if a Hugging Face model: {_IMPORT.format(folder=folder)}"
    if head.startswith(b"GGUF"):
        return f"is a GGUF file; {_IMPORT.format(folder=path)}"
    if _is_safetensors(head):
        adapter = (folder / "adapter_config.json").is_file()
        return f"is a safetensors file; {(_LORA if adapter else _IMPORT).format(folder=folder)}"
    if not head.strip(b"\0"):
        return "holds zeros only; copy it again"
    text = _text(head)
    if text is not None:
        if text.lstrip().lower().startswith(("<!doctype", "<html")):
            return "is a web page, so the download has failed; get it again"
        return f"is a text file that begins with {text.strip()[:30]!r}; name a .nemo"
    if path.stat().st_size < _HEAD:
        return f"has {len(head)} bytes, less than a tar's first header; copy it again"
    return None  # an old tar without "ustar"


def _is_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return 2 <= length < 1 << 30 and head[8:9] == b"{" and head[9:10] in (b'"', b"}", b" ", b"\n")


def _text(head: bytes) -> str | None:
    """The first characters of a text; None if the bytes are not text."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode("utf-8")
    return text if text.strip() and all(char.isprintable() or char in "\r\n\t\ufeff" for char in text) else None
