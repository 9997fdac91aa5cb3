# SPDX-License-Identifier: Apache-2.0
"""Loads a base on any layout, completes prompts, and computes logits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_tied_lora.nemo.greedy_decoding import greedy_tokens
from nemo_tied_lora.nemo.launched_trainer import LaunchedTrainerBuilder
from nemo_tied_lora.nemo.model import MegatronGPTTiedLoraModel
from nemo_tied_lora.nemo.restored_base import restore_base
from nemo_tied_lora.nemo.usable_prompts import check_prompts
from nemo_tied_lora.planning.nemo_model_config import recorded_precision
from nemo_tied_lora.progress import Progress
from nemo_tied_lora.tasks.adapters import adapter_list

__all__ = ["complete", "load_base", "next_token_logits"]


_NAMED = 20
"""So many empty prompts are named at most."""


def load_base(cfg: DictConfig) -> MegatronGPTTiedLoraModel:
    """Loads the base `cfg.base` on the layout of `cfg.model` and `cfg.trainer`, for inference. All ranks call it."""
    trainer: Trainer = LaunchedTrainerBuilder(cfg).create_trainer()
    model_cfg = MegatronGPTTiedLoraModel.restore_from(cfg.base, trainer=trainer, return_config=True)
    with open_dict(model_cfg):
        for key, value in cfg.model.items():
            model_cfg[key] = value
        # NeMo reads the scheme of any model that has a `peft` section; a base may have neither.
        if OmegaConf.select(model_cfg, "peft.peft_scheme") is None:
            OmegaConf.update(model_cfg, "peft.peft_scheme", None, force_add=True)
        OmegaConf.update(model_cfg, "peft.allow_other_base", bool(cfg.get("allow_other_base")), force_add=True)
        model_cfg.precision = cfg.trainer.precision
        model_cfg.activations_checkpoint_granularity = None
        model_cfg.activations_checkpoint_method = None
        if model_cfg.get("sequence_parallel") and trainer.global_rank == 0:
            print("note: sequence_parallel=true is for training; it is switched off here", file=sys.stderr, flush=True)
        model_cfg.sequence_parallel = False
    adapters = OmegaConf.to_container(cfg).get("adapter")  # type: ignore[union-attr]
    trained_on = {recorded_precision(path) for path in adapter_list(adapters) if path is not None}
    model = restore_base(cfg.base, model_cfg, trainer, trained_on=trained_on)
    if model.quantized_base is not None and trainer.global_rank == 0:
        print(f"base, on rank 0: {model.quantized_base}", file=sys.stderr, flush=True)
    model.freeze()
    return model


def complete(
    model: MegatronGPTTiedLoraModel,
    prompts: Sequence[str],
    *,
    tokens_to_generate: int,
    batch_size: int = 64,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 0.9,
    repetition_penalty: float = 1.0,
    min_tokens_to_generate: int = 0,
) -> list[str]:
    """Completes each prompt, up to the end-of-text token. All ranks call it and get the same texts.

    A prompt without tokens is completed from the tokenizer's start token, or its end-of-text token if it has none.

    Args:
        tokens_to_generate: the largest number of tokens per prompt.
        temperature: None picks the likeliest token each time.
        repetition_penalty: above 1, tokens that have come already are less likely. Without a temperature, no effect.
        min_tokens_to_generate: the end-of-text token cannot come earlier.

    Raises:
        ConfigError: on every rank; a prompt is longer than the base's learned positions, or holds a token that has no row
            in the base's embedding.
    """
    model.eval()
    tokens = _tokenized(model, prompts)
    limits = {"most": tokens_to_generate, "least": min_tokens_to_generate}
    if temperature is None:
        return _greedy(model, tokens, batch_size, **limits)
    sampling = {
        "use_greedy": False,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "add_BOS": False,
        "all_probs": False,
        "compute_logprob": False,
        "end_strings": ["<|endoftext|>"],
    }
    return _sampled(model, tokens, batch_size, sampling, **limits)


@torch.no_grad()
def next_token_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits (tokens, vocabulary) for each prompt, float32 on the CPU of every rank. All ranks call it.

    Tensor-parallel ranks gather their parts; the last stage broadcasts to the other stages.
    """
    model.eval()
    found = []
    for prompt in prompts:
        tokens = torch.tensor([list(prompt)], device=next(model.parameters()).device)
        outputs = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter([tokens]),
            model=model.model if isinstance(model.model, list) else [model.model],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        logits = [output[0].float().cpu() for output in outputs]
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast_object_list(
            logits_of := [logits[0] if logits else None],
            src=last,
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        found.append(logits_of[0])
    return found  # type: ignore[return-value]


def _greedy(
    model: MegatronGPTTiedLoraModel, tokens: list[list[int]], batch_size: int, *, most: int, least: int
) -> list[str]:
    """The likeliest texts, by this package's engine."""
    found = greedy_tokens(model, tokens, max_new_tokens=most, min_new_tokens=least, batch_size=batch_size)
    quiet = torch.distributed.get_rank() != 0 or len(tokens) <= batch_size
    texts = [""] * len(tokens)
    for index, new in Progress(found, total=len(tokens), desc="generating", unit="prompts", disable=quiet):
        texts[index] = model.tokenizer.ids_to_text(new)
    return texts


def _sampled(
    model: MegatronGPTTiedLoraModel,
    tokens: list[list[int]],
    batch_size: int,
    sampling: dict[str, Any],
    *,
    most: int,
    least: int,
) -> list[str]:
    """Sampled texts, by NeMo."""
    completions: list[str] = []
    first = torch.distributed.get_rank() == 0
    starts = range(0, len(tokens), batch_size)
    for start in Progress(starts, desc="generating", unit="batch", disable=not first or len(starts) == 1):
        batch = tokens[start : start + batch_size]
        with torch.no_grad():
            answer = model.generate(
                inputs=_padded(batch, most, model.tokenizer.eos_id),
                length_params={"max_length": most, "min_length": least},
                sampling_params=sampling,
            )
        completions += _completions(model, batch, answer, most) if first else []
    shared = [completions]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def _tokenized(model: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The token ids of each prompt, at least one. Rank 0 names the prompts that have none."""
    tokenizer = model.tokenizer
    bos = getattr(tokenizer, "bos_id", None)
    start = tokenizer.eos_id if bos is None or bos < 0 else bos
    tokens = [tokenizer.text_to_ids(prompt) for prompt in prompts]
    empty = [number for number, ids in enumerate(tokens, 1) if not ids]
    tokens = [ids or [start] for ids in tokens]
    check_prompts(model, tokens)
    if empty and torch.distributed.get_rank() == 0:
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        named = ", ".join(map(str, empty[:_NAMED])) + more
        print(f"prompts without tokens, answered from the start token: {named}", file=sys.stderr, flush=True)
    return tokens


def _padded(
    batch: Sequence[Sequence[int]], tokens_to_generate: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """NeMo's form of a batch: tokens (prompts, longest prompt + tokens_to_generate), and the prompts' lengths."""
    width = max(map(len, batch)) + tokens_to_generate
    tokens = torch.tensor([[*ids, *[padding] * (width - len(ids))] for ids in batch])
    return tokens.cuda(), torch.tensor([len(ids) for ids in batch]).cuda()


def _completions(model: Any, prompts: Sequence[Sequence[int]], answer: Any, tokens_to_generate: int) -> list[str]:
    """The new texts. NeMo generates the same width for a whole batch, so a shorter prompt has got more tokens."""
    tokenizer = model.tokenizer
    texts = []
    for prompt, token_ids in zip(prompts, answer["token_ids"], strict=True):
        new = list(token_ids)[len(prompt) :][:tokens_to_generate]
        if tokenizer.eos_id in new:
            new = new[: new.index(tokenizer.eos_id)]
        texts.append(tokenizer.ids_to_text([int(token) for token in new]))
    return texts


def _forward(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device).unsqueeze(0)
    mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)[None, None]

    def collect(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return gather_from_tensor_model_parallel_region(output)

    return model(tokens, positions, mask), collect
