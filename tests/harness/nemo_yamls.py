# SPDX-License-Identifier: Apache-2.0
"""Every key of NeMo 2.4's `megatron_gpt_finetuning_config` and `megatron_gpt_generate_config`, with its default value."""

from __future__ import annotations

from typing import Any

__all__ = ["FINETUNING", "GENERATION"]

_TRAINER = {
    "devices": 1,
    "accelerator": "gpu",
    "num_nodes": 1,
    "precision": 16,
    "logger": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "max_epochs": 9999,
    "max_steps": 20000,
    "log_every_n_steps": 10,
    "val_check_interval": 200,
    "gradient_clip_val": 1.0,
}
_CHECKPOINT = {
    "monitor": "validation_${model.data.validation_ds.metric.name}",
    "save_top_k": 1,
    "mode": "min",
    "save_nemo_on_train_end": True,
    "filename": "${name}--{${exp_manager.checkpoint_callback_params.monitor}:.3f}-{step}-{consumed_samples}",
    "model_parallel_size": "${model.tensor_model_parallel_size}",
    "always_save_nemo": False,
    "save_best_model": True,
}
_EXP_MANAGER = {
    "explicit_log_dir": None,
    "exp_dir": None,
    "name": "${name}",
    "create_wandb_logger": False,
    "wandb_logger_kwargs": {"project": None, "name": None},
    "resume_if_exists": True,
    "resume_ignore_no_checkpoint": True,
    "create_checkpoint_callback": True,
    "checkpoint_callback_params": _CHECKPOINT,
    "create_early_stopping_callback": True,
    "early_stopping_callback_params": {
        "monitor": "val_loss",
        "mode": "min",
        "min_delta": 0.001,
        "patience": 10,
        "verbose": True,
        "strict": False,
    },
}
_MODEL = {
    "seed": 1234,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "global_batch_size": 128,
    "micro_batch_size": 4,
    "restore_from_path": "???",
    "resume_from_checkpoint": None,
    "save_nemo_on_validation_end": False,
    "sync_batch_comm": False,
    "megatron_amp_O2": False,
    "sequence_parallel": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "answer_only_loss": True,
    "gradient_as_bucket_view": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
}
_FSDP = {
    "fsdp": False,
    "fsdp_sharding_strategy": "full",
    "fsdp_grad_reduce_dtype": "fp32",
    "fsdp_sharded_checkpoint": False,
    "fsdp_use_orig_params": False,
}
_INIT = {"column_init_method": "xavier", "row_init_method": "zero"}
_TYING = {"layer_selection": None, "weight_tying": False, "position_embedding_strategy": None}
_LORA = {
    "variant": "nemo",
    "target_modules": ["attention_qkv"],
    "adapter_dim": 32,
    "adapter_dropout": 0.0,
    **_INIT,
    **_TYING,
}
_OTHER_SCHEMES = {
    "adapter_tuning": {
        "type": "parallel_adapter",
        "adapter_dim": 32,
        "adapter_dropout": 0.0,
        "norm_position": "pre",
        **_INIT,
        "norm_type": "mixedfusedlayernorm",
        **_TYING,
    },
    "p_tuning": {"virtual_tokens": 10, "bottleneck_dim": 1024, "embedding_dim": 1024, "init_std": 0.023},
    "ia3_tuning": {"layer_selection": None},
}
_DATASET = {
    "global_batch_size": "${model.global_batch_size}",
    "micro_batch_size": "${model.micro_batch_size}",
    "num_workers": 0,
    "pin_memory": True,
    "max_seq_length": 2048,
    "min_seq_length": 1,
    "index_mapping_dir": None,
    "truncation_method": "right",
}
_TRAIN = {
    **_DATASET,
    "file_names": "???",
    "shuffle": True,
    "memmap_workers": 2,
    "drop_last": True,
    "concat_sampling_probabilities": None,
    "label_key": "output",
    "add_eos": True,
    "add_sep": False,
    "add_bos": False,
    "truncation_field": "input",
    "prompt_template": "{input} {output}",
    "global_sample_mapping": False,
}


def _evaluation(train: str) -> dict[str, Any]:
    """The keys of validation_ds and test_ds. `train` is where they look for those of train_ds."""
    shared = ("label_key", "add_eos", "add_sep", "add_bos", "truncation_field", "prompt_template")
    return {
        **_DATASET,
        "shuffle": False,
        "drop_last": False,
        **{key: f"${{{train}.{key}}}" for key in shared},
        "write_predictions_to_file": False,
        "output_file_path_prefix": None,
        "tokens_to_generate": 32,
        "metric": {"name": "loss", "average": None, "num_classes": None},
    }


_EVALUATION = {
    **_evaluation("model.data.train_ds"),
    "memmap_workers": "${model.data.train_ds.memmap_workers}",
    "names": None,
    "global_sample_mapping": False,
}

FINETUNING: dict[str, Any] = {
    "name": "megatron_gpt_peft_${model.peft.peft_scheme}_tuning",
    "trainer": _TRAINER,
    "exp_manager": _EXP_MANAGER,
    "model": {
        **_MODEL,
        **_FSDP,
        "peft": {
            "peft_scheme": "adapter",
            "restore_from_path": None,
            **_OTHER_SCHEMES,
            "lora_tuning": {**_LORA, "alpha": "${model.peft.lora_tuning.adapter_dim}"},
            "selective_tuning": {"tunable_base_param_names": ["self_attention", "word_embeddings"]},
        },
        "data": {
            "chat": False,
            "chat_prompt_tokens": {
                "system_turn_start": "\x00",
                "turn_start": "\x11",
                "label_start": "\x12",
                "end_of_turn": "\n",
                "end_of_name": "\n",
            },
            "train_ds": _TRAIN,
            "validation_ds": {**_EVALUATION, "file_names": "???"},
            "test_ds": {**_EVALUATION, "file_names": None},
        },
        "optim": {
            "name": "fused_adam",
            "lr": 1e-4,
            "weight_decay": 0.01,
            "betas": [0.9, 0.98],
            "sched": {
                "name": "CosineAnnealing",
                "warmup_steps": 50,
                "min_lr": 0.0,
                "constant_steps": 0,
                "monitor": "val_loss",
                "reduce_on_plateau": False,
            },
        },
    },
}
"""The file for training. ??? is what the command line must give."""

_TRAITS = ("quality", "toxcity", "humor", "creativity", "violence", "helpfulness", "not_appropriate")
GENERATION: dict[str, Any] = {
    "name": "megatron_gpt_peft_${model.peft.peft_scheme}_tuning",
    "trainer": _TRAINER,
    "exp_manager": {
        **{key: value for key, value in _EXP_MANAGER.items() if "early_stopping" not in key},
        "checkpoint_callback_params": {
            **_CHECKPOINT,
            "monitor": "validation_${model.data.test_ds.metric.name}",
            "mode": "max",
            "always_save_nemo": True,
            "save_best_model": False,
        },
    },
    "model": {
        **_MODEL,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "save_nemo_on_validation_end": True,
        "peft": {
            "peft_scheme": "adapter",
            "restore_from_path": None,
            "restore_from_ckpt": {"checkpoint_dir": None, "checkpoint_name": None},
            **_OTHER_SCHEMES,
            "lora_tuning": _LORA,
        },
        "data": {
            "test_ds": {
                **_evaluation("data.train_ds"),
                "file_names": "???",
                "names": "???",
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "context_key": "input",
            },
        },
    },
    "inference": {
        "greedy": True,
        "top_k": 0,
        "top_p": 0.9,
        "temperature": 1.0,
        "all_probs": False,
        "repetition_penalty": 1.0,
        "min_tokens_to_generate": 0,
        "compute_logprob": False,
        "outfile_path": "output.txt",
        "compute_attention_mask": True,
    },
    "server": False,
    "port": 5555,
    "web_server": False,
    "share": True,
    "username": "test",
    "password": "test2",
    "web_port": 9889,
    "chat": False,
    "chatbot_config": {
        "value": False,
        "attributes": [
            *(
                {"name": key.title(), "min": 0, "max": 4, "key": key, "type": "int", "default": 4 if "l" in key else 0}
                for key in _TRAITS
            ),
            {"name": "Language", "choices": ["de", "en", "fr"], "key": "lang", "type": "list", "default": "en"},
        ],
        "user": "User",
        "assistant": "Assistant",
        "system": "Answer politely.\n\n",
    },
}
"""The file for generation. The texts and choices of the chat are shortened."""
