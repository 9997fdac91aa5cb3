# SPDX-License-Identifier: Apache-2.0
"""The keys of NeMo 2.4's fine-tuning configuration: which exist, which have no effect here and why, which are often mistaken.

Sources: NeMo's `megatron_gpt_finetuning_config.yaml` and `megatron_gpt_config.yaml`, `ExpManagerConfig`, and the
arguments of Lightning's `Trainer`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable

__all__ = [
    "ADAPTER",
    "FIXED",
    "is_nemo_key",
    "mistaken_key",
    "nearest",
    "no_effect",
    "other_scheme",
    "under_model",
    "unknown_to_nemo",
]

ADAPTER = "model.peft.tied_lora"
"""The adapter's section."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_TRAINER = _words("""
accelerator accumulate_grad_batches barebones benchmark check_val_every_n_epoch default_root_dir detect_anomaly
deterministic devices enable_autolog_hparams enable_checkpointing enable_model_summary enable_progress_bar fast_dev_run
gradient_clip_algorithm gradient_clip_val inference_mode limit_predict_batches limit_test_batches limit_train_batches
limit_val_batches log_every_n_steps logger max_epochs max_steps max_time min_epochs min_steps model_registry num_nodes
num_sanity_val_steps overfit_batches precision profiler reload_dataloaders_every_n_epochs sync_batchnorm
use_distributed_sampler val_check_interval
""")
# Lightning's, but NeMo passes its own.
_NEMO_CHOOSES = ("strategy", "plugins", "callbacks")

_EXP_MANAGER = _words("""
checkpoint_callback_params clearml_logger_kwargs create_checkpoint_callback create_clearml_logger create_dllogger_logger
create_early_stopping_callback create_fault_tolerance_callback create_mlflow_logger create_neptune_logger
create_preemption_callback create_straggler_detection_callback create_tensorboard_logger create_wandb_logger
disable_validation_on_resume dllogger_logger_kwargs early_stopping_callback_params ema exp_dir explicit_log_dir
fault_tolerance files_to_copy log_delta_step_timing log_global_rank_0_only log_local_rank_0_only log_step_timing
log_tflops_per_sec_per_gpu max_time_per_run mlflow_logger_kwargs name neptune_logger_kwargs resume_from_checkpoint
resume_if_exists resume_ignore_no_checkpoint resume_past_end seconds_to_sleep step_timing_kwargs
straggler_detection_params summary_writer_kwargs use_datetime_version version wandb_logger_kwargs
""")
_CHECKPOINT = _words("""
always_save_nemo async_save auto_insert_metric_name dirpath every_n_epochs every_n_train_steps filename filepath mode
model_parallel_size monitor postfix prefix save_best_model save_last save_last_n_optim_states save_nemo_on_train_end
save_on_train_epoch_end save_top_k save_weights_only train_time_interval verbose
""")
_EARLY_STOPPING = _words("""
check_finite check_on_train_epoch_end divergence_threshold log_rank_zero_only min_delta mode monitor patience
stopping_threshold strict verbose
""")

_MODEL = _words("""
account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split activation activations_checkpoint_granularity
activations_checkpoint_layers_per_pipeline activations_checkpoint_method activations_checkpoint_num_layers
answer_only_loss apex_transformer_log_level apply_embedding_scaling apply_query_key_layer_scaling apply_rope_fusion
async_grad_allreduce attention_backend attention_dropout attention_type batch_p2p_comm bias bias_activation_fusion
bias_dropout_add_fusion context_parallel_size cpu_offloading cpu_offloading_activations cpu_offloading_num_layers
cpu_offloading_weights data defer_embedding_wgrad_compute dist_ckpt_assume_constant_structure dist_ckpt_format
dist_ckpt_load_on_device dist_ckpt_load_strictness dist_ckpt_parallel_dist_opt dist_ckpt_parallel_load
dist_ckpt_parallel_save dist_ckpt_parallel_save_within_dp dist_ckpt_torch_dist_multiproc do_layer_norm_weight_decay
drop_layers enable_cuda_graph enable_megatron_timers encoder_seq_length expert_model_parallel_size ffn_dropout
ffn_hidden_size fp16_lm_cross_entropy fp32_residual_connection fp8 fp8_amax_compute_algo fp8_amax_history_len fp8_e4m3
fp8_hybrid fp8_interval fp8_margin fp8_params fsdp gc_interval get_attention_mask_from_fusion global_batch_size
grad_allreduce_chunk_size_mb grad_div_ar_fusion gradient_accumulation_fusion gradient_as_bucket_view headscale
hidden_dropout hidden_size hysteresis init_method_std kv_channels layernorm_epsilon log_token_counts
make_vocab_size_divisible_by masked_softmax_fusion max_position_embeddings mcore_customization_config mcore_gpt
megatron_amp_O2 megatron_timer_kwargs micro_batch_size name native_amp_growth_interval native_amp_init_scale
nccl_communicator_config_path normalization normalize_attention_scores nsys_profile num_attention_heads num_layers
num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
num_micro_batches_with_partial_activation_checkpoints num_query_groups onnx_safe openai_gelu optim overlap_p2p_comm
override_vocab_size peft persist_layer_norm pipeline_model_parallel_comm_backend pipeline_model_parallel_size
pipeline_model_parallel_split_rank position_embedding_type post_process pre_process precision qkv_bias rampup_batch_size
reduce_amax reset_lr reset_lr_steps restore_from_path resume_from_checkpoint rotary_base rotary_interleaved
rotary_percentage save_nemo_on_validation_end scale_positional_embedding seed seq_len_interpolation_factor
sequence_parallel share_embeddings_and_output_weights sharp skip_train sync_batch_comm tensor_model_parallel_size
tokenizer tp_comm_overlap_ag tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_only_amax_red transformer_block_type
transformer_engine ub_tp_comm_bootstrap_backend ub_tp_comm_overlap ub_tp_comm_overlap_cfg use_cpu_initialization use_emha
use_flash_attention use_loss_mask use_scaled_init_method use_te_rng_tracker use_tp_pp_dp_mapping
validation_param_sync_overlap virtual_pipeline_model_parallel_size with_fp32_embedding_grads
""")
_DATA = ("chat", "chat_prompt_tokens", "data_impl", "validation_drop_last", "train_ds", "validation_ds", "test_ds")
_DATASET = _words("""
add_bos add_eos add_sep ceil_to_power_2 concat_sampling_probabilities drop_last file_names
get_attention_mask_from_fusion global_batch_size global_sample_mapping hf_dataset index_mapping_dir label_key
max_seq_length memmap_workers metric micro_batch_size min_seq_length names num_workers output_file_path_prefix
output_original_text packed_sequence packed_sequence_return_cu_seqlen pad_to_max_length pin_memory prompt_template seed
shuffle tokens_to_generate truncation_field truncation_method virtual_tokens write_predictions_to_file
""")
_OPTIM = _words("""
adam_w_mode amsgrad betas bias_correction bucket_cap_mb capturable contiguous_grad_buffer contiguous_param_buffer eps
grad_sync_dtype lr master_weights momentum name overlap_grad_sync overlap_param_gather_with_optimizer_step
overlap_param_sync sched set_grad_none store_param_remainders weight_decay
""")
_SCHED = _words("""
constant_ratio constant_steps cycle hold_ratio hold_steps iters_per_batch last_epoch max_epochs max_steps min_lr monitor
name power reduce_on_plateau warmup_ratio warmup_steps
""")

# Section -> its keys. * stands for one name.
_SECTIONS: dict[str, Collection[str]] = {
    "trainer": _TRAINER,
    "exp_manager": _EXP_MANAGER,
    "exp_manager.checkpoint_callback_params": _CHECKPOINT,
    "exp_manager.early_stopping_callback_params": _EARLY_STOPPING,
    "model": _MODEL,
    "model.data": _DATA,
    "model.data.train_ds": _DATASET,
    "model.data.validation_ds": _DATASET,
    "model.data.test_ds": _DATASET,
    "model.data.*_ds.metric": ("average", "class_labels", "label_key", "labels_are_strings", "name", "num_classes"),
    "model.optim": _OPTIM,
    "model.optim.sched": _SCHED,
    "model.peft": ("peft_scheme", "restore_from_path", "lora_tuning"),
}
# Whatever is in these sections is NeMo's, Megatron's or a logger's.
_OPEN_SECTIONS = (
    "exp_manager.*_kwargs",
    "exp_manager.summary_writer_kwargs",
    "exp_manager.ema",
    "exp_manager.fault_tolerance",
    "exp_manager.straggler_detection_params",
    "model.data.chat_prompt_tokens",
    "model.mcore_customization_config",
    "model.megatron_timer_kwargs",
    "model.nsys_profile",
    "model.optim.lr_multipliers",  # this project's; `factor_rates` judges its keys
    "model.tokenizer",
    "model.ub_tp_comm_overlap_cfg",
    "model.peft.lora_tuning",
)
# An unknown key here is an error of Lightning or of exp_manager when the ranks start.
_CLOSED_SECTIONS = (
    "trainer",
    "exp_manager",
    "exp_manager.checkpoint_callback_params",
    "exp_manager.early_stopping_callback_params",
)

# Key -> (NeMo's default, why it has no effect).
_FSDP = "it belongs to model.fsdp, and FSDP would shard what all layers share"
_NO_EFFECT: dict[str, tuple[object, str]] = {
    "model.fsdp_sharding_strategy": ("full", _FSDP),
    "model.fsdp_grad_reduce_dtype": ("fp32", _FSDP),
    "model.fsdp_sharded_checkpoint": (False, _FSDP),
    "model.fsdp_use_orig_params": (False, _FSDP),
    "model.fsdp_limit_all_gathers": (True, _FSDP),
    "model.fsdp_cpu_offload": (False, _FSDP),
    "cluster_type": (None, "ranks find each other by the variables of torchrun or SLURM"),
    "inference": (None, "validation generates greedily; tied-lora generate has keys for sampling"),
    "model.data.*_ds.separate_prompt_and_response_with_newline": (
        False,
        "NeMo 2 does not read it; write the separator into model.data.train_ds.prompt_template",
    ),
    "model.data.*_ds.context_key": (
        "input",
        "NeMo 2 does not read it; model.data.train_ds.prompt_template names the fields",
    ),
    "model.peft.restore_from_ckpt_name": (None, "NeMo 2 does not read it; a run resumes by itself"),
    "model.peft.restore_from_hparams_path": (None, "NeMo 2 does not read it"),
    "model.peft.restore_from_ckpt": (None, "a run resumes by itself; model.peft.restore_from_path names an adapter"),
    "model.restore_from_ckpt": (None, "model.restore_from_path names the base"),
}

# Sections of NeMo's other schemes.
_OTHER_SCHEMES = {
    "model.peft.adapter_tuning": "adapter",
    "model.peft.p_tuning": "ptuning",
    "model.peft.ia3_tuning": "ia3",
    "model.peft.selective_tuning": "selective",
    "model.peft.sdlora_tuning": "sdlora",
    "model.peft.qlora_tuning": "qlora",
}

# Key -> (the one value with which NeMo works, why).
FIXED: dict[str, tuple[object, str]] = {
    "trainer.use_distributed_sampler": (False, "NeMo's own sampler splits the data over ranks"),
}
"""Keys that must keep one value, because NeMo does that work itself."""

# What people write -> what is read here.
_LR, _RANKS, _BATCH = "model.optim.lr", "trainer.devices", "model.micro_batch_size and model.global_batch_size"
_FILES = "model.data.train_ds.file_names, .validation_ds.file_names, .test_ds.file_names"
_MISTAKEN = {
    "optim.learning_rate": _LR,
    "model.optim.learning_rate": _LR,
    "model.optim.init_lr": _LR,
    "model.optim.max_lr": _LR,
    "model.learning_rate": _LR,
    "model.lr": _LR,
    "trainer.learning_rate": _LR,
    "trainer.lr": _LR,
    "learning_rate": _LR,
    "lr": _LR,
    "model.optim.warmup_steps": "model.optim.sched.warmup_steps",
    "model.optim.min_lr": "model.optim.sched.min_lr",
    "model.optim.sched.warmup": "model.optim.sched.warmup_steps",
    "model.optim.weight_decay_rate": "model.optim.weight_decay",
    "model.optim.adam_beta1": "model.optim.betas",
    "model.optim.adam_beta2": "model.optim.betas",
    "trainer.gpus": _RANKS,
    "trainer.num_gpus": _RANKS,
    "trainer.gpus_per_node": _RANKS,
    "trainer.nodes": "trainer.num_nodes",
    "trainer.epochs": "trainer.max_epochs",
    "trainer.steps": "trainer.max_steps",
    "trainer.max_iters": "trainer.max_steps",
    "trainer.replace_sampler_ddp": "trainer.use_distributed_sampler",
    "trainer.amp_level": "trainer.precision and model.megatron_amp_O2",
    "trainer.amp_backend": "trainer.precision",
    "trainer.gradient_clip": "trainer.gradient_clip_val",
    "trainer.resume_from_checkpoint": "model.resume_from_checkpoint; a run in the same folder resumes by itself",
    "trainer.checkpoint_callback": "exp_manager.create_checkpoint_callback",
    "trainer.progress_bar_refresh_rate": "trainer.enable_progress_bar",
    "exp_manager.checkpoint_callback_params.every_n_steps": (
        "exp_manager.checkpoint_callback_params.every_n_train_steps"
    ),
    "model.tensor_parallel_size": "model.tensor_model_parallel_size",
    "model.pipeline_parallel_size": "model.pipeline_model_parallel_size",
    "model.tp_size": "model.tensor_model_parallel_size",
    "model.pp_size": "model.pipeline_model_parallel_size",
    "model.cp_size": "model.context_parallel_size",
    "model.batch_size": _BATCH,
    "model.data.*_ds.batch_size": _BATCH,
    "model.data.*_ds.file_path": _FILES,
    "model.data.*_ds.file_name": _FILES,
    "model.data.*_ds.files": _FILES,
    "model.data.*_ds.data_path": _FILES,
    "model.data.data_prefix": f"{_FILES}; data of pre-training (.bin, .idx) is not read",
    "model.data.splits_string": _FILES,
    "model.data.seq_length": "model.data.train_ds.max_seq_length",
    "model.data.*_ds.seq_length": "model.data.train_ds.max_seq_length",
    "model.data.*_ds.max_seq_len": "model.data.train_ds.max_seq_length",
    "gpt_model_file": "model.restore_from_path",
    "base": "model.restore_from_path",
    "pretrained_checkpoint.restore_from_path": "model.restore_from_path",
    "model.lora_tuning.adapter_dim": f"{ADAPTER}.rank",
    "model.peft.rank": f"{ADAPTER}.rank",
    "model.peft.alpha": f"{ADAPTER}.alpha",
    "model.peft.dim": f"{ADAPTER}.rank",
    "model.peft.lora.rank": f"{ADAPTER}.rank",
    "rank": f"{ADAPTER}.rank (rank= is short for it in tied-lora launch)",
    "peft_scheme": "preset=lora, vera, tl5, tl6 or adalora",
}
_TOP_LEVEL = ("optim", "data", "peft", "train_ds", "validation_ds", "test_ds")


def is_nemo_key(key: str) -> bool:
    """Whether NeMo's fine-tuning reads this key, or has it in its YAML."""
    section, _, name = key.rpartition(".")
    if any(fnmatch.fnmatch(section, pattern) and name in names for pattern, names in _SECTIONS.items()):
        return True
    if any(_inside(key, pattern) for pattern in _OPEN_SECTIONS):
        return True
    return no_effect(key) is not None or other_scheme(key) is not None


def no_effect(key: str) -> tuple[object, str] | None:
    """Returns (NeMo's default, why it has no effect here) of such a key, else None."""
    return next((found for pattern, found in _NO_EFFECT.items() if _inside(key, pattern)), None)


def other_scheme(key: str) -> str | None:
    """Returns the scheme of NeMo that reads this key, if it is one that is not trained here."""
    return next((scheme for section, scheme in _OTHER_SCHEMES.items() if _inside(key, section)), None)


def mistaken_key(key: str) -> str | None:
    """Returns what to write instead of a key that people take for another, else None."""
    for pattern, right in _MISTAKEN.items():
        if fnmatch.fnmatch(key, pattern):
            return right
    return under_model(key)


def under_model(key: str) -> str | None:
    """Returns the key with the sections that were left out in front, else None."""
    first, _, rest = key.partition(".")
    if rest and first in _TOP_LEVEL:
        return f"model.data.{key}" if first.endswith("_ds") else f"model.{key}"
    return None


def unknown_to_nemo(key: str) -> str | None:
    """Returns why Lightning or exp_manager would refuse a key, else None."""
    section = max((closed for closed in _CLOSED_SECTIONS if key.startswith(f"{closed}.")), key=len, default="")
    if not section:
        return None
    name = key.removeprefix(f"{section}.").partition(".")[0]
    if section == "trainer" and name in _NEMO_CHOOSES:
        return "NeMo chooses it; leave it out"
    if name in _SECTIONS[section]:
        return None
    owner = "Lightning's Trainer" if section == "trainer" else "NeMo's exp_manager"
    close = nearest(f"{section}.{name}", ())
    return f"{owner} has no such key" + (f"; did you mean {close}?" if close else "")


def nearest(key: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the key most like `key`, among `known` and NeMo's keys of the same section."""
    section, _, name = key.rpartition(".")
    names = {name for pattern, names in _SECTIONS.items() if fnmatch.fnmatch(section, pattern) for name in names}
    siblings = {other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section}
    close = difflib.get_close_matches(name, sorted(names | siblings), n=1, cutoff=cutoff)
    if close:
        return f"{section}.{close[0]}" if section else close[0]
    far = difflib.get_close_matches(key, sorted(known), n=1, cutoff=max(cutoff, 0.75))
    return far[0] if far else None


def _inside(key: str, pattern: str) -> bool:
    """Whether a key is the section of the pattern, or in it."""
    return fnmatch.fnmatch(key, pattern) or fnmatch.fnmatch(key, f"{pattern}.*")
