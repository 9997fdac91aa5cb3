# SPDX-License-Identifier: Apache-2.0
"""What Bridge would train wrongly, or could not train, found before the model is built. Imports no Bridge.

Each function yields one line per problem. Keys are named as on the command line of a script of Bridge's.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from nemo_tied_lora.adapter.layer_numbers import LayerNumbers
from nemo_tied_lora.bridge.resume_check import field_problems, notices, resumed_run
from nemo_tied_lora.errors import Problems

__all__ = ["build_problems", "pipeline_problems", "run_problems"]


def run_problems(cfg: Any, peft: Any) -> Problems:
    """Checks a run of Bridge's own loop. Sets the method's fields to those of its `restore_from_path`, if it has one.

    Args:
        cfg: a `ConfigContainer` that Bridge has validated.
        peft: its `TiedLoRA`.
    """
    own = Problems()
    own.attempt(peft.read_file)
    config = own.attempt(peft.config)
    model = getattr(cfg.model, "transformer", cfg.model)
    if config is not None:
        own += _numbers(cfg.model, model).outside(config.layers or ())
    problems = Problems(f"peft.{line}" for line in own)
    problems += pipeline_problems(model)
    problems += _sharding_problems(cfg.ddp, cfg.dist.use_megatron_fsdp, cfg.dist.use_torch_fsdp2)
    resumed = resumed_run(cfg.checkpoint)
    if resumed is not None and not problems:
        problems += field_problems(peft.config(), resumed, cfg.checkpoint.load)
        notices(peft.restore_from_path, resumed, cfg.checkpoint)
    return problems


def build_problems(provider: Any, kind: type, arguments: dict[str, Any]) -> Iterator[str]:
    """Checks a call of `provider.provide_distributed_model`. Yields nothing if no hook is of this kind.

    Args:
        kind: `TiedLoRA`. A function that calls one is not recognised.
        arguments: by name.
    """
    passed, registered = arguments.get("pre_wrap_hook"), getattr(provider, "_pre_wrap_hooks", [])
    passed = passed if isinstance(passed, list) else [] if passed is None else [passed]
    if not any(isinstance(hook, kind) for hook in passed or registered):
        return
    lost = [hook for hook in registered if hook not in passed]
    if passed and lost:
        yield (
            f"pre_wrap_hook: it replaces the hooks that are registered ({len(lost)}), so the base is not loaded and its "
            "weights stay random; write provider.register_pre_wrap_hook(peft), and leave pre_wrap_hook out"
        )
    yield from pipeline_problems(provider)
    sharded = (arguments.get(name, False) for name in ("use_megatron_fsdp", "use_torch_fsdp2"))
    yield from _sharding_problems(arguments.get("ddp_config"), *sharded)


def pipeline_problems(config: Any) -> Iterator[str]:
    """Yields one line for an interleaved pipeline of two stages that confuses its two transfers.

    Source: docs/library.md, "What both loops share".

    Args:
        config: Megatron's configuration of the model, or Bridge's provider.
    """
    chunks = getattr(config, "virtual_pipeline_model_parallel_size", None) or 1
    if chunks > 1 and config.pipeline_model_parallel_size == 2 and not config.overlap_p2p_comm:
        yield (
            f"model.virtual_pipeline_model_parallel_size={chunks}: on two stages Megatron's schedule confuses the transfers "
            "to the next and to the previous stage, which are the same rank, and the gradients are wrong; set "
            "model.overlap_p2p_comm=true model.batch_p2p_comm=false"
        )


def _sharding_problems(ddp: Any, megatron: bool, torch: bool) -> Iterator[str]:
    own = getattr(ddp, "use_megatron_fsdp", False)  # Bridge then sets dist.use_megatron_fsdp too
    asked = {
        "ddp.use_megatron_fsdp": own,
        "dist.use_megatron_fsdp": megatron and not own,
        "dist.use_torch_fsdp2": torch,
    }
    for key, value in asked.items():
        if value:
            yield (
                f"{key}=true: not possible; FSDP would shard what all layers share; use tensor or pipeline parallelism, and "
                "Megatron's distributed optimizer"
            )


def _numbers(provider: Any, model: Any) -> LayerNumbers:
    pattern = getattr(provider, "hybrid_layer_pattern", None) or getattr(model, "hybrid_layer_pattern", None)
    return LayerNumbers.of(SimpleNamespace(hybrid_layer_pattern=pattern, config=model))
