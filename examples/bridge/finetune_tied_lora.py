# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a Hugging Face model with Tied-LoRA, by Megatron-Bridge's own training loop.

torchrun --nproc-per-node 8 examples/bridge/finetune_tied_lora.py --hf-path my-base --data my-data --folder runs/german \\
    model.tensor_model_parallel_size=8 peft.rank=16 optimizer.lr=1e-3 train.train_iters=500

It writes checkpoints, from which the same command resumes, and at the end FOLDER/adapter.nemo. On SLURM, launch/slurm/bridge.sbatch
starts it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tied_lora import ConfigError, save_adapter
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.files import write_json
from nemo_tied_lora.launching.run_record import versions
from nemo_tied_lora.platform import prepare

if TYPE_CHECKING:
    from nemo_tied_lora.bridge import TiedLoRA

__all__ = ["compose", "main", "recipe"]

STOPPED_EARLY = 75
"""The exit code of a run that saved and stopped before its last step, so that the job's script starts it again."""


def recipe(hf_path: str, data: str, folder: str) -> Any:
    """The run's ConfigContainer, as a recipe of Bridge returns it, with this base and this data.

    One of Bridge's own recipes does too, where it has one for the base: ``llama32_1b_peft_config(TiedLoRA(rank=8))``.

    Args:
        hf_path: the folder of a model that Bridge knows, with weights and tokenizer.
        data: a folder with training.jsonl and validation.jsonl, one object with ``input`` and ``output`` per line.
        folder: gets checkpoints and TensorBoard's events.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.data.builders import GPTSFTDatasetConfig, PromptCompletionSFTPreprocessingConfig
    from megatron.bridge.training import config as bridges

    from nemo_tied_lora.bridge import FactorRates

    length, checkpoints = 2048, f"{folder}/checkpoints"
    model = AutoBridge.from_hf_pretrained(hf_path).to_megatron_provider(load_weights=False)
    model.seq_length = length
    return bridges.ConfigContainer(
        model=model,
        optimizer=bridges.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=0.0, weight_decay=0.0, clip_grad=1.0),
        optimizer_config_override_provider=FactorRates(),  # as in `tied-lora finetune`: each factor has a rate of its own
        # The scheduler sets the weight decay at each step, and has no default for it.
        scheduler=bridges.SchedulerConfig(
            lr_decay_style="cosine", lr_warmup_iters=50, start_weight_decay=0.0, end_weight_decay=0.0
        ),
        # At SIGTERM, which comes before SLURM's time limit, Bridge saves and stops.
        train=bridges.TrainingConfig(
            train_iters=1000, global_batch_size=128, micro_batch_size=1, exit_signal_handler=True
        ),
        validation=bridges.ValidationConfig(eval_interval=100, eval_iters=8),
        dataset=GPTSFTDatasetConfig(
            seq_length=length,
            dataset_root=data,
            preprocessing=PromptCompletionSFTPreprocessingConfig(
                prompt_column="input", completion_column="output", separator=" "
            ),
            do_test=False,
        ),
        tokenizer=bridges.TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf_path),
        ddp=bridges.DistributedDataParallelConfig(check_for_nan_in_grad=True, grad_reduce_in_fp32=True),
        checkpoint=bridges.CheckpointConfig(
            pretrained_checkpoint=hf_path, save=checkpoints, load=checkpoints, save_interval=100
        ),
        logger=bridges.LoggerConfig(log_interval=1, tensorboard_dir=f"{folder}/tensorboard"),
        rng=bridges.RNGConfig(seed=1234),
        mixed_precision="bf16_mixed",
    )


def compose(options: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """The recipe with the overrides of the command line, in Hydra's grammar as Bridge's own scripts take them.

    Raises:
        ConfigError: lists what is wrong: an override that cannot be read, of a key that is not there, or a field of the adapter.
    """
    from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

    problems = Problems()
    # Bridge's overrides leave out a PEFT method, because it is callable.
    peft = problems.attempt(_adapter, options.preset, [word for word in overrides if word.startswith("peft.")])
    try:
        cfg = recipe(options.hf_path, options.data, options.folder)
    except ValueError as error:
        raise ConfigError([*problems, f"--hf-path={options.hf_path}: {' '.join(str(error).split())}"]) from error
    try:
        cfg = process_config_with_overrides(
            cfg, cli_overrides=[word for word in overrides if not word.startswith("peft.")]
        )
    except OverridesError as error:
        problems.append(" ".join(str(error).split()))
    problems.raise_if_any()
    cfg.peft = peft
    return cfg


def _adapter(preset: str, overrides: Sequence[str]) -> TiedLoRA:
    """The preset with the fields of ``peft.FIELD=VALUE``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    from nemo_tied_lora.bridge import TiedLoRA

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError([f"{error.override}: {' '.join(str(error).split())}"]) from error
    return TiedLoRA.preset(preset, **{one.key_or_group.removeprefix("peft."): one.value() for one in parsed})


def main(arguments: Sequence[str]) -> int:
    """Returns 0; 2 if the arguments are refused; STOPPED_EARLY."""
    options, overrides = _parser().parse_known_args(arguments)
    try:
        _check_files(options.hf_path, options.data)
        prepare(bridge=True)
        cfg = compose(options, overrides)
        if options.check is not None:
            _check_and_record(cfg, options.check, overrides)
            return 0
    except ConfigError as error:
        print(
            "\n".join(["finetune_tied_lora.py: not possible:", *(f"  {line}" for line in error.problems)]),
            file=sys.stderr,
        )
        return 2
    return _train(cfg, Path(options.folder))


def _train(cfg: Any, folder: Path) -> int:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    class SaveAdapter(Callback):
        """After the last step, on all ranks. Bridge then ends the process groups."""

        def on_train_end(self, context: Any) -> None:
            save_adapter(cfg.peft.adapter, folder / "adapter.nemo")

    try:
        finetune(cfg, forward_step, callbacks=[SaveAdapter()])
    except SystemExit as stopped:
        if stopped.code in (0, None):
            return STOPPED_EARLY
        raise
    return 0


def _check_files(hf_path: str, data: str) -> None:
    """Before Bridge is imported, which takes seconds.

    Raises:
        ConfigError: lists the files that are missing.
    """
    problems = Problems()
    if not Path(hf_path, "config.json").is_file() or not any(Path(hf_path).glob("*.safetensors")):
        problems.append(
            f"--hf-path={hf_path}: not the folder of a Hugging Face model, with config.json and *.safetensors"
        )
    for name in ("training.jsonl", "validation.jsonl"):
        problems.file("--data", Path(data, name), "one object per line, with the fields input and output")
    problems.raise_if_any()


def _check_and_record(cfg: Any, folder: Path, overrides: Sequence[str]) -> None:
    """Bridge's own checks, for the number of ranks in WORLD_SIZE. Writes config.yaml and versions.json into the folder.

    Raises:
        ConfigError: what Bridge refuses.
    """
    from megatron.bridge.training.config import runtime_config_update

    folder.mkdir(parents=True, exist_ok=True)
    cfg.to_yaml(str(folder / "config.yaml"))
    write_json(folder / "versions.json", {**versions(), "arguments": list(overrides)})
    try:
        runtime_config_update(cfg)
        cfg.validate()
    except (AssertionError, ValueError) as error:
        raise ConfigError([f"{os.environ.get('WORLD_SIZE', '1')} ranks: {' '.join(str(error).split())}"]) from error


def _parser() -> argparse.ArgumentParser:
    summary, example = (__doc__ or "").split("\n\n", 1)
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=example, formatter_class=shape)
    parser.add_argument("--hf-path", required=True, help="the folder of a Hugging Face model: weights and tokenizer")
    parser.add_argument("--data", required=True, help="a folder with training.jsonl and validation.jsonl")
    parser.add_argument("--folder", default="runs/tied_lora", help="the run's folder (default: %(default)s)")
    parser.add_argument(
        "--preset", default="tl6", help="lora, vera, tl5 or tl6 (default: %(default)s); peft.FIELD=VALUE changes it"
    )
    parser.add_argument(
        "--check", type=Path, help="only check, for WORLD_SIZE ranks, and write the record into this folder"
    )
    parser.usage = (
        "%(prog)s --hf-path FOLDER --data FOLDER [--folder FOLDER] [--preset NAME] [--check FOLDER] [key=value ...]"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
