# SPDX-License-Identifier: Apache-2.0
"""`tied-lora plan`: what an adapter costs on a model and a layout, and whether the layout works, before any model is
built. Neither torch nor NeMo is imported."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_tied_lora.commands.config_folder import config_folder
from nemo_tied_lora.config import ConfigError, TiedLoraConfig
from nemo_tied_lora.layout import Architecture, Layout, check
from nemo_tied_lora.planning import Precision, plan

__all__ = ["SUMMARY", "main"]

SUMMARY = "print parameters, memory, file size and network traffic of an adapter; refuse layouts that cannot work"

_FORMATS = ("table", "json")
_ADAPTER_KEYS = "model.peft.tied_lora."

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

_EXAMPLES = """examples:
  tied-lora plan model=llama2_7b model.peft.tied_lora.rank=8 "model.peft.tied_lora.targets=[linear_qkv]"
  tied-lora plan model=llama2_70b layout=tp8pp4 model.sequence_parallel=true
  tied-lora plan model=llama2_13b layout=tp8pp4 trainer.num_nodes=8 model.peft.tied_lora.preset=tl5 format=json
  tied-lora plan --config-dir my_configs model=my_model      (my_configs/model/my_model.yaml, NeMo's keys)

"""


def main(argv: list[str]) -> int:
    """Prints the plan on stdout and returns 0, or prints every problem on stderr and returns 2."""
    options = _parser().parse_intermixed_args(argv)
    try:
        cfg = _compose(options.overrides, options.config_dir)
        if options.cfg:
            print(OmegaConf.to_yaml(cfg, resolve=options.resolve), end="")
            return 0
        values = _plain(cfg)
        result = _plan(values)
    except ConfigError as error:
        print("tied-lora plan: not possible:\n" + "\n".join(f"  {p}" for p in error.problems), file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if values["format"] == "json" else _tables(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    folder = config_folder()
    groups = [
        f"  {group}=  {', '.join(sorted(path.stem for path in (folder / group).glob('*.yaml')))}"
        for group in ("model", "layout")
    ]
    parser = argparse.ArgumentParser(
        prog="tied-lora plan",
        description=f"{SUMMARY[0].upper()}{SUMMARY[1:]}. No model is built and no GPU is needed.",
        epilog=_EXAMPLES + "groups:\n" + "\n".join(groups) + "\n\n--cfg job shows every key and its value.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides; format is table or json")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder of your own YAMLs, searched as well")
    parser.add_argument("--cfg", "-c", choices=["job"], help="print the composed config and stop")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: resolve interpolations")
    return parser


def _compose(arguments: Sequence[str], config_dir: str | None) -> DictConfig:
    """plan.yaml with the overrides.

    Raises:
        ConfigError: every override that cannot be read or does not fit, together.
    """
    overrides, problems = _parsed(arguments)
    search = []
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError([*problems, f"--config-dir={config_dir}: no such folder; name one that holds YAMLs"])
        search = [f"hydra.searchpath=[{json.dumps(f'file://{folder}')}]"]
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        try:
            cfg = compose("plan", [*search, *overrides])
        except (HydraException, OmegaConfBaseException) as error:
            alone = [problem for o in overrides for problem in _problem_alone(o, search)]
            raise ConfigError([*problems, *(alone or [_first_line(error)])]) from None
    if problems:
        raise ConfigError(problems)
    return cfg


def _parsed(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides for Hydra, problems). Unknown keys of tied_lora are let through: TiedLoraConfig knows what to say."""
    overrides, problems = [], []
    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            problems.append(f"{argument!r}: not an override; write key=value ({_first_line(error)})")
            continue
        if parsed.is_sweep_override():
            problems.append(f"{argument!r}: a sweep; give one value, and run the command once for each")
        elif parsed.key_or_group.startswith(_ADAPTER_KEYS) and not parsed.is_delete():
            overrides.append(f"++{argument.lstrip('+')}")
        else:
            overrides.append(argument)
    return overrides, problems


def _problem_alone(override: str, search: Sequence[str]) -> Iterator[str]:
    """What is wrong with one override, where it is wrong by itself."""
    try:
        compose("plan", [*search, override])
    except (HydraException, OmegaConfBaseException) as error:
        key = override.split("=")[0].lstrip("+~")
        if "not in struct" in str(error.__cause__):
            close = difflib.get_close_matches(key, _known_keys(compose("plan", list(search))), n=1)
            hint = f"did you mean {close[0]}?" if close else f"+{override} adds a key of your own"
            yield f"{override}: the configuration has no key {key}; {hint}"
        elif isinstance(error, MissingConfigException) and error.options:
            yield f"{override}: unknown; choose one of {', '.join(error.options)}"
        else:
            yield f"{override}: {_first_line(error)}"


def _known_keys(cfg: Mapping[Any, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in cfg.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += _known_keys(value, f"{prefix}{key}.")
    return keys


def _first_line(error: Exception) -> str:
    return next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values.

    Raises:
        ConfigError: an interpolation or a value that must be given (???) is open.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([_first_line(error)]) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


_Part = TypeVar("_Part")


def _plan(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's numbers.

    Raises:
        ConfigError: everything wrong with the format, adapter, model, layout and precision, and with their fit.
    """
    problems: list[str] = []

    def attempt(build: Callable[[Any], _Part], section: Any) -> _Part | None:
        try:
            return build(section)
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    if cfg.get("format") not in _FORMATS:
        problems.append(f"format={cfg.get('format')!r}: unknown; choose one of {', '.join(_FORMATS)}")
    model, trainer = (attempt(_section(name), cfg) or {} for name in ("model", "trainer"))
    config = attempt(_adapter_config, model)
    arch = attempt(Architecture.from_model_config, model)
    layout = attempt(Layout.from_config, {"model": model, "trainer": trainer})
    precision = attempt(_precision, {"model": model, "trainer": trainer})
    if arch is not None and layout is not None:
        problems += check(arch, layout, config)
    if problems or arch is None or layout is None or config is None or precision is None:
        raise ConfigError(problems)
    return plan(arch, layout, config, precision)


def _section(path: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Reads a part that must be a mapping, or null for an empty one."""

    def read(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
        section = cfg.get(path.rpartition(".")[2]) or {}
        if not isinstance(section, Mapping):
            raise ConfigError([f"{path}={section!r}: must be a section with keys of its own"])
        return section

    return read


def _adapter_config(model: Mapping[str, Any]) -> TiedLoraConfig:
    peft = _section("model.peft")(model)
    scheme = peft.get("peft_scheme")
    wrong = [] if scheme == "tied_lora" else [f"model.peft.peft_scheme={scheme!r}: only tied_lora can be planned"]
    try:
        config = TiedLoraConfig.from_mapping(_section("model.peft.tied_lora")(peft))
    except ConfigError as error:
        raise ConfigError([*wrong, *error.problems]) from None
    if wrong:
        raise ConfigError(wrong)
    return config


def _precision(cfg: Mapping[str, Any]) -> Precision:
    return Precision.from_names(cfg["trainer"].get("precision", 32), bool(cfg["model"].get("megatron_amp_O2")))


def _tables(result: Mapping[str, Any]) -> str:
    """The result as text: what is planned, the numbers beside LoRA's, and what they assume."""
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
    rows = [("", "this adapter", f"LoRA rank {adapter['rank']}", "share of LoRA"), *_rows(result)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([model, ranks, trained, "", *lines, "", *(f"- {line}" for line in result["assumptions"])])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The label to the left, the numbers to the right."""
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Label, this adapter's number, LoRA's, the share."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
