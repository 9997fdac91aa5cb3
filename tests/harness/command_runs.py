# SPDX-License-Identifier: Apache-2.0
"""Runs the real commands on a tiny base model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import sentencepiece

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile, read_adapter
from tests.harness.forks import fork_command, run_forked
from tests.harness.paths import ROOT

__all__ = [
    "PRETRAIN",
    "SHORT",
    "TIMEOUT",
    "TINY",
    "console_script",
    "finetune",
    "finetune_arguments",
    "make_workshop",
    "tied_lora",
    "user_environment",
]

TINY = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.encoder_seq_length=32",
    "model.max_position_embeddings=32",
    "model.override_vocab_size=128",
]
SHORT = [
    "trainer.precision=32",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "model.global_batch_size=4",
    "model.micro_batch_size=2",
    "model.data.train_ds.max_seq_length=32",
    "model.data.train_ds.pin_memory=false",
    "model.data.validation_ds.pin_memory=false",
    "model.data.validation_ds.tokens_to_generate=4",
    "model.optim.sched.warmup_steps=1",
]
_DATA = [
    f"model.data.{ds}.file_names=[{n}.jsonl]" for ds, n in (("train_ds", "train"), ("validation_ds", "validation"))
]
PRETRAIN = [*TINY, *SHORT, *_DATA, "model.tokenizer.model=tokenizer.model"]
"""Arguments of `tied-lora pretrain` in a folder that `make_workshop` filled."""
TIMEOUT = 600


def tied_lora(
    *arguments: str, folder: Path, ok: bool = True, planted: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command in a folder, in a fork of a process that has imported Megatron and NeMo. Its ranks are forks too.

    `tests/commands/test_console_script.py` runs each command as a user does.

    Args:
        ok: fail if the command fails.
        planted: more environment variables. A `sitecustomize` on PYTHONPATH can plant faults.
    """
    done = run_forked(fork_command, arguments, cwd=folder, env=user_environment(planted), timeout=TIMEOUT)
    return _checked(done, arguments, ok)


def console_script(
    *arguments: str, folder: Path, ok: bool = True, planted: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command in a folder as a user does: the installed script, which starts its ranks."""
    script = Path(sys.executable).with_name("tied-lora")
    done = subprocess.run(
        [script, *arguments],
        cwd=folder,
        env=user_environment(planted),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return _checked(done, arguments, ok)


def user_environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment, without a launcher's variables, and with the checkout first on PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= more or {}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return environment


def _checked(
    done: subprocess.CompletedProcess[str], arguments: tuple[str, ...], ok: bool
) -> subprocess.CompletedProcess[str]:
    if ok:
        kept = [Path(path).read_text() for path in re.findall(r"the traceback is in (\S+)", done.stderr)]
        assert done.returncode == 0, "\n".join([str(arguments), done.stdout[-4000:], done.stderr[-8000:], *kept])
    return done


def make_workshop(folder: Path) -> None:
    """Writes data, a tokenizer, and a base that `tied-lora pretrain` trains."""
    words = ["eins", "zwei", "drei", "vier", "five", "six", "sept", "huit"]
    examples = [{"input": f"{i % 8}:", "output": words[i % 8]} for i in range(64)]
    for name in ("train", "validation"):
        lines = examples if name == "train" else examples[:8]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([e["input"] + e["output"] for e in examples]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=40,
        model_type="char",
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    tied_lora("pretrain", *PRETRAIN, "output=base.nemo", "name=base", folder=folder)
    assert (folder / "base.nemo").stat().st_size > 10_000


def finetune(folder: Path, name: str, *arguments: str) -> tuple[AdapterFile, dict, str]:
    """Runs a short fine-tuning. Returns the adapter's file, metrics.json, and the output of the command."""
    done = tied_lora("finetune", *finetune_arguments(name), *arguments, folder=folder)
    metrics = json.loads((folder / name / "metrics.json").read_text())
    return read_adapter(folder / name / "adapter.nemo"), metrics, done.stdout


def finetune_arguments(name: str) -> list[str]:
    """Arguments of a short `tied-lora finetune` in the folder `name`."""
    fixed = [
        "model.restore_from_path=base.nemo",
        f"output={name}/adapter.nemo",
        f"exp_manager.explicit_log_dir={name}",
    ]
    rank = ["model.peft.tied_lora.rank=4", "model.optim.lr=1e-2"]
    return [*SHORT, *_DATA, *fixed, *rank]
