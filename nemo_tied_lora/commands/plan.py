# SPDX-License-Identifier: Apache-2.0
"""`tied-lora plan`: prints what an adapter costs on a model and a layout, and refuses layouts that cannot work.

Builds no model. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_tied_lora.commands.local_command import run_composed
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.adapter_cost import Precision, check_numbers, plan, several_adapters
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.base_config import adapter_section
from nemo_tied_lora.planning.gpu_memory import Activations, stage_memory
from nemo_tied_lora.planning.parallel_layout import Layout, check, fsdp_problems
from nemo_tied_lora.planning.settings.base_quantization import (
    BaseQuantization,
    quantization_lines,
    quantization_problems,
)
from nemo_tied_lora.tables import text_table

__all__ = ["SUMMARY", "main", "plan_of"]

SUMMARY = "print parameters, memory of a GPU, file size and network traffic; refuse layouts that cannot work"

_FORMATS = ("table", "json")
_LABELS = {
    "trained_parameters_per_rank": "trained parameters per rank",
    "weight_bytes_per_rank": "memory per rank: adapter weights",
    "gradient_bytes_per_rank": "memory per rank: gradients",
    "optimizer_bytes_per_rank": "memory per rank: optimizer state",
    "bytes_per_rank": "memory per rank: sum",
    "file_bytes": "adapter file",
    "reduced_bytes_per_step": "sent per step: tied gradients, pipeline",
    "sequence_parallel_bytes_per_step": "sent per step: gradients, sequence parallel",
    "data_parallel_bytes_per_step": "sent per step: gradients, data parallel",
    "activation_bytes_per_microbatch": "sent per microbatch: activations, tensor parallel",
}

_EXAMPLES = """  tied-lora plan model=llama2_7b model.peft.tied_lora.rank=8 "model.peft.tied_lora.targets=[linear_qkv]"
  tied-lora plan model=llama2_70b layout=tp8pp4 model.sequence_parallel=true
  tied-lora plan model=llama2_13b layout=tp8pp4 trainer.num_nodes=8 model.peft.tied_lora.preset=tl5 format=json
  tied-lora plan model=llama2_7b preset=vera "adapters=[1, 100, 10000]"
  tied-lora plan --config-dir my_configs model=my_model      (my_configs/model/my_model.yaml, NeMo's keys)
"""


def main(argv: list[str]) -> int:
    """Prints the plan on stdout and returns 0, or prints every problem on stderr and returns 2."""
    return run_composed(
        "plan", argv, _print_plan, summary=SUMMARY, examples=_EXAMPLES, groups=("model", "preset", "layout")
    )


def _print_plan(values: dict[str, Any]) -> int:
    result = plan_of(values)
    print(json.dumps(result, indent=2) if values["format"] == "json" else _tables(result))
    return 0


def plan_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's numbers.

    Raises:
        ConfigError: lists every problem of the format, adapter, model, layout and precision, alone and together.
    """
    problems = Problems()
    problems.one_of("format", cfg.get("format"), _FORMATS)
    model, trainer = (problems.section(name, cfg.get(name)) for name in ("model", "trainer"))
    peft = problems.section("model.peft", model.get("peft"))
    if peft.get("peft_scheme") != "tied_lora":
        problems.append(f"model.peft.peft_scheme={peft.get('peft_scheme')!r}: only tied_lora can be planned")
    config = problems.attempt(adapter_section, peft)
    arch = problems.attempt(Architecture.from_model_config, model)
    layout = problems.attempt(Layout.from_config, {"model": model, "trainer": trainer})
    names = trainer.get("precision", 32), bool(model.get("megatron_amp_O2"))
    precision = problems.attempt(Precision.from_names, *names)
    activations = problems.attempt(Activations.from_model_config, model)
    numbers = problems.attempt(check_numbers, cfg.get("adapters"))
    if arch is not None and layout is not None:
        problems += check(arch, layout, config)
    problems += fsdp_problems(model)
    setting = model.get("base_quantization")
    problems += quantization_problems(setting, model, arch, layout, here=False)
    problems.raise_if_any()
    assert arch
    assert layout
    assert config
    assert precision
    assert activations
    assert numbers
    result = plan(arch, layout, config, precision)
    adapter_bytes = result["numbers"]["bytes_per_rank"]
    quantization = BaseQuantization.from_setting(setting)
    memory = stage_memory(arch, layout, config, precision, activations, adapter_bytes, quantization)
    result["assumptions"] += quantization_lines(setting)
    several = several_adapters(arch, layout, config, precision, numbers)
    return {**result, "several": several, "memory": memory and memory.as_dict()}


def _tables(result: Mapping[str, Any]) -> str:
    """The plan as text: the model and layout, the numbers beside LoRA's, and the assumptions."""
    arch, layout, adapter = result["architecture"], result["layout"], result["adapter"]
    model = (
        f"model    {arch['num_layers']} layers, hidden {arch['hidden_size']}, ffn {arch['ffn_hidden_size']}, "
        f"{arch['num_attention_heads']} heads, {arch['num_query_groups']} query groups, sequence {arch['seq_length']}"
    )
    ranks = (
        f"layout   tensor {layout['tp_size']} x pipeline {layout['pp_size']} x context {layout['cp_size']} x data "
        f"{layout['dp_size']} = {layout['world_size']} rank{'' if layout['world_size'] == 1 else 's'}"
        + (", sequence parallel" if layout["sequence_parallel"] else "")
    )
    tied = " ".join(adapter["tied"]) or "nothing"
    trained = f"adapter  rank {adapter['rank']}, trained {' '.join(adapter['trained'])}, tied {tied}"
    if adapter["rank_budget"] is not None:
        trained += (
            f", pruned to a mean rank of {adapter['rank_budget']['target_rank']:g}; the numbers are those before"
        )
    rows = [("", "this adapter", f"LoRA rank {adapter['rank']}", "share of LoRA"), *_rows(result)]
    tables = [text_table(rows), _memory_table(result["memory"], layout["pp_size"]), _several_table(result["several"])]
    notes = [f"- {line}" for line in [*result["assumptions"], *_MEMORY_NOTES]]
    return "\n\n".join(["\n".join([model, ranks, trained]), *tables, "\n".join(notes)])


_MEMORY_NOTES = (
    "one GPU: activations by Korthikanti et al. 2022 (arXiv 2205.05198), attention fused",
    "one GPU: the CUDA context, NCCL's buffers and fragmentation are not included",
)


def _memory_table(memory: Mapping[str, Any] | None, num_stages: int) -> str:
    """The memory of the fullest GPU, as text."""
    if memory is None:
        return "one GPU's memory: not estimated for a mixture of experts, nor without model.override_vocab_size"
    where = f"one GPU of stage {memory['stage']}, the fullest of {num_stages}" if num_stages > 1 else "one GPU"
    rows = [[f"{where}, an estimate", ""], *_base_rows(memory)]
    labels = {"adapter": "adapter, gradients, optimizer", "activations": "activations", "sum": "sum"}
    rows += [[label, _readable(memory[key])] for key, label in labels.items()]
    return text_table(rows)


def _base_rows(memory: Mapping[str, Any]) -> list[list[str]]:
    """The base's weights; if its linears are quantised, these and the rest apart, and the largest dequantised linear."""
    linears = memory["quantised"]
    if linears is None:
        return [["base weights", _readable(memory["base"])]]
    held = linears["held_bytes"]
    share = f"{linears['bits_per_weight']:.3g} bits a weight in place of {_readable(linears['unquantised_bytes'])}"
    return [
        [f"base: linears in {linears['precision']}, {share}", _readable(held)],
        ["base: embeddings, norms, biases", _readable(memory["base"] - held)],
        ["base: one linear, dequantised for its product", _readable(linears["peak_bytes"])],
        ["base: kept for backward beside the codes", "0 B"],
    ]


def _several_table(several: Mapping[str, Any]) -> str:
    """The weights of several adapters on one model, as text: on the rank that holds most, and on all ranks."""
    rows = [["adapters on one model, weights alone", *(f"{number:,}" for number in several["numbers"])]]
    for place, key in (("per rank", "bytes_per_rank"), ("all ranks", "bytes")):
        for name, planned in several["adapters"].items():
            rows.append([f"{place}: {name}", *map(_readable, planned[key])])
    return text_table(rows)


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(label, this adapter's number, LoRA's number, the share) for each row."""
    ours, loras, shares = result["numbers"], result["lora_numbers"], result["share_of_lora"]
    key = "trained_parameters"
    yield "trained parameters", *_counts(ours[key], loras[key], shares[key])
    for target, part in result["targets"].items():
        yield f"  {target}", *_counts(part[key], part["lora_parameters"], part["share_of_lora"])
    base = result["base_parameters"]
    if base:
        yield f"  of the base's {base:,}", f"{100 * ours[key] / base:.4g}%", f"{100 * loras[key] / base:.4g}%", ""
    for name, label in _LABELS.items():
        cells = _counts if name.startswith("trained") else _sizes
        yield label, *cells(ours[name], loras[name], shares[name])


def _counts(ours: int, lora: int, share: float | None) -> tuple[str, str, str]:
    return f"{ours:,}", f"{lora:,}", _percent(share)


def _sizes(ours: int, lora: int, share: float | None) -> tuple[str, str, str]:
    return _readable(ours), _readable(lora), _percent(share)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"


def _readable(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{num_bytes} B" if unit == "B" else f"{size:.2f} {unit}"
