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
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from nemo_tied_lora import ConfigError
from nemo_tied_lora.bridge.overrides import Overrides
from nemo_tied_lora.bridge.run_files import base_problems, data_index_folder, data_problems
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.files import folder_problem, write_json
from nemo_tied_lora.launching.run_record import versions
from nemo_tied_lora.platform import prepare

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


def compose(options: argparse.Namespace, overrides: Overrides) -> Any:
    """The recipe with the overrides of the command line, in Hydra's grammar as Bridge's own scripts take them.

    Raises:
        ConfigError: lists what is wrong: a key that is not there, a value of another type, a field of the adapter.
    """
    try:
        prepare(bridge=True)
        from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

        from nemo_tied_lora.bridge import TiedLoRA
    except ImportError as error:
        raise ConfigError([f"{sys.executable}: {error}; name the Python of Megatron-Bridge"]) from error
    try:
        cfg = recipe(options.hf_path, options.data, options.folder)
    except (AssertionError, OSError, ValueError) as error:
        # The first sentence: Bridge's list of all models follows. Before it, a word on networks.
        said = str(error).strip("\n✗ ").splitlines()[0].rpartition("Last error: ")[2].partition(". ")[0]
        known = "AutoBridge.list_supported_models() lists what Bridge reads"
        raise ConfigError([f"--hf-path={options.hf_path}: {said}; {known}"]) from error
    Problems(overrides.problems(cfg)).raise_if_any()
    try:
        cfg = process_config_with_overrides(cfg, cli_overrides=overrides.words)
    except (OverridesError, OmegaConfBaseException) as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    # Bridge's overrides leave out a PEFT method, because it is callable.
    cfg.peft = TiedLoRA.preset(overrides.preset, **overrides.adapter)
    # Bridge would keep its index of the lines beside the data, and use it for later files of the same name.
    index = data_index_folder(Path(options.folder), Path(cfg.dataset.dataset_root or options.data))
    cfg.dataset.dataset_kwargs = {"index_mapping_dir": index, **(cfg.dataset.dataset_kwargs or {})}
    steps, warm_up = cfg.train.train_iters, cfg.scheduler.lr_warmup_iters
    if steps and warm_up and warm_up >= steps:
        end = f"the run has train.train_iters={steps} steps, and would never reach optimizer.lr; set it to less"
        raise ConfigError([f"scheduler.lr_warmup_iters={warm_up}: {end}"])
    return cfg


def main(arguments: Sequence[str]) -> int:
    """Returns 0; 2 if the arguments are refused; STOPPED_EARLY."""
    options, words = _parser().parse_known_args(arguments)
    try:
        cfg = compose(options, _check_files(options, words))
        if options.check is None:
            return _train(cfg, Path(options.folder))
        _check_and_record(cfg, options, arguments)
    except ConfigError as error:
        lines = ["finetune_tied_lora.py: not possible:", *(f"  {line}" for line in error.problems)]
        print("\n".join(lines), file=sys.stderr)
        return 2
    return 0


def _train(cfg: Any, folder: Path) -> int:
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    from nemo_tied_lora import save_adapter

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


def _check_files(options: argparse.Namespace, words: Sequence[str]) -> Overrides:
    """Checks all that needs no Bridge, whose import takes seconds. The first rank reads the data for all.

    Raises:
        ConfigError: lists what is wrong with files, folders, the adapter's fields and the grammar of the overrides.
    """
    overrides, problems = Overrides.read(words, options.preset)
    own_tokenizer = overrides.value("tokenizer.tokenizer_model") is None
    problems += base_problems(Path(options.hf_path), tokenizer=own_tokenizer)
    if os.environ.get("RANK", "0") == "0":
        columns = "dataset.preprocessing.prompt_column", "dataset.preprocessing.completion_column"
        prompt, completion = map(overrides.value, columns, ("input", "output"))
        folder = overrides.value("dataset.dataset_root", options.data)
        problems += data_problems(Path(str(folder or options.data)), prompt, completion)
    for key, folder in (("--folder", options.folder), ("--check", options.check)):
        if folder is not None and (problem := folder_problem(Path(folder)) if folder else "empty; name a folder"):
            problems.append(f"{key}={folder}: {problem}")
    problems.raise_if_any()
    return overrides


def _check_and_record(cfg: Any, options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Bridge's own checks, for the number of ranks in WORLD_SIZE. Then writes config.yaml and versions.json into --check.

    Raises:
        ConfigError: what Bridge refuses; or a folder cannot be made.
    """
    from megatron.bridge.training.config import runtime_config_update

    try:
        runtime_config_update(cfg)
    except ConfigError:
        raise
    except Exception as error:  # Bridge asserts, and compares values before it has looked at their types
        said = " ".join(str(error).split()) or f"not {traceback.extract_tb(error.__traceback__)[-1].line}"
        raise ConfigError([f"WORLD_SIZE={os.environ.get('WORLD_SIZE', '1')}: {said}"]) from error
    folder = Path(options.check)
    try:
        for one in (Path(options.folder), folder):
            one.mkdir(parents=True, exist_ok=True)
        cfg.to_yaml(str(folder / "config.yaml"))
        write_json(folder / "versions.json", {**versions(), "arguments": list(arguments)})
    except OSError as error:
        raise ConfigError([f"{error.filename or folder}: {error.strerror}; name another folder"]) from error


def _parser() -> argparse.ArgumentParser:
    summary, example = (__doc__ or "").split("\n\n", 1)
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=example, formatter_class=shape, allow_abbrev=False)
    parser.add_argument("--hf-path", required=True, help="the folder of a Hugging Face model: weights and tokenizer")
    parser.add_argument("--data", required=True, help="a folder with training.jsonl and validation.jsonl")
    parser.add_argument("--folder", default="runs/tied_lora", help="the run's folder (default: %(default)s)")
    parser.add_argument(
        "--preset", help="lora, vera, tl5 or tl6 (default: tl6); peft.FIELD=VALUE changes a field of it"
    )
    parser.add_argument("--check", help="only check, for WORLD_SIZE ranks, and write the record into this folder")
    parser.usage = (
        "%(prog)s --hf-path FOLDER --data FOLDER [--folder FOLDER] [--preset NAME] [--check FOLDER] [key=value ...]"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
