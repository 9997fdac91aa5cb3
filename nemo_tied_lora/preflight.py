# SPDX-License-Identifier: Apache-2.0
"""What can be checked before anything expensive starts: base, layout, adapter and data against each other.

Neither torch nor NeMo is imported.
"""

from __future__ import annotations

import json
import os
import string
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nemo_tied_lora.allocation import fitting
from nemo_tied_lora.config import ConfigError, TiedLoraConfig
from nemo_tied_lora.guards import GuardSettings
from nemo_tied_lora.layout import Architecture, Layout, check, check_ranks
from nemo_tied_lora.loops import loop_problems
from nemo_tied_lora.run_status import survival_problems

__all__ = ["adapter_section", "base_model_config", "check_finetuning", "check_generation", "check_pretraining"]

_Part = TypeVar("_Part")
_OPTIMIZERS = ("fused_adam", "adamw", "adam", "sgd", "mcore_distributed_optim")
_PRECISIONS = ("bf16", "bf16-mixed", "16", "16-mixed", "32")


def check_finetuning(cfg: Mapping[str, Any]) -> None:
    """Everything that `tied-lora finetune` needs.

    Raises:
        ConfigError: all problems together.
    """
    _require_sections(cfg, "peft", "data", "optim")
    problems = survival_problems(cfg)
    model = cfg["model"]
    scheme = model["peft"].get("peft_scheme")
    if scheme != "tied_lora":
        problems.append(
            f"model.peft.peft_scheme={scheme!r}: this command trains tied_lora; for plain LoRA: preset=lora"
        )
    problems += _unread_lora_keys(model["peft"])
    problems += loop_problems(model)
    if model.get("fsdp"):
        problems.append(
            "model.fsdp=true: not possible; FSDP would shard what all layers share; use tensor or pipeline parallel"
        )
    problems += _checkpoint_problems(cfg.get("exp_manager") or {})
    problems += _optimizer_problems(model["optim"].get("name"))
    config = _attempt(problems, adapter_section, model["peft"])
    base = _attempt(problems, base_model_config, model.get("restore_from_path"))
    start = model["peft"].get("restore_from_path")
    problems += _flag_problems("model.peft.allow_other_base", model["peft"].get("allow_other_base", False))
    if start is not None and not Path(start).is_file():
        problems.append(f"model.peft.restore_from_path={start}: no such file")
    given = [key for key, value in (model["peft"].get("tied_lora") or {}).items() if value is not None]
    if start is not None and given:
        fix = "the adapter of restore_from_path has its own; remove these keys"
        problems.append(f"model.peft.tied_lora ({', '.join(given)}): {fix}")
    problems += _layout_problems(cfg, {**(base or {}), **_layout_keys(model)} if base else None, config)
    _attempt(problems, GuardSettings.from_mapping, cfg.get("guards"))
    _attempt(problems, _precision, cfg["trainer"])
    problems += _data_problems(cfg)
    problems += fitting.folder_problems(cfg)
    problems += _allocation_problems(cfg, base, config)
    problems += _output_problems(cfg, [model.get("restore_from_path"), start])
    if problems:
        raise ConfigError(problems)


def check_pretraining(cfg: Mapping[str, Any]) -> None:
    """Everything that `tied-lora pretrain` needs.

    Raises:
        ConfigError: all problems together.
    """
    _require_sections(cfg, "peft", "data", "optim", "tokenizer")
    problems = survival_problems(cfg)
    if cfg["model"]["peft"].get("tied_lora"):
        problems.append(
            "model.peft.tied_lora: pretrain trains every parameter, without an adapter; remove preset=, peft="
        )
    tokenizer = cfg["model"]["tokenizer"].get("model")
    if tokenizer is None or not Path(tokenizer).is_file():
        problems.append(f"model.tokenizer.model={tokenizer}: no such file; name a sentencepiece model")
    problems += _layout_problems(cfg, cfg["model"], None)
    _attempt(problems, GuardSettings.from_mapping, cfg.get("guards"))
    _attempt(problems, _precision, cfg["trainer"])
    problems += _data_problems(cfg)
    problems += fitting.folder_problems(cfg)
    problems += _allocation_problems(cfg, cfg["model"], None)
    problems += _output_problems(cfg, [tokenizer])
    if problems:
        raise ConfigError(problems)


def check_generation(cfg: Mapping[str, Any]) -> None:
    """Everything that `tied-lora generate` needs.

    Raises:
        ConfigError: all problems together.
    """
    problems: list[str] = []
    base = _attempt(problems, lambda path: base_model_config(path, key="base"), cfg.get("base"))
    adapter = cfg.get("adapter")
    if adapter is not None and not Path(adapter).is_file():
        problems.append(f"adapter={adapter}: no such file; adapter=null generates with the base alone")
    if (cfg.get("prompts") is None) == (cfg.get("prompts_file") is None):
        problems.append("prompts, prompts_file: give one of them: prompts=['...'] or prompts_file=questions.jsonl")
    problems += _flag_problems("allow_other_base", cfg.get("allow_other_base", False))
    prompts, prompts_file = cfg.get("prompts"), cfg.get("prompts_file")
    if prompts is not None and not (
        isinstance(prompts, list) and prompts and all(isinstance(p, str) for p in prompts)
    ):
        problems.append(f"prompts={prompts!r}: must be a list of texts: \"prompts=['...']\"")
    if prompts_file is not None:
        problems += _jsonl_problems("prompts_file", Path(str(prompts_file)), _fields(cfg["prompt_template"]))
    for key in ("tokens_to_generate", "batch_size"):
        value = cfg.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{key}={value!r}: must be a whole number of at least 1")
    temperature = cfg.get("temperature")
    if temperature is not None and (not isinstance(temperature, (int, float)) or temperature <= 0):
        problems.append(f"temperature={temperature!r}: must be greater than 0; null picks the likeliest token")
    _attempt(problems, _precision, cfg["trainer"])
    problems += _output_problems(cfg, [cfg.get("base"), adapter, prompts_file], suffix=None)
    problems += _layout_problems(cfg, {**(base or {}), **_layout_keys(cfg["model"])} if base else None, None)
    if problems:
        raise ConfigError(problems)


def adapter_section(peft: Mapping[str, Any]) -> TiedLoraConfig:
    """`model.peft.tied_lora` as a configuration.

    Raises:
        ConfigError: all its problems together.
    """
    section = peft.get("tied_lora") or {}
    if not isinstance(section, Mapping):
        raise ConfigError([f"model.peft.tied_lora={section!r}: must be a section with keys of its own"])
    return TiedLoraConfig.from_mapping(section)


def base_model_config(path: str | os.PathLike | None, key: str = "model.restore_from_path") -> dict[str, Any]:
    """The `model_config.yaml` of a base `.nemo` (a tar, plain or gzipped, or an unpacked folder).

    Args:
        key: what the user calls the path, for messages.

    Raises:
        ConfigError: no path, no file, or no readable config in it.
    """
    if path is None:
        raise ConfigError([f"{key}: missing; name the base model's .nemo"])
    try:
        config = _read_model_config(Path(str(path)))
    except FileNotFoundError:
        raise ConfigError([f"{key}={path}: no such file"]) from None
    except (tarfile.TarError, OSError, EOFError, zlib.error, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError([f"{key}={path}: not a .nemo file: {reason}"]) from None
    if not isinstance(config, dict) or not config:
        raise ConfigError([f"{key}={path}: holds no model_config.yaml with keys; this is no .nemo model"])
    if (config.get("peft") or {}).get("peft_scheme") == "tied_lora" and "targets" in config:
        raise ConfigError([f"{key}={path}: is a Tied-LoRA adapter, not a base model"])
    return config


_MAX_CONFIG_BYTES = 4 << 20


def _read_model_config(path: Path) -> Any:
    if path.is_dir():
        return yaml.safe_load((path / "model_config.yaml").read_text())
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.removeprefix("./") == "model_config.yaml" and member.isreg():
                if member.size > _MAX_CONFIG_BYTES:
                    raise tarfile.ReadError(f"its model_config.yaml claims {member.size} bytes")
                return yaml.safe_load(tar.extractfile(member).read())  # type: ignore[union-attr]
    return None


def _require_sections(cfg: Mapping[str, Any], *names: str) -> None:
    wrong = [f"model.{n}={cfg['model'].get(n)!r}" for n in names if not isinstance(cfg["model"].get(n), Mapping)]
    if wrong:
        raise ConfigError([f"{section}: must be a section with keys of its own" for section in wrong])


def _flag_problems(key: str, value: object) -> Iterator[str]:
    if value not in (True, False):
        yield f"{key}={value!r}: must be true or false"


def _precision(trainer: Mapping[str, Any]) -> None:
    if str(trainer.get("precision")) not in _PRECISIONS:
        raise ConfigError([f"trainer.precision={trainer.get('precision')!r}: choose one of {', '.join(_PRECISIONS)}"])


def _attempt(problems: list[str], build: Callable[[Any], _Part], value: Any) -> _Part | None:
    try:
        return build(value)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


def _layout_keys(model: Mapping[str, Any]) -> dict[str, Any]:
    """What the command decides, not the base: parallel sizes and batches."""
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
    problems: list[str] = []
    layout = _attempt(problems, Layout.from_config, {"model": cfg["model"], "trainer": cfg["trainer"]})
    arch = None if model is None else _attempt(problems, Architecture.from_model_config, model)
    yield from problems
    if layout is not None:
        yield from check_ranks(layout) if arch is None else check(arch, layout, config)
        yield from fitting.slurm_problems(layout)


def _allocation_problems(
    cfg: Mapping[str, Any], base: Mapping[str, Any] | None, config: TiedLoraConfig | None
) -> Iterator[str]:
    """Data, room and time against the layout, where base and layout are sound by themselves."""
    try:
        layout = Layout.from_config({"model": cfg["model"], "trainer": cfg["trainer"]})
        arch = Architecture.from_model_config({**(base or {}), **_layout_keys(cfg["model"])})
        tuned = config is not None or cfg["model"]["peft"].get("peft_scheme") == "tied_lora"
    except ConfigError:
        return  # said elsewhere
    if layout.resolved_dp_size == 0 or check(arch, layout, config):
        return
    yield from fitting.data_problems(cfg, base or {}, layout)
    if config is not None or not tuned:
        yield from fitting.room_problems(cfg, arch, layout, config)
        yield from fitting.time_problems(cfg, arch, layout, config)


def _checkpoint_problems(exp_manager: Mapping[str, Any]) -> Iterator[str]:
    """Options of NeMo's that write checkpoints in ways of their own."""
    if (exp_manager.get("ema") or {}).get("enable"):
        yield "exp_manager.ema.enable=true: not possible; NeMo's EMA writes whole models; leave it out"
    params = exp_manager.get("checkpoint_callback_params") or {}
    if params.get("async_save"):
        yield (
            "exp_manager.checkpoint_callback_params.async_save=true: not possible; a checkpoint holds the adapter alone "
            "and is written at once; leave it out"
        )
    if params.get("save_last_n_optim_states", -1) != -1:
        yield (
            "exp_manager.checkpoint_callback_params.save_last_n_optim_states: not possible; checkpoints keep the "
            "optimizer's state, which is the adapter's size; leave it out, or set save_top_k"
        )


def _optimizer_problems(name: object) -> Iterator[str]:
    """A checkpoint loads on any layout because an optimizer's tensors lie as the parameters do."""
    if name not in (*_OPTIMIZERS, "distributed_fused_adam"):  # the last is refused elsewhere
        yield (
            f"model.optim.name={name!r}: a checkpoint could not hold its state for another layout; "
            f"choose one of {', '.join(_OPTIMIZERS)}"
        )


def _unread_lora_keys(peft: Mapping[str, Any]) -> Iterator[str]:
    """An override file made for NeMo's own LoRA must not be ignored silently."""
    section = peft.get("lora_tuning")
    if section:
        yield (
            f"model.peft.lora_tuning ({', '.join(section)}): read by peft_scheme=lora only; "
            "write model.peft.tied_lora.rank for adapter_dim, .targets for target_modules, .alpha, .dropout"
        )


def _data_problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    for name in ("train_ds", "validation_ds", "test_ds"):
        section = cfg["model"]["data"][name]
        key = f"model.data.{name}.file_names"
        files = section.get("file_names")
        if name == "test_ds" and files is None:
            continue
        if not isinstance(files, list) or not files:
            yield f"{key}={files!r}: must be a list of JSONL files"
            continue
        weights = section.get("concat_sampling_probabilities")
        if name == "train_ds" and (not isinstance(weights, list) or len(weights) != len(files)):
            yield f"model.data.train_ds.concat_sampling_probabilities={weights!r}: must hold one number for each file"
        yield from _batch_problems(name, section)
        if name != "train_ds":
            yield from _generation_problems(name, section, cfg["model"])
        for file in files:
            yield from _first_line_problems(key, Path(str(file)), _fields(section.get("prompt_template")))


def _generation_problems(name: str, section: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """NeMo 2.4 leaves sequence parallelism on while it generates, token by token; the first odd length then fails."""
    metric = (section.get("metric") or {}).get("name")
    if not model.get("sequence_parallel") or model.get("tensor_model_parallel_size", 1) == 1:
        return
    if metric != "loss":
        yield (
            f"model.data.{name}.metric.name={metric}: needs to generate, which NeMo 2.4 cannot do with "
            "model.sequence_parallel=true; set it to loss, and let tied-lora generate answer with the adapter"
        )
    if section.get("write_predictions_to_file"):
        yield (
            f"model.data.{name}.write_predictions_to_file=true: not possible with model.sequence_parallel=true, for the "
            "same reason; set it to false"
        )


def _batch_problems(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    micro, whole = section.get("micro_batch_size"), section.get("global_batch_size")
    if not all(isinstance(size, int) and size > 0 for size in (micro, whole)):
        yield f"model.data.{name}: micro_batch_size={micro!r} and global_batch_size={whole!r} must be at least 1"
    elif whole % micro:  # type: ignore[operator]
        yield f"model.data.{name}.global_batch_size={whole}: must be divisible by micro_batch_size={micro}"


def _fields(template: object) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(str(template)) if field]


def _jsonl_problems(key: str, path: Path, fields: list[str]) -> Iterator[str]:
    """Every line is looked at: the first that does not fit is named."""
    first = list(_first_line_problems(key, path, fields))
    yield from first
    if first:
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                missing = [field for field in fields if line.strip() and field not in json.loads(line)]
            except (json.JSONDecodeError, TypeError):
                missing = ["JSON object"]
            if missing:
                yield f"{key}: {path}: line {number} has no {', '.join(missing)}"
                return


def _first_line_problems(key: str, path: Path, fields: list[str]) -> Iterator[str]:
    if not path.is_file():
        yield f"{key}: {path}: no such file"
        return
    try:
        with path.open(encoding="utf-8") as lines:
            example = json.loads(next(lines, ""))
    except (json.JSONDecodeError, UnicodeDecodeError):
        yield f"{key}: {path}: the first line is not JSON; one object a line is needed"
        return
    except OSError as error:
        yield f"{key}: {path}: cannot be read: {error.strerror}"
        return
    missing = [field for field in fields if not isinstance(example, Mapping) or field not in example]
    if missing:
        yield f"{key}: {path}: the first line has no {', '.join(missing)}, which prompt_template names"


def _output_problems(cfg: Mapping[str, Any], inputs: list[Any], suffix: str | None = ".nemo") -> Iterator[str]:
    if cfg.get("output") is None:
        return
    output = Path(str(cfg["output"]))
    if suffix is not None and output.suffix != suffix:
        yield f"output={output}: must end in {suffix}"
    for file in inputs:
        if file is not None and output.exists() and Path(str(file)).exists() and output.samefile(str(file)):
            yield f"output={output}: is a file that is read; name another"
    folder = output.resolve().parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        yield f"output={output}: {folder} cannot be written to"
