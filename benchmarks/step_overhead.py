# SPDX-License-Identifier: Apache-2.0
"""What an adapter adds to forward + backward of a frozen megatron-core GPT: NeMo's own LoRA layer beside Tied-LoRA.

Three models share one base's memory: the frozen base; the base with NeMo's ParallelLinearAdapter on all four linears,
each adapter's output added to its linear's; the base with Tied-LoRA `tl6` on the same linears. One round times a step of
each, one after the other; a ratio is taken within a round, and the median over the rounds is reported.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

# One thread, set before torch is imported, unless the caller says otherwise: two threads on a shared machine wait for
# each other, and the waiting is what one would measure.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from nemo_tied_lora.platform import prepare

prepare(nemo=True)

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import ParallelLinearAdapter
from torch import nn
from tqdm import tqdm

from nemo_tied_lora import TiedLoraConfig, inject

__all__ = ["Sizes", "adapter_flops", "frozen_flops", "main", "measure", "render_page", "summarize"]

VARIANTS = ("frozen", "nemo", "ours")
MOST_OF_NEMO = 0.80
MOST_OF_FLOOR = 1.3
FLOOR_BOUND_FROM_RANK = 32
PACKAGES = ("torch", "megatron-core", "nemo_toolkit", "numpy", "nemo_tied_lora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model of one step. A micro-batch is one sequence."""

    layers: int = 6
    hidden: int = 512
    ffn: int = 2048
    heads: int = 8
    sequence: int = 512
    vocab: int = 1024

    def linears(self) -> dict[str, tuple[int, int]]:
        """Target to (in, out); one of each per layer."""
        return {
            "linear_qkv": (self.hidden, 3 * self.hidden),
            "linear_proj": (self.hidden, self.hidden),
            "linear_fc1": (self.hidden, self.ffn),
            "linear_fc2": (self.ffn, self.hidden),
        }


def frozen_flops(sizes: Sizes) -> int:
    """FLOPs of the frozen model's matrix products, forward and backward. A multiplication and an addition are 2.

    A frozen linear and the output layer: 2 T in out forward and 2 T in out for the gradient of their input; there is
    none for the weight. Attention: scores and context, 2 T T hidden each, and two gradients of that cost for each;
    the causal half that is masked is computed as well.
    """
    tokens = sizes.sequence
    linears = sum(4 * tokens * width_in * width_out for width_in, width_out in sizes.linears().values())
    attention = 3 * (2 * 2 * tokens * tokens * sizes.hidden)
    return sizes.layers * (linears + attention) + 4 * tokens * sizes.hidden * sizes.vocab


def adapter_flops(sizes: Sizes, rank: int) -> int:
    """FLOPs of both thin products, forward and backward: 6 T r (in + out) a linear.

    h = A x and B h; grad_h and grad_B; grad_x and grad_A: 2 T r in or 2 T r out each.
    """
    return sizes.layers * sum(6 * sizes.sequence * rank * sum(widths) for widths in sizes.linears().values())


class _NemoLora:
    """In front of a Megatron linear's class: output + adapter(input), as NeMo's mixins in mcore_mixins.py do.

    NeMo's own attention mixin does not run on the megatron-core that NeMo is paired with: its forward lacks
    `inference_context`. The layer measured is NeMo's; only these lines around it are not.
    """

    nemo_lora: nn.Module

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        return output + self.nemo_lora(input_), bias


def build_model(sizes: Sizes, seed: int, base: GPTModel | None = None) -> GPTModel:
    """A frozen GPT in float32 whose backward reaches the embedding's output; it shares the memory of `base`'s weights."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    config = TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=sizes.vocab,
        max_sequence_length=sizes.sequence,
        share_embeddings_and_output_weights=False,
    )
    for parameter, shared in zip(
        model.parameters(), () if base is None else base.parameters(), strict=base is not None
    ):
        parameter.data = shared.data
    model.requires_grad_(False)
    # Without this the frozen model has no backward at all; with it all three have the same one.
    model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model.train()


def add_ours(model: GPTModel, rank: int, seed: int) -> None:
    """Tied-LoRA `tl6` on all four linears, every factor away from zero."""
    inject(model, TiedLoraConfig.preset("tl6", rank=rank, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.decoder.tied_lora.named_parameters():
        mean = 1.0 if name.endswith((".u", ".v")) else 0.0
        parameter.data.normal_(mean, 0.02, generator=generator)


def add_nemo(model: GPTModel, rank: int, ours: GPTModel) -> None:
    """NeMo's LoRA layer on all four linears, with the arguments of its LoraPEFTConfig and the update of `ours`."""
    for layer, adapted in zip(model.decoder.layers, ours.decoder.layers, strict=True):
        for path in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
            linear = layer.get_submodule(path)
            A, _, B = adapted.get_submodule(path).tied_lora.folded(torch.float32)
            linear.nemo_lora = _nemo_layer(linear, rank, model.config)
            linear.nemo_lora.linear_in.weight.data.copy_(A.detach())
            linear.nemo_lora.linear_out.weight.data.copy_(B.detach())
            linear.__class__ = type("Nemo" + type(linear).__name__, (_NemoLora, type(linear)), {})


def _nemo_layer(linear: nn.Module, rank: int, config: TransformerConfig) -> ParallelLinearAdapter:
    rows, columns = linear.weight.shape  # type: ignore[union-attr]
    return ParallelLinearAdapter(
        columns,
        rows,
        rank,
        activation="identity",
        norm_position=None,
        norm_type=None,
        column_init_method="normal",
        row_init_method="zero",
        gather_output=False,
        input_is_parallel=type(linear).__name__.startswith("Row"),
        dropout=0.0,
        model_parallel_config=copy.copy(config),
        alpha=rank,
    )


def build_variants(sizes: Sizes, rank: int, seed: int) -> dict[str, GPTModel]:
    """The three models; both adapters compute the same update."""
    frozen = build_model(sizes, seed)
    nemo, ours = build_model(sizes, seed, frozen), build_model(sizes, seed, frozen)
    add_ours(ours, rank, seed)
    add_nemo(nemo, rank, ours)
    return dict(zip(VARIANTS, (frozen, nemo, ours), strict=True))


def make_step(sizes: Sizes, seed: int) -> Callable[[GPTModel], torch.Tensor]:
    """Forward and backward on one fixed batch; returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(sizes.vocab, (1, sizes.sequence + 1), generator=generator)
    positions = torch.arange(sizes.sequence)[None]
    mask = torch.ones(sizes.sequence, sizes.sequence, dtype=torch.bool).triu(1)[None, None]

    def step(model: GPTModel) -> torch.Tensor:
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        loss.backward()
        return loss.detach()

    return step


def measure(
    models: dict[str, GPTModel],
    step: Callable[[GPTModel], torch.Tensor],
    *,
    repeats: int,
    warmup: int,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every step, model name to one value a round. The order within a round is drawn anew each time.

    Gradients are dropped between steps, outside the timing; so is garbage.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    order, shuffle = list(models), random.Random(seed)
    for round_ in range(warmup + repeats):
        shuffle.shuffle(order)
        for name in order:
            models[name].zero_grad(set_to_none=True)
            start = time.process_time()
            step(models[name])
            elapsed = time.process_time() - start
            if round_ >= warmup:
                seconds[name].append(elapsed)
        progress()
    return seconds


def summarize(seconds: dict[str, list[float]], sizes: Sizes, rank: int) -> dict[str, Any]:
    """One rank's entry of the JSON, from the seconds of each round."""
    ratios = {
        f"{name}_ratio": [a / f for a, f in zip(seconds[name], seconds["frozen"], strict=True)]
        for name in ("nemo", "ours")
    }
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    floor = 1 + adapter_flops(sizes, rank) / frozen_flops(sizes)
    series = {f"{name}_seconds": values for name, values in seconds.items()} | ratios
    return {
        "rank": rank,
        "frozen_seconds": statistics.median(seconds["frozen"]),
        **medians,
        "added_over_nemo": (medians["ours_ratio"] - 1) / (medians["nemo_ratio"] - 1),
        "floor_ratio": floor,
        "added_over_floor": (medians["ours_ratio"] - 1) / (floor - 1),
        "frozen_flops": frozen_flops(sizes),
        "adapter_flops": adapter_flops(sizes, rank),
        "spread": {
            name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
            for name, values in series.items()
        },
        "seconds": seconds,
    }


def benchmark(sizes: Sizes, ranks: Sequence[int], *, repeats: int, warmup: int, seed: int) -> dict[str, Any]:
    """The whole JSON."""
    _one_process()
    step = make_step(sizes, seed)
    entries = {}
    with tqdm(total=len(ranks) * (warmup + repeats), unit="round") as bar:
        for rank in ranks:
            bar.set_description(f"rank {rank}")
            models = build_variants(sizes, rank, seed)
            losses = {name: step(model).item() for name, model in models.items()}
            seconds = measure(models, step, repeats=repeats, warmup=warmup, seed=seed, progress=bar.update)
            entries[str(rank)] = {**summarize(seconds, sizes, rank), "losses": losses}
    return {
        "benchmark": "step_overhead",
        **_provenance(),
        "sizes": dataclasses.asdict(sizes),
        "targets": list(sizes.linears()),
        "preset": "tl6",
        "dtype": "float32",
        "seed": seed,
        "repeats": repeats,
        "warmup": warmup,
        "ranks": entries,
    }


def _one_process() -> None:
    """Megatron's groups for this very process as the only rank."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def _provenance() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "nemo_tied_lora", "benchmarks")),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
    }


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def main(arguments: Sequence[str] | None = None) -> None:
    pass


if __name__ == "__main__":
    main()
