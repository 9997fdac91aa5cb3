# SPDX-License-Identifier: Apache-2.0
"""Calls examples/bridge/finetune_tied_lora.py with several command lines, in one process that no test has made a rank.

python -m tests.bridge.example_runs FOLDER

FOLDER is as `write_example_folder` and `write_wrong_folders` make it. FOLDER/results.json gets, by name: exit code, stdout,
stderr; and under "rows" what the index of the data says.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.harness.paths import ROOT

__all__ = ["COMMANDS", "REFUSED", "main"]

ON_A_CPU = "model.apply_rope_fusion=false"
"""Bridge's Llama asks for a fused kernel of Transformer Engine, which a machine without a GPU lacks."""

COMMANDS: dict[str, tuple[int, list[str]]] = {
    "help": (1, ["--help"]),
    "right": (
        8,
        [
            *("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", ON_A_CPU),
            *("--preset=vera", "+peft.rank=16", "peft.layers=[0,3]", "optimizer.lr=2e-3", "+train.train_iters=7"),
            *("scheduler.lr_warmup_iters=2", "+dataset.dataset_kwargs.tokens_to_generate=0"),
        ],
    ),
    "other columns": (
        1,
        [
            *("--data={folder}/columns", "dataset.preprocessing.prompt_column=question", ON_A_CPU),
            "dataset.preprocessing.completion_column=answer",
        ],
    ),
}
"""Name -> number of ranks, arguments after those that name the files."""

REFUSED: dict[str, tuple[int, list[str], list[str]]] = {
    "what needs no Bridge, together": (
        8,
        [
            *("--max-steps=5", "hello", "peft.rank=8,16", "~peft.rank", "peft=vera", "++peft=null", "peft.dim=8"),
            *(
                "+peft.dropout=2",
                "peft.targets=[linear_q]",
                "peft.restore_from_path={folder}/none.nemo",
                "--preset=tl7",
            ),
            *(
                "peft.rank_budget={target_rank: 4}",
                "peft.layers=[0,",
                "~model.bf16",
                "--data={folder}",
                "--check=",
                "--folder={folder}/file",
            ),
        ],
        [
            "--max-steps=5: not an option; see --help",
            "'hello': not an override; write key=value",
            "'peft.rank=8,16': a sweep; give one value, and run the command once for each; if",
            "'peft.layers=[0,': ",
            "~peft.rank: a field can only be changed; write peft.rank=VALUE",
            "~model.bf16: a field can only be changed; write model.bf16=VALUE",
            "peft=vera: write --preset=vera",
            "++peft=null: write --preset=NAME (lora, vera, tl5, tl6), and peft.FIELD=VALUE for a field",
            "--preset=tl7: unknown; choose one of lora, vera, tl5, tl6",
            "peft.rank_budget: not with Bridge",
            "peft.restore_from_path={folder}/none.nemo: no such file",
            "peft.dim=8: not a field of the adapter; write peft.rank",
            "peft.dropout=2: must be in [0, 1)",
            "peft.targets: 'linear_q' is unknown",
            "--data={folder}/training.jsonl: no such file; one object per line, with the fields input and output",
            "--data={folder}/validation.jsonl: no such file",
            "--folder={folder}/file: is a file; name a folder",
            "--check=: empty; name a folder",
        ],
    ),
    "keys of Bridge": (
        8,
        [
            *(
                "model.foo=1",
                "+train.bar=2",
                "model.tensor_model_parallel=2",
                "optimizer.lr=abc",
                "train.train_iters=abc",
            ),
            *("++train.train_iters=1e2", "ddp.overlap_grad_reduce=maybe", "train=5", "+train={micro_batch_size: [1]}"),
            *("comm_overlap.tp_comm_overlap=true", "+model.init_method=normal", "rank=16"),
            *("scheduler=null", "dataset.dataset_kwargs=abc"),
        ],
        [
            "model.foo=1: model has no foo",
            "train.bar=2: train has no bar",
            "model.tensor_model_parallel=2: model has no tensor_model_parallel (did you mean tensor_model_parallel_size?)",
            "optimizer.lr='abc': must be a number",
            "train.train_iters='abc': must be a whole number",
            "train.train_iters=100.0: must be a whole number; write train.train_iters=100",
            "ddp.overlap_grad_reduce='maybe': must be true or false",
            "train=5: a section; set a key of it, as train.",
            "train.micro_batch_size=[1]: must be a whole number",
            "comm_overlap.tp_comm_overlap=True: comm_overlap is not set, so it has no tp_comm_overlap; set it in the script",
            "model.init_method='normal': a function, which no override can replace; set it in the script",
            "rank=16: Bridge's configuration has no rank",
            "scheduler=None: a section; set a key of it, as scheduler.",
            "dataset.dataset_kwargs='abc': must be a dictionary; write dataset.dataset_kwargs={key: value}",
        ],
    ),
    "an interpolation of nothing": (8, ["optimizer.lr=${nothing}"], ["Interpolation key 'nothing' not found"]),
    "ranks that do not fit": (
        3,
        ["model.tensor_model_parallel_size=2"],
        ["WORLD_SIZE=3: world size (3) is not divisible by"],
    ),
    "what does not fit the model": (
        2,
        [
            *(
                "peft.layers=[9]",
                "model.pipeline_model_parallel_size=2",
                "model.virtual_pipeline_model_parallel_size=2",
            ),
            *("ddp.use_megatron_fsdp=true", "checkpoint.ckpt_format=fsdp_dtensor", ON_A_CPU),
        ],
        [
            "peft.layers: ",
            "model.virtual_pipeline_model_parallel_size=2: on two stages",
            "ddp.use_megatron_fsdp=true: not possible",
        ],
    ),
    "a warm-up longer than the run": (
        1,
        ["train.train_iters=20", ON_A_CPU],
        ["scheduler.lr_warmup_iters=50: the run has train.train_iters=20 steps, and would never reach optimizer.lr"],
    ),
    "what Bridge compares without a look": (1, ["train.micro_batch_size=null", ON_A_CPU], ["WORLD_SIZE=1: "]),
    "a folder that the kernel owns": (1, ["--check=/proc/none/none", ON_A_CPU], ["/proc/none"]),
    "a file as --check": (1, ["--check={folder}/file"], ["--check={folder}/file: is a file; name a folder"]),
    "empty data": (
        1,
        ["--data={folder}/empty"],
        ["--data={folder}/empty/training.jsonl: is empty", "--data={folder}/empty/validation.jsonl: is not JSONL"],
    ),
    "fields": (
        1,
        ["--data={folder}/fields"],
        [
            '--data={folder}/fields/training.jsonl: line 2: has no "input" and "output"; its fields are question, answer;',
            '--data={folder}/fields/validation.jsonl: line 2: "output" is the number 1e3: must be a text',
        ],
    ),
    "lines": (
        1,
        ["--data={folder}/lines"],
        [
            "--data={folder}/lines/training.jsonl: has 2 blank lines, which Bridge cannot read; remove them",
            "--data={folder}/lines/validation.jsonl: begins with a byte order mark, which Bridge cannot read",
        ],
    ),
    "chat": (
        1,
        ["--data={folder}/chat"],
        [
            "--data={folder}/chat/training.jsonl: holds conversations, and this recipe trains on input and output;",
            '--data={folder}/chat/validation.jsonl: line 1: has no "input"; its fields are prompt, output;',
        ],
    ),
    "a torn base": (
        1,
        ["--hf-path={folder}/torn"],
        [
            "--hf-path={folder}/torn: config.json cannot be read: ",
            "--hf-path={folder}/torn: model.safetensors cannot be read: ",
            "--hf-path={folder}/torn: has no tokenizer (tokenizer.json, ",
        ],
    ),
    "a base without a name or a shard": (
        1,
        ["--hf-path={folder}/shards"],
        [
            "--hf-path={folder}/shards: config.json does not name the model",
            "--hf-path={folder}/shards: model-2.safetensors is missing; copy it too",
        ],
    ),
    "a base that Bridge does not know": (
        1,
        ["--hf-path={folder}/bert"],
        ["--hf-path={folder}/bert: Model architecture 'BertForMaskedLM' is not yet supported; AutoBridge.list"],
    ),
    "no base": (1, ["--hf-path={folder}"], ["--hf-path={folder}: not the folder of a Hugging Face model"]),
}
"""Name -> number of ranks, arguments, and how each line of the refusal begins."""


def main(folder: Path) -> None:
    """Every command of COMMANDS and REFUSED. Then it has the training data indexed, adds a row, and has them indexed again."""
    example = runpy.run_path(str(ROOT / "examples" / "bridge" / "finetune_tied_lora.py"))
    results: dict[str, object] = {}
    for name, (ranks, arguments, *_) in {**COMMANDS, **REFUSED}.items():
        os.environ["WORLD_SIZE"] = str(ranks)
        files = [*_files(folder), f"--check={folder / 'records' / name}"]
        words = [word.replace("{folder}", str(folder)) for word in arguments]
        results[name] = _call(example["main"], [*files, *words])
    results["rows"] = [_rows(example, folder), _rows(example, folder, more=json.dumps({"input": "", "output": "a"}))]
    (folder / "results.json").write_text(json.dumps(results))


def _files(folder: Path) -> list[str]:
    return [f"--hf-path={folder / 'hf'}", f"--data={folder / 'data'}", f"--folder={folder / 'run'}"]


def _call(main: Callable[[list[str]], int], arguments: list[str]) -> tuple[object, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code: object
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as ended:  # --help
            code = ended.code
        except Exception:
            code = traceback.format_exc()
    return code, out.getvalue(), err.getvalue()


def _rows(example: Mapping[str, Any], folder: Path, more: str = "") -> int:
    """How many training rows Bridge counts, after one more was written. Its index of the earlier file is still there."""
    from megatron.bridge.data.datasets.utils import _JSONLMemMapDataset

    with (folder / "data" / "training.jsonl").open("a") as file:
        file.write(more and more + "\n")
    options, words = example["_parser"]().parse_known_args(_files(folder))
    cfg = example["compose"](options, example["_check_files"](options, words))
    path, place = cfg.dataset.dataset_root + "/training.jsonl", cfg.dataset.dataset_kwargs.get("index_mapping_dir")
    return len(_JSONLMemMapDataset([path], index_mapping_dir=place, workers=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
