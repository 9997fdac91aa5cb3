# SPDX-License-Identifier: Apache-2.0
"""Translates the keys of NeMo's scripts `megatron_gpt_generate` and `megatron_gpt_eval` to those of `tied-lora generate`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_tied_lora.planning.composing.dotted_keys import remove_key, value_of
from nemo_tied_lora.planning.composing.nemo_keys import under_model

__all__ = ["is_generation_key", "mistaken_generation_key", "translate_generation"]

_TEST = "model.data.test_ds"
# NeMo's key -> this command's. The first that is given counts.
_SAME = {
    "model.restore_from_path": "base",
    "gpt_model_file": "base",
    "model.peft.restore_from_path": "adapter",
    f"{_TEST}.tokens_to_generate": "tokens_to_generate",
    "inference.tokens_to_generate": "tokens_to_generate",
    f"{_TEST}.global_batch_size": "batch_size",
    "inference.top_k": "top_k",
    "inference.top_p": "top_p",
    "inference.repetition_penalty": "repetition_penalty",
    "inference.min_tokens_to_generate": "min_tokens_to_generate",
    "sentences": "prompts",
    "prompts_jsonl": "prompts_file",
    "tensor_model_parallel_size": "model.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "model.pipeline_model_parallel_size",
    "megatron_amp_O2": "model.megatron_amp_O2",
}
# Top-level sections and keys of NeMo's two files, and of its fine-tuning file, that are not in this command's.
_FOREIGN = (
    "name",
    "exp_manager",
    "inference",
    "cluster_type",
    "gpt_model_file",
    "sentences",
    "prompts_jsonl",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "pipeline_model_parallel_split_rank",
    "megatron_amp_O2",
    "checkpoint_dir",
    "checkpoint_name",
    "hparams_file",
    "server",
    "port",
    "web_server",
    "web_port",
    "share",
    "username",
    "password",
    "chat",
    "chatbot_config",
)
# Keys of `model` and `trainer` that are about training.
_TRAINING = (
    "model.activations_checkpoint_granularity",
    "model.activations_checkpoint_layers_per_pipeline",
    "model.activations_checkpoint_method",
    "model.activations_checkpoint_num_layers",
    "model.answer_only_loss",
    "model.attention_dropout",
    "model.data",
    "model.ffn_dropout",
    "model.fsdp",
    "model.fsdp_grad_reduce_dtype",
    "model.fsdp_sharded_checkpoint",
    "model.fsdp_sharding_strategy",
    "model.fsdp_use_orig_params",
    "model.global_batch_size",
    "model.hidden_dropout",
    "model.micro_batch_size",
    "model.optim",
    "model.peft",
    "model.restore_from_path",
    "model.resume_from_checkpoint",
    "model.save_nemo_on_validation_end",
    "model.seed",
    "model.sync_batch_comm",
    "trainer.gradient_clip_val",
    "trainer.limit_test_batches",
    "trainer.limit_val_batches",
    "trainer.log_every_n_steps",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.num_sanity_val_steps",
    "trainer.val_check_interval",
)

# Key -> (the value that asks for nothing, what to write instead).
_REFUSED: dict[str, tuple[object, str]] = {
    "server": (False, "there is no server; give prompts=['...'] or prompts_file="),
    "web_server": (False, "there is no server; give prompts=['...'] or prompts_file="),
    "chat": (False, "prompts are completed as they are; write the chat's tokens into prompts or prompt_template"),
    "checkpoint_dir": (None, "convert the checkpoint to a .nemo, and name it as base="),
    "checkpoint_name": (None, "convert the checkpoint to a .nemo, and name it as base="),
    "hparams_file": (None, "name the base's .nemo as base="),
    "inference.all_probs": (False, "only texts are written; leave it out"),
    "inference.compute_logprob": (False, "only texts are written; leave it out"),
    "inference.end_strings": (["<|endoftext|>"], "an answer ends at the end-of-text token; leave it out"),
    f"{_TEST}.add_bos": (False, "prompts are completed as they are; leave it out"),
    "model.peft.restore_from_ckpt.checkpoint_dir": (
        None,
        "tied-lora convert-checkpoint checkpoint=FOLDER output=adapter.nemo makes an adapter for adapter=",
    ),
    "model.peft.restore_from_ckpt.checkpoint_name": (
        None,
        "tied-lora convert-checkpoint checkpoint=FOLDER output=adapter.nemo makes an adapter for adapter=",
    ),
}
_ADD_BOS = "inference.add_BOS"
_INFERENCE = """add_BOS all_probs compute_attention_mask compute_logprob end_strings greedy min_tokens_to_generate outfile_path
repetition_penalty temperature tokens_to_generate top_k top_p"""


def is_generation_key(key: str) -> bool:
    """Whether only NeMo's scripts read a key. It is taken, and removed again."""
    return any(key == first or key.startswith(f"{first}.") for first in (*_FOREIGN, *_TRAINING))


def mistaken_generation_key(key: str) -> str | None:
    """Returns what to write instead of a key that people take for another, else None."""
    return _MISTAKEN.get(key) or under_model(key)


_MISTAKEN = {
    **dict.fromkeys(("max_length", "max_new_tokens", "max_tokens", "num_tokens_to_generate"), "tokens_to_generate"),
    **dict.fromkeys(("inference.max_length", "inference.max_new_tokens"), "tokens_to_generate"),
    **dict.fromkeys(("greedy", "do_sample"), "temperature=null for greedy, temperature=1.0 for sampling"),
    **dict.fromkeys(("model_file", "restore_from_path", "nemo_model"), "base"),
    **dict.fromkeys(("peft_restore_from_path", "lora_checkpoint_path", "adapter_path"), "adapter"),
    **dict.fromkeys(("outfile_path", "output_file", "out"), "output"),
}


def translate_generation(
    cfg: DictConfig, typed: Mapping[str, Any], in_file: Mapping[str, Any], notes: list[str]
) -> Iterator[str]:
    """Moves the values of NeMo's keys to this command's, removes NeMo's keys, and yields problems.

    Args:
        cfg: composed, with NeMo's keys in it; changed in place.
        typed: the keys of the command line. They win over those of the file.
        in_file: the keys of the user's own YAML.
        notes: gets one line with what was translated, and one with typed keys that have no effect.
    """
    given = {**in_file, **typed}
    if not any(is_generation_key(key) for key in given):
        return
    yield from _refused(cfg, typed, given, notes)
    found = [one for translate in (_renamed, _prompts, _sampling, _output) for one in translate(cfg, typed, given)]
    yield from _contradictions(cfg, found, typed, given)
    taken: dict[str, Any] = {}
    for source, key, value in found:
        if key not in given or (source in typed and key not in typed):
            taken.setdefault(key, value)
    _typed_prompts_win(taken, typed, cfg)
    for key, value in taken.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    if taken:
        notes.append(f"from NeMo's keys: {', '.join(f'{key}={_shown(value)}' for key, value in taken.items())}")
    used = {f"{_TEST}.label_key", *_REFUSED, *(source for source, _, _ in found)}
    idle = [key for key in typed if is_generation_key(key) and key not in used]
    if idle:
        notes.append(f"no effect in generate: {', '.join(idle)}")
    for key in (*_FOREIGN, *_TRAINING):
        remove_key(cfg, key)


def _contradictions(
    cfg: DictConfig, found: Sequence[tuple[str, str, Any]], typed: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[str]:
    """Yields keys of NeMo and of this command that say different things in the same place, typed or in the file."""
    refused = set()
    for source, key, value in found:
        same_place = (source in typed) == (key in typed)
        if key in given and given[key] != value and same_place and key not in refused:
            refused.add(key)
            shown = _shown(_resolved(cfg, source))
            yield f"{source}={shown}: {key}={_shown(given[key])} says something else; give one of them"


def _refused(cfg: DictConfig, typed: Mapping[str, Any], given: Mapping[str, Any], notes: list[str]) -> Iterator[str]:
    """Yields what asks for something that this command does not do, and unknown or wrong keys of `inference`."""
    for key, (nothing, remedy) in _REFUSED.items():
        value = _resolved(cfg, key)
        if key in given and value not in (nothing, None):
            yield f"{key}={_shown(value)}: not possible; {remedy}"
    if _resolved(cfg, _ADD_BOS) and _ADD_BOS in given:
        if _ADD_BOS in typed:
            yield f"{_ADD_BOS}=true: not possible; prompts are completed as they are; leave it out"
        else:
            notes.append(f"{_ADD_BOS}=true: has no effect here: prompts are completed as they are")
    greedy = _resolved(cfg, "inference.greedy")
    if greedy not in (None, True, False):
        yield f"inference.greedy={greedy}: must be true or false"
    for section in ("inference", "model.data", _TEST):
        if section in given and given[section] is not None and not isinstance(given[section], Mapping):
            yield f"{section}={_shown(given[section])}: must be a section of keys"
    yield from _wrong_prompts(cfg, given)
    for key in given:
        section, _, name = key.rpartition(".")
        if section == "inference" and name not in _INFERENCE.split():
            close = difflib.get_close_matches(name, _INFERENCE.split(), n=1)
            hint = f"did you mean inference.{close[0]}?" if close else f"its keys are {', '.join(_INFERENCE.split())}"
            yield f"{key}={_shown(given[key])}: NeMo does not read it; {hint}"


def _typed_prompts_win(taken: dict[str, Any], typed: Mapping[str, Any], cfg: DictConfig) -> None:
    """Leaves out the prompts of the file if others are typed, as texts or as a file."""
    texts = {"prompts", "sentences"} & set(typed)
    files = {"prompts_file", "prompts_jsonl", f"{_TEST}.file_names"} & set(typed)
    if texts and not files:
        taken["prompts_file"] = None
    elif files and not texts:
        taken["prompts"] = None
    for key in ("prompts", "prompts_file"):
        if key in taken and taken[key] is None and _resolved(cfg, key) is None:
            del taken[key]


def _wrong_prompts(cfg: DictConfig, given: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with NeMo's data of prompts: several files, or an answer that is not at the template's end."""
    names = _files(cfg, given)
    if names is not None and len(names) != 1:
        once = "must be a list of one file here; generate once for each, with prompts_file= and output="
        yield f"{_TEST}.file_names={_shown(names)}: {once}"
    template = _resolved(cfg, _TEMPLATE)
    if _TEMPLATE in given and isinstance(template, str) and _before_answer(cfg, template) is None:
        fix = "must end in the answer's field, which generate leaves open; write prompt_template='{input}'"
        yield f"{_TEMPLATE}={template}: {fix}"


def _files(cfg: DictConfig, given: Mapping[str, Any]) -> list[Any] | None:
    """NeMo's files of prompts. None: not given."""
    names = _resolved(cfg, f"{_TEST}.file_names") if f"{_TEST}.file_names" in given else None
    return names if names is None or isinstance(names, list) else [names]


def _before_answer(cfg: DictConfig, template: str) -> str | None:
    """The template up to the answer's field. None: something follows that field."""
    before, _, after = template.partition(f"{{{_resolved(cfg, f'{_TEST}.label_key') or 'output'}}}")
    return None if after.strip() else before.rstrip(" ")


_TEMPLATE = f"{_TEST}.prompt_template"

_Found = Iterator[tuple[str, str, Any]]


def _renamed(cfg: DictConfig, typed: Mapping[str, Any], given: Mapping[str, Any]) -> _Found:
    """(NeMo's key, this command's key, value) of keys that only have another name."""
    for source, key in sorted(_SAME.items(), key=lambda pair: pair[0] not in typed):
        value = _resolved(cfg, source)
        if source in given and value is not None and not (key.endswith("parallel_size") and value == -1):
            yield source, key, value


def _prompts(cfg: DictConfig, typed: Mapping[str, Any], given: Mapping[str, Any]) -> _Found:
    names, template = _files(cfg, given), _resolved(cfg, _TEMPLATE)
    if names:
        yield f"{_TEST}.file_names", "prompts_file", names[0]
    if _TEMPLATE in given and isinstance(template, str):
        yield _TEMPLATE, "prompt_template", _before_answer(cfg, template)
    elif names:
        yield _TEMPLATE, "prompt_template", "{input}"


def _sampling(cfg: DictConfig, typed: Mapping[str, Any], given: Mapping[str, Any]) -> _Found:
    """NeMo samples if `greedy` is false, and reads `temperature` then; here a temperature means sampling."""
    greedy, temperature = _resolved(cfg, "inference.greedy"), _resolved(cfg, "inference.temperature")
    if "inference.greedy" in given or "inference.temperature" in given:
        yield (
            "inference.greedy",
            "temperature",
            (1.0 if temperature is None else temperature) if greedy is False else None,
        )
        if greedy is False:
            yield "inference.temperature", "temperature", 1.0 if temperature is None else temperature


def _output(cfg: DictConfig, typed: Mapping[str, Any], given: Mapping[str, Any]) -> _Found:
    prefix, outfile = f"{_TEST}.output_file_path_prefix", "inference.outfile_path"
    if _resolved(cfg, f"{_TEST}.write_predictions_to_file") and _resolved(cfg, prefix):
        yield f"{_TEST}.write_predictions_to_file", "output", f"{_resolved(cfg, prefix)}.jsonl"
        yield prefix, "output", f"{_resolved(cfg, prefix)}.jsonl"
    elif typed.get(outfile):
        yield outfile, "output", typed[outfile]


def _resolved(cfg: DictConfig, key: str) -> Any:
    value = value_of(cfg, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
