# SPDX-License-Identifier: Apache-2.0
"""Runs short fits on real NeMo in one start of the ranks: all loops and layouts, with the same base, data and adapter."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from tests.harness.ranks import run_ranks
from tests.harness.switched_off import switched_off
from tests.nemo.training_state import bits_of, everything, flip_a_bit

__all__ = ["LOOPS", "MULTIPLIERS", "UNGUARDED", "UNSUMMED", "Fit", "FitRecord", "fit_records", "make_data", "run_fits"]

LOOPS: dict[str, tuple[str, ...]] = {
    "O1": ("model.optim.name=fused_adam",),
    "O2": ("model.optim.name=fused_adam", "model.megatron_amp_O2=true", "trainer.precision=bf16"),
    # gloo cannot average in a collective
    "mcore": ("model.optim.name=mcore_distributed_optim", "+model.optim.average_in_collective=false"),
}
"""Each loop of NeMo to its overrides."""

MULTIPLIERS = {"A": 0.5, "B": 2, "u": 1, "v": 4}
"""Of every fit; u has its default, 1."""

_FULL = (
    "model.activations_checkpoint_granularity=full",
    "model.activations_checkpoint_method=uniform",
    "model.activations_checkpoint_num_layers=1",
)
_HALF = ("model.megatron_amp_O2=true", "trainer.precision=bf16")
_BUDGET = tuple(
    f"model.peft.tied_lora.rank_budget.{key}={value}"
    for key, value in {"target_rank": 2, "start_step": 1, "final_step": 4, "every": 1}.items()
)
_CHECK_LOOP = "nemo_tied_lora.planning.settings.training_loop_checks:check_loop"
_OVERLAP = ("+model.optim.overlap_grad_sync=true", "+model.optim.overlap_param_sync=true")

_TINY = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.encoder_seq_length=32",
    "model.max_position_embeddings=32",
    "model.override_vocab_size=128",
    "model.make_vocab_size_divisible_by=32",
    "model.global_batch_size=8",
    "model.micro_batch_size=2",
    "model.data.train_ds.max_seq_length=32",
    "model.data.validation_ds.tokens_to_generate=4",
    "model.data.train_ds.pin_memory=false",
    "model.data.validation_ds.pin_memory=false",
    "model.optim.sched.warmup_steps=1",
    "model.optim.lr=1e-2",
    "model.optim.weight_decay=0.0",
    *(f"model.optim.lr_multipliers.{factor}={multiplier}" for factor, multiplier in MULTIPLIERS.items()),
    "peft=tied_lora",
    "model.peft.tied_lora.rank=4",
    "trainer.precision=32",
    "trainer.val_check_interval=1",
    "trainer.limit_val_batches=0",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
]


_FIND_NONFINITE, _CHECK_TIES = (
    "nemo_tied_lora.adapter.nonfinite_grads:find_nonfinite",
    "nemo_tied_lora.adapter.replica_check:check_ties",
)
UNGUARDED = {
    "stop": _FIND_NONFINITE,
    "skip O1": _FIND_NONFINITE,
    "drift tp2": _CHECK_TIES,
    "drift before a checkpoint": _CHECK_TIES,
    "drift before the file": _CHECK_TIES,
}
"""Negative controls: the fit to the guard that is switched off when the fit runs again."""
UNSUMMED = ("O1 pp2", "O2 pp2")
"""Fits to run again without the sum over stages; `finalize_model_grads` does it in megatron-core's own loop."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One fit: its Hydra overrides and its faults.

    poison: (step from 1, rank, tensor): that rank's summed gradient gets a NaN in its last element.
    drift: (step from 1, rank, tensor): a bit of that rank's copy is flipped before the tie guard runs.
    checkpoint_at: the step after which it writes a training checkpoint; 0: no checkpoint.
    off: the guard to switch off (see tests/harness/switched_off.py).
    """

    overrides: tuple[str, ...] = ()
    steps: int = 3
    preset: str = "tl6"
    poison: tuple[int, int, str] | None = None
    drift: tuple[int, int, str] | None = None
    save_at_end: bool = False
    checkpoint_at: int = 0
    off: str | None = None


@dataclass
class FitRecord:
    """The results of a fit on this rank. start, state: the whole adapter before and after it, in float32."""

    failure: str | None = None
    traceback: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    first_step: dict[str, torch.Tensor] = field(default_factory=dict)
    """The whole adapter after the first step, in float32."""
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    local_bits: dict[str, bytes] = field(default_factory=dict)
    masks: dict[str, list[bool]] = field(default_factory=dict)
    """Of a rank budget, at the end."""
    observed: int = 0
    """The steps that the budget has observed."""
    untouched: list[bool] = field(default_factory=list)
    """For each step: whether every parameter, moment and step count, and the learning rate, are unchanged."""
    global_step: int = 0
    files: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    """The run's part of metrics.json."""


def fits_of(world_size: int) -> dict[str, Fit]:
    """All fits of the suite that need this number of ranks."""
    if world_size == 1:
        fits = {loop: Fit(overrides=overrides, steps=5) for loop, overrides in LOOPS.items()}
        interleaved = (*LOOPS["O2"], "model.virtual_pipeline_model_parallel_size=2")
        float32 = (*_HALF, "model.peft.tied_lora.dtype=float32")
        return fits | {
            "interleaved": Fit(overrides=interleaved),
            "O1 budget": Fit(overrides=(*LOOPS["O1"], *_BUDGET), steps=5),
            "float32 adapter": Fit(overrides=(*LOOPS["mcore"], *float32), steps=2),
            "float32 adapter in O2, unchecked": Fit(overrides=(*LOOPS["O1"], *float32), off=_CHECK_LOOP),
        }
    layouts = {"tp2": ("layout=tp2",), "pp2": ("layout=pp2",), "dp2": ()}
    fits = {
        f"{loop} {layout}": Fit(overrides=(*sizes, *overrides), steps=5)
        for loop, overrides in LOOPS.items()
        for layout, sizes in layouts.items()
    }
    more = {
        "O1 tp2 full recompute": ("layout=tp2", *_FULL),
        "O1 pp2 full recompute": ("layout=pp2", *_FULL),
        "O1 pp2 selective recompute": ("layout=pp2", "model.activations_checkpoint_granularity=selective"),
        "O1 tp2 sequence parallel": ("layout=tp2", "model.sequence_parallel=true"),
        "mcore dp2 overlap": (*LOOPS["mcore"], *_OVERLAP),
        "mcore dp2 overlap full recompute": (*LOOPS["mcore"], *_OVERLAP, *_FULL),
    } | {f"{loop} dp2 full recompute": (*overrides, *_FULL) for loop, overrides in LOOPS.items() if loop != "O1"}
    fits |= {name: Fit(overrides=overrides, steps=5) for name, overrides in more.items()}
    unsummed = "nemo_tied_lora.adapter.injected_adapter:Adapter.reduce_gradients"
    fits |= {f"{name}, unsummed": replace(fits[name], off=unsummed) for name in UNSUMMED}
    loop = "mcore dp2 overlap full recompute"
    fits[f"{loop}, unguarded"] = replace(fits[loop], off=_CHECK_LOOP)
    budgets = {"O1": "pp2", "O2": "tp2", "mcore": "dp2"}
    for loop, layout in budgets.items():
        fits[f"{loop} {layout} budget"] = Fit(overrides=(*layouts[layout], *LOOPS[loop], *_BUDGET), steps=5)
    # The guards.
    skip = ("guards.nonfinite_gradients=skip",)
    poison = (2, 1, "layers.3.linear_fc1.u")
    for loop, overrides in LOOPS.items():
        fits[f"skip {loop}"] = Fit(overrides=("layout=pp2", *overrides, *skip), poison=poison)
    fits["skip budget"] = Fit(overrides=("layout=pp2", *LOOPS["O1"], *skip, *_BUDGET), steps=5, poison=poison)
    fits["skip dp2"] = Fit(overrides=(*LOOPS["mcore"], *skip), poison=(2, 0, "linear_qkv.A"))
    fits["stop"] = Fit(overrides=("layout=tp2",), poison=(2, 0, "layers.1.linear_proj.v"), save_at_end=True)
    fits["ten in a row"] = Fit(overrides=("layout=pp2", *skip, "model.optim.lr=1e30"), steps=14)
    drift: dict[str, tuple[str, str, int]] = {
        "drift tp2": ("layout=tp2", "linear_fc1.A", 1),
        "drift dp2": ("layout=single", "layers.2.linear_qkv.v", 1),
    }
    for name, (layout, tensor, rank) in drift.items():
        often = "guards.tie_guard_every_n_steps=2"
        fits[name] = Fit(overrides=(layout, often), steps=4, drift=(2, rank, tensor), save_at_end=True)
    seldom = "guards.tie_guard_every_n_steps=100"
    fits["drift before a checkpoint"] = Fit(
        overrides=("layout=tp2", seldom), drift=(2, 1, "linear_qkv.A"), checkpoint_at=2
    )
    fits["drift before the file"] = Fit(
        overrides=("layout=pp2", seldom), drift=(3, 1, "linear_qkv.A"), save_at_end=True
    )
    off = "guards.tie_guard_every_n_steps=0"
    fits["drift, guard off"] = Fit(overrides=("layout=pp2", off), drift=(3, 1, "linear_qkv.A"), save_at_end=True)
    return fits | {f"{name}, unguarded": replace(fits[name], off=place) for name, place in UNGUARDED.items()}


@functools.cache
def _outcome(world_size: int) -> list[dict[str, FitRecord]] | AssertionError:
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        try:
            return run_ranks(run_fits, folder, fits_of(world_size), world_size=world_size, timeout=900)
        except AssertionError as failure:
            return failure


def fit_records(world_size: int) -> list[dict[str, FitRecord]]:
    """Each rank's record of every fit. The ranks start once, even if they fail."""
    result = _outcome(world_size)
    if isinstance(result, AssertionError):
        raise result
    return result


def make_data(folder: Path) -> None:
    """Writes JSONL files and a tokenizer. Answers have one length, so a mean over microbatches is the mean over tokens."""
    words = ["eins", "zwei", "drei", "vier", "five", "nine", "sept", "huit"]
    examples = [{"input": f"{i % 8}:", "output": words[i % 8]} for i in range(64)]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
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


def run_fits(folder: str, fits: dict[str, Fit]) -> dict[str, FitRecord]:
    """Runs all fits on a rank, one after the other. An exception goes into the fit's record and does not end the rank."""
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    from nemo.utils import logging

    logging.remove_stream_handlers()
    os.chdir(folder)
    records = {}
    for name, fit in fits.items():
        with _fresh_layout(), switched_off(fit.off) if fit.off else nullcontext():
            records[name] = FitRecord()
            try:
                _run(fit, name, records[name])
            except Exception as failure:
                records[name].failure = f"{type(failure).__name__}: {failure}"
                records[name].traceback = traceback.format_exc()
    return records


@contextmanager
def _fresh_layout() -> Iterator[None]:
    """Clears the layout of the previous fit: NeMo and Megatron keep it in globals, for one run per process."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from nemo.utils.metaclasses import Singleton

    from tests.harness.relayout import forget_layout

    world_size = str(torch.distributed.get_world_size())
    forget_layout()
    destroy_num_microbatches_calculator()
    Singleton._Singleton__instances.clear()
    os.environ["WORLD_SIZE"] = world_size  # Lightning removes it when a fit ends
    yield
    torch.distributed.barrier()


def _run(fit: Fit, name: str, record: FitRecord) -> None:
    from megatron.core import parallel_state
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
    from omegaconf import OmegaConf, open_dict

    from nemo_tied_lora.adapter.factor_names import expected_shapes
    from nemo_tied_lora.nemo.model import MegatronGPTTiedLoraModel
    from nemo_tied_lora.nemo.peft_config import TiedLoraPEFTConfig
    from nemo_tied_lora.nemo.run_recorder import RunRecorder
    from nemo_tied_lora.planning.composing.compose import compose_config
    from nemo_tied_lora.planning.settings.run_settings import GuardSettings
    from tests.harness.tiny_gpt import fill, full_tensor

    files = [f"model.data.{ds}.file_names=[{ds.removesuffix('_ds')}.jsonl]" for ds in ("train_ds", "validation_ds")]
    own = [f"trainer.devices={torch.distributed.get_world_size()}", f"trainer.max_steps={fit.steps}"]
    own += [f"model.peft.tied_lora.preset={fit.preset}", "model.tokenizer.model=tokenizer.model"]
    cfg = compose_config("pretrain", [*_TINY, *files, *own, *fit.overrides])
    model_cfg = OmegaConf.create(OmegaConf.to_container(cfg.model, resolve=True))
    with open_dict(model_cfg), open_dict(cfg):
        model_cfg.precision = cfg.trainer.precision
        cfg.exp_manager = None  # a fit writes no folder
    recorder, watcher = RunRecorder(), _watcher(fit, record)
    trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer(callbacks=[recorder, watcher])
    parallel_state.initialize_model_parallel(
        cfg.model.tensor_model_parallel_size,
        cfg.model.pipeline_model_parallel_size,
        context_parallel_size=cfg.model.context_parallel_size,
    )
    model = _planted(MegatronGPTTiedLoraModel, fit)(model_cfg, trainer)
    model.add_adapter(TiedLoraPEFTConfig(model_cfg))
    model.guards = GuardSettings.from_mapping(cfg.guards)
    adapter = model.tied_lora
    for chunk in adapter.chunks:
        fill(chunk.body)
    shapes = expected_shapes(adapter.config, adapter.shapes)
    adapter.load_full_state({key: full_tensor(f"start {key}", shape) for key, shape in shapes.items()})
    record.start = _whole(adapter)
    try:
        trainer.fit(model)
        if fit.save_at_end:
            model.save_to(f"{name}.nemo")
    finally:
        record.global_step, record.summary = trainer.global_step, recorder.summary()
        written = [f"{name}.nemo", "checkpoint"]
        record.files = [file for file in written if Path(file).exists()]
    record.state = _whole(adapter)
    if adapter.pruning is not None:
        record.masks = {name: mask.tolist() for name, mask in adapter.pruning.masks().items()}
        record.observed = adapter.pruning.done
    record.local_bits = {
        f"{index} {key}": bits_of(parameter)
        for index, chunk in enumerate(adapter.chunks)
        for key, parameter in chunk.factors.named_parameters()
    }


def _whole(adapter: Any) -> dict[str, torch.Tensor]:
    return {key: tensor.float().clone() for key, tensor in adapter.full_state().items()}


def _watcher(fit: Fit, record: FitRecord) -> Any:
    """A callback that records losses, norms, and whether a step changed anything."""
    from lightning.pytorch import Callback

    class Watcher(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.before = everything(trainer, module)

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            metrics = {n: float(trainer.callback_metrics[n]) for n in _RECORDED if n in trainer.callback_metrics}
            skipped = None if module.skipped is None else str(module.skipped)
            record.steps.append({**metrics, "skipped": skipped})
            if trainer.global_step == 1:
                record.first_step = _whole(module.tied_lora)
            record.untouched.append(everything(trainer, module) == self.before)
            if fit.drift is not None and fit.drift[:2] == (trainer.global_step, torch.distributed.get_rank()):
                flip_a_bit(module.tied_lora, fit.drift[2])
            if fit.checkpoint_at == trainer.global_step:
                trainer.save_checkpoint("checkpoint")

    return Watcher()


_RECORDED = ("reduced_train_loss", "grad_norm")


def _planted(cls: type, fit: Fit) -> Callable[..., Any]:
    """The model class, with the fit's poison added to the gradients after `training_step`."""

    class Planted(cls):  # type: ignore[misc,valid-type]
        def training_step(self, dataloader_iter: Any) -> Any:
            loss = super().training_step(dataloader_iter)
            position = (self.trainer.global_step + 1, torch.distributed.get_rank())
            if fit.poison is not None and fit.poison[:2] == position:
                parameter = dict(self.tied_lora.named_parameters())[fit.poison[2]]
                gradient = getattr(parameter, "main_grad", None)
                (parameter.grad if gradient is None else gradient).view(-1)[-1] = float("nan")
            return loss

    return Planted
