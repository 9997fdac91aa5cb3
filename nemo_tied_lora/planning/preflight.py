# SPDX-License-Identifier: Apache-2.0
"""Checks the configurations of finetune, pretrain, generate and evaluate before anything expensive starts.

Compares base, layout, adapter, data and cluster with each other. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.adapter.rank_budget.schedule import length_problems
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, Problems, is_whole_number
from nemo_tied_lora.planning import layout_fits_cluster
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.base_config import adapter_section, other_architecture, usable_base
from nemo_tied_lora.planning.data.data_checks import batch_problems, data_problems
from nemo_tied_lora.planning.data.data_files import unreadable
from nemo_tied_lora.planning.data.prompt_template import template_problems
from nemo_tied_lora.planning.nemo_model_config import adapter_problems, recorded_config, recorded_precision
from nemo_tied_lora.planning.parallel_layout import Layout, check, check_ranks, fsdp_problems
from nemo_tied_lora.planning.settings.base_quantization import (
    continued_lines,
    quantization_lines,
    quantization_problems,
)
from nemo_tied_lora.planning.settings.factor_rates import rate_lines, rate_problems
from nemo_tied_lora.planning.settings.flag_checks import flag_problems, section_problems
from nemo_tied_lora.planning.settings.monitor_checks import monitor_problems
from nemo_tied_lora.planning.settings.number_checks import (
    generation_lines,
    generation_number_problems,
    number_lines,
    number_problems,
)
from nemo_tied_lora.planning.settings.resumed_step import resumed_step_problems
from nemo_tied_lora.planning.settings.run_settings import GuardSettings, survival_problems
from nemo_tied_lora.planning.settings.schedule_checks import run_lines, run_problems
from nemo_tied_lora.planning.settings.text_checks import text_problems
from nemo_tied_lora.planning.settings.training_loop_checks import loop_problems
from nemo_tied_lora.planning.tokenizer_checks import tokenizer_problems

__all__ = ["check_evaluation", "check_finetuning", "check_generation", "check_pretraining"]


_OPTIMIZERS = ("fused_adam", "adamw", "adam", "sgd", "mcore_distributed_optim")
_PRECISIONS = ("bf16", "bf16-mixed", "16", "16-mixed", "32")
_MOST_RESAMPLES = 100_000


def check_finetuning(cfg: Mapping[str, Any], *, runs_here: bool = True) -> list[str]:
    """Checks the configuration of `tied-lora finetune`. Returns the lines to print at the start of the run.

    Args:
        runs_here: False if another machine will run it, so that it does not matter what is installed here.

    Raises:
        ConfigError: with all problems.
    """
    section_problems("finetune", cfg).raise_if_any()
    problems = survival_problems(cfg)
    model = cfg["model"]
    scheme = model["peft"].get("peft_scheme")
    if scheme != "tied_lora":
        problems.append(
            f"model.peft.peft_scheme={'null' if scheme is None else scheme}: this command trains tied_lora; leave it out; "
            "for plain LoRA: preset=lora"
        )
    problems += loop_problems(model)
    problems += fsdp_problems(model)
    problems += tokenizer_problems(model.get("tokenizer"))
    problems += _checkpoint_problems(cfg.get("exp_manager") or {})
    problems += _optimizer_problems(model["optim"].get("name"))
    config = problems.attempt(adapter_section, model["peft"])
    base = problems.attempt(usable_base, model.get("restore_from_path"))
    start = model["peft"].get("restore_from_path")
    problems += [*flag_problems("finetune", cfg), *text_problems("finetune", cfg)]
    if start is not None:
        problems += adapter_problems(start, "model.peft.restore_from_path")
    given = [key for key, value in (model["peft"].get("tied_lora") or {}).items() if _is_given(value)]
    if start is not None and given:
        fix = "the adapter of restore_from_path has its own; remove these keys"
        problems.append(f"model.peft.tied_lora ({', '.join(given)}): {fix}")
    problems += _layout_problems(cfg, {**(base or {}), **_layout_keys(model)} if base else None, config)
    problems += _quantization_problems(cfg, base, here=runs_here)
    problems += rate_problems(cfg, adapter=True)
    problems += _run_problems(cfg, base, config, runs_here=runs_here)
    problems += _output_problems(cfg, [model.get("restore_from_path"), start])
    problems.raise_if_any()
    rates = rate_lines(cfg, adapter_section(model["peft"]) if start is None else recorded_config(start))
    lines = [*run_lines(cfg), *rates, *number_lines(cfg), *quantization_lines(model.get("base_quantization"))]
    if start is not None:
        recorded = recorded_precision(start)
        lines += continued_lines("model.peft.restore_from_path", start, recorded, model.get("base_quantization"))
    return lines


def check_pretraining(cfg: Mapping[str, Any]) -> list[str]:
    """Checks the configuration of `tied-lora pretrain`. Returns the lines to print at the start of the run.

    Raises:
        ConfigError: with all problems.
    """
    section_problems("pretrain", cfg).raise_if_any()
    problems = survival_problems(cfg)
    problems += [*flag_problems("pretrain", cfg), *text_problems("pretrain", cfg)]
    if cfg["model"]["peft"].get("tied_lora"):
        problems.append(
            "model.peft.tied_lora: pretrain trains every parameter, without an adapter; remove preset=, peft="
        )
    tokenizer = cfg["model"]["tokenizer"].get("model")
    problems.file("model.tokenizer.model", tokenizer, "name a sentencepiece model")
    problems += rate_problems(cfg, adapter=False)
    problems += _layout_problems(cfg, cfg["model"], None)
    problems += _run_problems(cfg, cfg["model"], None)
    problems += _output_problems(cfg, [tokenizer])
    problems.raise_if_any()
    return [*run_lines(cfg), *number_lines(cfg)]


def check_generation(cfg: Mapping[str, Any]) -> list[str]:
    """Checks the configuration of `tied-lora generate`. Returns the lines to print at the start.

    Raises:
        ConfigError: with all problems.
    """
    section_problems("generate", cfg).raise_if_any()
    problems = Problems()
    base = problems.attempt(usable_base, cfg.get("base"), key="base")
    adapter = cfg.get("adapter")
    if adapter is not None:
        found = adapter_problems(adapter, "adapter")
        problems += [
            f"{line}; adapter=null generates with the base alone" if "no such" in line else line for line in found
        ]
    if (cfg.get("prompts") is None) == (cfg.get("prompts_file") is None):
        problems.append("prompts, prompts_file: give one of them: prompts=['...'] or prompts_file=questions.jsonl")
    problems += [*flag_problems("generate", cfg), *text_problems("generate", cfg)]
    prompts, prompts_file = cfg.get("prompts"), cfg.get("prompts_file")
    if prompts is not None and not (
        isinstance(prompts, list) and prompts and all(isinstance(p, str) for p in prompts)
    ):
        problems.append(f"prompts={prompts!r}: must be a list of texts: \"prompts=['...']\"")
    for number, prompt in enumerate(prompts if isinstance(prompts, list) else [], 1):
        if isinstance(prompt, str) and any("\ud800" <= character <= "\udfff" for character in prompt):
            problems.append(f"prompts: prompt {number} is not valid Unicode; write it in UTF-8")
    if prompts_file is not None:
        problems += unreadable("prompts_file", Path(str(prompts_file)))
        problems += template_problems("prompt_template", cfg.get("prompt_template"))
    for key in ("tokens_to_generate", "batch_size"):
        problems.whole_number(key, cfg.get(key))
    temperature = cfg.get("temperature")
    if temperature is not None and (not isinstance(temperature, (int, float)) or temperature <= 0):
        problems.append(f"temperature={temperature!r}: must be greater than 0; null picks the likeliest token")
    problems.one_of("trainer.precision", str(cfg["trainer"].get("precision")), _PRECISIONS)
    problems += _output_problems(cfg, [cfg.get("base"), adapter, prompts_file], suffix=None)
    problems += generation_number_problems(cfg, base)
    problems += _layout_problems(cfg, {**(base or {}), **_layout_keys(cfg["model"])} if base else None, None)
    problems += _quantization_problems(cfg, base)
    problems.raise_if_any()
    return [*generation_lines(cfg), *quantization_lines(cfg["model"].get("base_quantization"))]


def check_evaluation(cfg: Mapping[str, Any], adapters: Sequence[str | None]) -> list[str]:
    """Checks the configuration of `tied-lora evaluate`, except the section `task` and the list of adapters.

    Returns the lines to print at the start.

    Args:
        adapters: their paths; None is the base alone.

    Raises:
        ConfigError: with all problems.
    """
    section_problems("evaluate", cfg).raise_if_any()
    problems = Problems()
    base = problems.attempt(usable_base, cfg.get("base"), key="base")
    for path in adapters:
        if path is not None:
            found = adapter_problems(path, "adapter")
            problems += found or ([] if base is None else other_architecture(path, base))
    problems += [*flag_problems("evaluate", cfg), *text_problems("evaluate", {**cfg, "adapter": None})]
    for key in ("batch_size", "batch_tokens", "resamples"):
        problems.whole_number(key, cfg.get(key))
    if is_whole_number(resamples := cfg.get("resamples"), _MOST_RESAMPLES + 1):
        problems.append(
            f"resamples={resamples}: must be at most {_MOST_RESAMPLES}; more changes no digit that is shown"
        )
    problems.one_of("trainer.precision", str(cfg["trainer"].get("precision")), _PRECISIONS)
    problems += _layout_problems(cfg, {**(base or {}), **_layout_keys(cfg["model"])} if base else None, None)
    problems += _quantization_problems(cfg, base)
    problems.raise_if_any()
    return quantization_lines(cfg["model"].get("base_quantization"))


def _run_problems(
    cfg: Mapping[str, Any], base: Mapping[str, Any] | None, config: TiedLoraConfig | None, *, runs_here: bool = True
) -> Problems:
    """Checks what every training run has: guards, precision, data, folder, and room and time on the cluster."""
    problems = Problems()
    problems.attempt(GuardSettings.from_mapping, cfg.get("guards"))
    problems.one_of("trainer.precision", str(cfg["trainer"].get("precision")), _PRECISIONS)
    problems += [*run_problems(cfg), *number_problems(cfg), *monitor_problems(cfg), *resumed_step_problems(cfg)]
    problems += data_problems(cfg, runs_here=runs_here)
    problems += _logger_problems(cfg.get("exp_manager") or {})
    problems += layout_fits_cluster.folder_problems(cfg)
    steps = cfg["trainer"].get("max_steps")
    if config is not None and config.budget is not None and is_whole_number(steps):
        problems += length_problems(config.budget, steps, "trainer.max_steps")
    problems += _allocation_problems(cfg, base, config)
    return problems


def _is_given(value: object) -> bool:
    """Whether a key of the adapter has a value. A section of nulls has none."""
    return any(map(_is_given, value.values())) if isinstance(value, Mapping) else value is not None


def _layout_keys(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that the command decides, not the base: parallel sizes and batches."""
    names = ("micro_batch_size", "global_batch_size", "sequence_parallel")
    return {key: value for key, value in model.items() if key in names or key.endswith("parallel_size")}


def _layout_problems(
    cfg: Mapping[str, Any], model: Mapping[str, Any] | None, config: TiedLoraConfig | None
) -> Iterator[str]:
    if cfg["model"].get("virtual_pipeline_model_parallel_size") is not None:
        yield "model.virtual_pipeline_model_parallel_size: NeMo 2.4's model cannot be interleaved; set it to null"
        return
    if model is not None and model.get("num_moe_experts"):
        fix = "adapt it on plain megatron-core, with nemo_tied_lora.inject"
        yield f"model.num_moe_experts={model['num_moe_experts']!r}: a mixture is not tested through NeMo yet; {fix}"
        return
    problems = Problems()
    layout = problems.attempt(Layout.from_config, {"model": cfg["model"], "trainer": cfg["trainer"]})
    arch = None if model is None else problems.attempt(Architecture.from_model_config, model)
    yield from problems
    if layout is not None:
        yield from check_ranks(layout) if arch is None else check(arch, layout, config)


def _quantization_problems(
    cfg: Mapping[str, Any], base: Mapping[str, Any] | None, *, here: bool = True
) -> Iterator[str]:
    """Checks `model.base_quantization` against the base, the layout and the run's other keys."""
    unreported = Problems()  # `_layout_problems` reports them
    layout = unreported.attempt(Layout.from_config, {"model": cfg["model"], "trainer": cfg["trainer"]})
    sizes = None if base is None else {**base, **_layout_keys(cfg["model"])}
    arch = None if sizes is None else unreported.attempt(Architecture.from_model_config, sizes)
    model = {**(base or {}), **cfg["model"]}
    yield from quantization_problems(cfg["model"].get("base_quantization"), model, arch, layout, here=here)


def _allocation_problems(
    cfg: Mapping[str, Any], base: Mapping[str, Any] | None, config: TiedLoraConfig | None
) -> Iterator[str]:
    """Checks data, disk space and time, if the base and the layout have no problems themselves."""
    try:
        layout = Layout.from_config({"model": cfg["model"], "trainer": cfg["trainer"]})
        arch = Architecture.from_model_config({**(base or {}), **_layout_keys(cfg["model"])})
        tuned = config is not None or cfg["model"]["peft"].get("peft_scheme") == "tied_lora"
    except ConfigError:
        return  # reported by `_layout_problems`
    if layout.resolved_dp_size == 0 or check(arch, layout, config):
        return
    yield from batch_problems(cfg, base or {}, layout)
    if config is not None or not tuned:
        yield from layout_fits_cluster.disk_problems(cfg, arch, layout, config)
        yield from layout_fits_cluster.time_problems(cfg, arch, layout, config)


def _checkpoint_problems(exp_manager: Mapping[str, Any]) -> Iterator[str]:
    """Refuses NeMo's options that write other kinds of checkpoints."""
    if (exp_manager.get("ema") or {}).get("enable"):
        yield "exp_manager.ema.enable=true: not possible; NeMo's EMA writes whole models; leave it out"
    params = exp_manager.get("checkpoint_callback_params") or {}
    if params.get("async_save"):
        yield (
            "exp_manager.checkpoint_callback_params.async_save=true: not possible; a checkpoint holds only the adapter "
            "and is written quickly; leave it out"
        )
    if params.get("save_last_n_optim_states", -1) != -1:
        yield (
            "exp_manager.checkpoint_callback_params.save_last_n_optim_states: not possible; checkpoints keep the "
            "optimizer's state, which is the adapter's size; leave it out, or set save_top_k"
        )


def _logger_problems(exp_manager: Mapping[str, Any]) -> Iterator[str]:
    if exp_manager.get("create_mlflow_logger"):
        yield (
            "exp_manager.create_mlflow_logger=true: not possible; NeMo 2.4 names the run twice, which Lightning refuses; "
            "use create_wandb_logger, or TensorBoard, which is on"
        )


def _optimizer_problems(name: object) -> Iterator[str]:
    """Accepts only optimizers whose state has the shapes of the parameters: such a checkpoint loads on any layout."""
    if name not in (*_OPTIMIZERS, "distributed_fused_adam"):  # the last is refused by `loop_problems`
        yield (
            f"model.optim.name={name!r}: its state cannot be saved for other layouts; "
            f"choose one of {', '.join(_OPTIMIZERS)}"
        )


def _output_problems(cfg: Mapping[str, Any], inputs: list[Any], suffix: str | None = ".nemo") -> Iterator[str]:
    if cfg.get("output") is None:
        return
    output = Path(str(cfg["output"]))
    if suffix is not None and output.suffix != suffix:
        yield f"output={output}: must end in {suffix}"
    for file in inputs:
        if file is not None and output.exists() and Path(str(file)).exists() and output.samefile(str(file)):
            yield f"output={output}: is an input; name another"
    if output.is_dir():
        yield f"output={output}: is a folder; name a file in it"
    folder = output.resolve().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        yield f"output={output}: {folder} is a file, not a folder"
    elif not os.access(folder, os.W_OK):
        yield f"output={output}: {folder} is not writable"
