# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter as plain LoRA in a folder that `peft.PeftModel.from_pretrained` loads onto the Hugging Face base.

adapter_config.json           rank, alpha, target modules, layers
adapter_model.safetensors     base_model.model.<linear>.lora_A.weight (r, in) and .lora_B.weight (out, r)
README.md                     the model card

Of an adapter with a rank budget, each linear has the rank that is left, at least 1 (of rank 0: one row of zeros, because peft
and vLLM refuse it). rank_pattern and alpha_pattern give each its own, so that every scale is 1; lora_B holds alpha / r. So
readers that ignore the patterns, and scale by alpha / r, compute the same. llama.cpp and TensorRT-LLM scale by alpha / the
rank of the tensor: they need the adapter without its masks (`uniform_rank`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_tied_lora.adapter.factor_names import FactorName, each_linear
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.conversion.hf_families import BaseSizes, Family, family_of_base, join_rows, split_rows
from nemo_tied_lora.conversion.untie_to_lora import PlainLora, expand, plain_alpha
from nemo_tied_lora.conversion.verify_export import Difference, largest_difference
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.files import replace_folder
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization

__all__ = ["adapter_config", "check_hf_peft", "write_hf_peft"]

_CONFIG, _STATE, _CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_PREFIX = "base_model.model"
_NUMBERED = re.compile(r"^.*?\.\d+\.")
"""The start of a linear's name, up to its layer's number."""
_TRANSFORMERS_BLOCK = 64
"""The one block size of transformers' 4-bit linears (bitsandbytes' Linear4bit)."""


def write_hf_peft(file: AdapterFile, base: Mapping[str, Any], folder: Path, base_model: str | None) -> Path:
    """Writes the folder beside `folder` and renames it there.

    Args:
        file: the tied adapter.
        base: NeMo's model keys of the base that it was trained on.
        base_model: name or path of the Hugging Face base, for users; peft does not need it.

    Raises:
        ConfigError: the base does not match a known Hugging Face family, its shapes are not those of the adapter, or
            `folder` holds something other than an export.
    """
    family, sizes = _fitting(file, base)
    if folder.exists():
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        strangers = sorted(found - {_CONFIG, _STATE, _CARD})
        if not folder.is_dir() or strangers or (found and _CONFIG not in found):
            held = f", it holds {', '.join(strangers[:3])}" if strangers else ""
            raise ConfigError([f"output={folder}: exists and is not an export{held}; name another"])

    def write(new: Path) -> None:
        save_file(dict(_tensors(file, family, sizes)), new / _STATE, metadata={"format": "pt"})
        config = adapter_config(file, family, sizes.num_layers, base_model)
        (new / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (new / _CARD).write_text(_card(file, config, base_model), encoding="utf-8")

    return replace_folder(folder, write)


def check_hf_peft(folder: Path, file: AdapterFile, base: Mapping[str, Any]) -> Difference:
    """Reads the folder back and compares its updates with the tied formula."""
    family, sizes = _fitting(file, base)
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    with safe_open(folder / _STATE, framework="pt") as tensors:

        def update(layer: int, target: str, x: torch.Tensor) -> torch.Tensor:
            """peft's update of the target's output, with rows in Megatron's order."""
            outputs = []
            for part in family.targets[target]:
                key = f"{family.layer_in_config(layer)}.{part.name}"
                scale = alphas.get(key, config["lora_alpha"]) / ranks.get(key, config["r"])
                name = f"{_PREFIX}.{family.layer(layer)}.{part.name}"
                lora_A, lora_B = (tensors.get_tensor(f"{name}.lora_{f}.weight").to(x.dtype) for f in "AB")
                outputs.append(scale * (lora_B @ (lora_A @ x)))
            return join_rows(outputs, target, family.targets[target], sizes)

        return largest_difference(file, update)


def adapter_config(file: AdapterFile, family: Family, num_layers: int, base_model: str | None) -> dict[str, Any]:
    """The content of adapter_config.json."""
    ranks = {key: max(1, rank) for key, rank in file.ranks().items()}
    widest = max(ranks.values(), default=file.config.rank)
    pattern = {
        f"{family.layer_in_config(layer)}.{part.name}": ranks[f"layers.{layer}.{target}"]
        for layer, target, _ in each_linear(file.shapes)
        for part in family.targets[target]
        if ranks and ranks[f"layers.{layer}.{target}"] != widest
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": widest,
        "lora_alpha": widest if ranks else plain_alpha(file.config),
        "lora_dropout": 0.0,
        **_linears(file, family, num_layers),
        "fan_in_fan_out": family.transposed,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
    }


def _linears(file: AdapterFile, family: Family, num_layers: int) -> dict[str, Any]:
    """Which linears peft adapts. Names the layers only if some have no adapter, and each linear if targets differ in layers."""
    layers = {shape.layers for shape in file.shapes.values()}
    if len(layers) > 1 or family.of_pattern:
        names = [
            f"{family.layer_in_config(layer)}.{part.name}"
            for layer, target, _ in each_linear(file.shapes)
            for part in family.targets[target]
        ]
        return {"target_modules": names, "layers_to_transform": None, "layers_pattern": None}
    (adapted,) = layers
    every_layer = len(adapted) == num_layers
    return {
        "target_modules": family.target_modules(tuple(file.shapes)),
        "layers_to_transform": None if every_layer else list(adapted),
        "layers_pattern": None if every_layer else family.layers.rpartition(".")[2],
    }


def _fitting(file: AdapterFile, base: Mapping[str, Any]) -> tuple[Family, BaseSizes]:
    """The family and the sizes of the base.

    Raises:
        ConfigError: no family matches the base, or its shapes are not those of the adapter.
    """
    family, sizes = (
        family_of_base(base, "base", "use to=nemo-lora or to=safetensors"),
        BaseSizes.from_model_config(base, "base"),
    )
    Problems(sizes.differences(file.shapes)).raise_if_any()
    return family, sizes


def _tensors(file: AdapterFile, family: Family, sizes: BaseSizes) -> Iterator[tuple[str, torch.Tensor]]:
    for lora in expand(file.config, file.shapes, file.state, alpha=file.config.rank if file.masks else None):
        lora = _without_pruned(lora, file)
        parts = family.targets[lora.target]
        for part, rows in zip(parts, split_rows(lora.lora_B, lora.target, parts, sizes), strict=True):
            name = f"{_PREFIX}.{family.layer(lora.layer)}.{part.name}"
            # A copy for each linear, as in peft's own files: safetensors refuses tensors that share memory.
            yield f"{name}.lora_A.weight", lora.lora_A.clone()
            yield f"{name}.lora_B.weight", rows.contiguous()


def _without_pruned(lora: PlainLora, file: AdapterFile) -> PlainLora:
    """The LoRA without the rows of pruned entries; with one row of zeros if none is left."""
    if not file.masks:
        return lora
    kept = file.masks[str(FactorName(lora.layer, lora.target, "u"))].nonzero().flatten()
    if not len(kept):
        zeros = lora.lora_A.new_zeros(1, lora.lora_A.shape[1]), lora.lora_B.new_zeros(len(lora.lora_B), 1)
        return PlainLora(lora.layer, lora.target, *zeros)
    return PlainLora(lora.layer, lora.target, lora.lora_A[kept], lora.lora_B[:, kept])


def _card(file: AdapterFile, config: Mapping[str, Any], base_model: str | None) -> str:
    """The model card: what the adapter is, how to load it, and how it was made."""
    head = ["---", "library_name: peft", "tags: [lora, tied-lora]", "pipeline_tag: text-generation"]
    if base_model is not None:
        head.append(f"base_model: {json.dumps(base_model)}")
    tied, training = file.config, file.yaml.get("training") or {}
    base = (file.yaml.get("base") or {}).get("name") or "unknown"
    held = {
        "precision of that base": file.yaml.get("base_precision"),
        "dtype of its weights": file.yaml.get("base_dtype"),
    }
    facts = [
        ("rank", tied.rank),
        *_ranks_left(file),
        (
            "alpha",
            f"{tied.alpha:g}, over the square root of the rank" if tied.alpha_rule == "sqrt" else tied.alpha_by_rank,
        ),
        ("trained", ", ".join(tied.trained)),
        ("tied", ", ".join(tied.tied) or "nothing"),
        ("targets", ", ".join(dict.fromkeys(_NUMBERED.sub("", name) for name in config["target_modules"]))),
        ("layers", _layers_of_card(file, config)),
        ("base it was trained on", base),
        *((name, value) for name, value in held.items() if value),
        *((name, value) for name, value in training.items() if isinstance(value, (int, float, str))),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    loading = _loading(held["precision of that base"], held["dtype of its weights"], base_model or "path/to/the/base")
    return (
        "\n".join(head)
        + f"""
---

# Tied-LoRA adapter, as plain LoRA

Trained with Tied-LoRA (arXiv 2311.09578): `y = W x + scale diag(v) B diag(u) A x`, with A and B shared by all
layers. This folder holds it layer by layer as plain LoRA, `lora_A = diag(u) A` and `lora_B = diag(v) B`.
lora_B also holds the part of the scale that lora_alpha cannot express. So this is the same function, in a file that
peft, vLLM and other readers of LoRA load.

{loading}| | |
|---|---|
{table}
"""
    )


def _layers_of_card(file: AdapterFile, config: Mapping[str, Any]) -> str:
    if len({shape.layers for shape in file.shapes.values()}) > 1:
        return "; ".join(f"{target} {list(shape.layers)}" for target, shape in file.shapes.items())
    return "all" if config["layers_to_transform"] is None else str(config["layers_to_transform"])


def _ranks_left(file: AdapterFile) -> list[tuple[str, str]]:
    left = file.ranks().values()
    return [("ranks after pruning", f"{min(left)} to {max(left)}, mean {sum(left) / len(left):.2f}")] if left else []


def _loading(precision: object, dtype: object, where: str) -> str:
    """How transformers and peft load base and adapter: by the recipe of a quantised base, if transformers has one."""
    plain = f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{where}"), "path/to/this/folder")
```

"""
    quantization = BaseQuantization.from_precision(precision)
    if quantization is None:
        return plain
    head = f"The adapter was trained on a base whose decoder linears were in {precision}"
    if quantization.kind != "nf4":
        return f"{plain}{head}. transformers has no such form:\nits 8-bit layers round the activations too.\n\n"
    if quantization.block_size != _TRANSFORMERS_BLOCK:
        return f"{plain}{head}. transformers has blocks of\n{_TRANSFORMERS_BLOCK} alone.\n\n"
    return _recipe(quantization, dtype, where, head)


def _recipe(quantization: BaseQuantization, dtype: object, where: str, head: str) -> str:
    """How transformers makes the codes of the training. Its own default dtype of a 4-bit base is float16."""
    held = dtype if dtype in ("float16", "bfloat16", "float32") else "float32"
    options = ["load_in_4bit=True", 'bnb_4bit_quant_type="nf4"']
    options += ["bnb_4bit_use_double_quant=True"] if quantization.double else []
    options += [f"bnb_4bit_compute_dtype=torch.{held}"] if held != "float32" else []  # its default
    origin = (
        f"of a base in {held}" if held == dtype else "the training's dtype is not recorded, and float32 rounds nothing"
    )
    limit = (
        "With several\ntensor-parallel ranks, the training's double quantisation was a slightly different one."
        if quantization.double
        else "transformers\nkeeps the blocks' largest values in float32; for a base in bfloat16 they are the same numbers."
    )
    return f"""```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

recipe = BitsAndBytesConfig({", ".join(options)})
dtype = torch.{held}  # {origin}
base = AutoModelForCausalLM.from_pretrained("{where}", torch_dtype=dtype, quantization_config=recipe)
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

{head}. This recipe
makes the same codes. On the plain base, the adapter does not do what it learned. {limit}

"""
