# SPDX-License-Identifier: Apache-2.0
"""Quantises the linears of a Megatron model's decoder, one at a time, before an adapter is injected."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nemo_tied_lora.adapter.agreement import exchange, raise_together
from nemo_tied_lora.adapter.experts import group_of, is_routed
from nemo_tied_lora.adapter.quantized.decoder_linears import DecoderLinear, find_decoder_linears, model_bodies
from nemo_tied_lora.adapter.quantized.guards import device_problems, refuse_loading, width_problems
from nemo_tied_lora.adapter.quantized.kernels import dequantize, quantize, row_absmax
from nemo_tied_lora.adapter.quantized.options import option_problems
from nemo_tied_lora.adapter.quantized.quantized_weight import QuantizedWeight
from nemo_tied_lora.adapter.weight_checksums import keep_checksums
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.platform.devices import collective_device

__all__ = ["QuantizedBase", "base_precision", "leave_to_ranks", "precision_facts", "quantize_base"]

_PRECISION = "base_precision"  # the attribute of a GPTModel that says what its linears were quantised to


@dataclass(frozen=True, kw_only=True)
class QuantizedBase:
    """What `quantize_base` has done on this rank."""

    precision: str
    """As `base_precision` returns it, such as "nf4/64"."""
    linears: tuple[str, ...]
    """The quantised linears, such as "layers.3.linear_qkv"; layers are numbered globally from 0."""
    num_weights: int
    """Elements of their weights on this rank."""
    bytes_before: int
    bytes_after: int
    dtype: str
    """Of the weights before."""

    @property
    def bits_per_weight(self) -> float:
        """Bits that this rank holds for each element of a quantised weight. 0 if it has none."""
        return 8 * self.bytes_after / self.num_weights if self.num_weights else 0.0

    def __str__(self) -> str:
        """One line, such as "nf4/64: 2 linears of the decoder (1 linear_proj, 1 linear_qkv), 3.2 MB in bfloat16 -> 0.9 MB,
        4.25 bits a weight"."""
        counts = Counter(group_of(name.split(".", 2)[2]) for name in self.linears)
        kinds = ", ".join(f"{count} {group}" for group, count in counts.items())
        return (
            f"{self.precision}: {len(self.linears)} linears of the decoder ({kinds}), {self.bytes_before / 1e6:.1f} MB in "
            f"{self.dtype} -> {self.bytes_after / 1e6:.1f} MB, {self.bits_per_weight:.2f} bits a weight"
        )


def quantize_base(
    model: nn.Module | Sequence[nn.Module],
    kind: str = "nf4",
    *,
    block_size: int = 64,
    double: bool = False,
    statistics: str = "bfloat16",
    device: torch.device | str | None = None,
) -> QuantizedBase:
    """Quantises the base's linears (linear_qkv, linear_proj, linear_fc1, linear_fc2, those of experts too) in place.

    Embedding, output layer, norms, router and biases stay. Each old weight is freed before the next one is quantised.

    All ranks of the job must call this together, after the weights are loaded, before `inject` and before the model is
    wrapped in Megatron's DDP. What it refuses on one rank raises on all, and changes no model.

    Args:
        model: one Megatron module (a GPTModel, wrapped or not), or the list of a stage's chunks.
        kind: "nf4" (4 bits by blocks) or "int8" (8 bits by rows).
        block_size: of nf4: elements with one absmax. The in-features of every linear on a rank are a multiple of it.
        double: of nf4: quantise the absmax too. Saves about 0.12 bits a weight. Then layouts differ: tensor-parallel
            shards decode to slightly other values than the whole weight.
        statistics: of nf4: the dtype of the absmax, "bfloat16" or "float32". For bfloat16 weights they are the same
            numbers. transformers keeps float32.
        device: where the codes go, as "cuda". Each weight moves there alone, before it is quantised; so a base on the CPU
            needs room for its codes on the GPU, not for itself. Move the rest of the model afterwards. None: the weight's.

    Returns:
        What was done on this rank.

    Raises:
        ConfigError: an option is unknown, bitsandbytes is missing, or the model has something that cannot be quantised
            or used so. Lists all problems together, the same on every rank.
        RuntimeError: the model has an adapter or is quantised already; or a weight could not be quantised on some rank.
            Only then are some linears quantised, and the base must be loaded again.
    """
    options = {"kind": kind, "block_size": block_size, "double": double, "statistics": statistics}
    failure: Exception | None = None
    found = _Findings(failed=True)
    linears: list[DecoderLinear] = []
    try:
        problems = option_problems(kind, block_size=block_size, double=double, statistics=statistics)
        problems += device_problems(device)
        problems.raise_if_any()
        bodies, linears, more = _scan(model)
        _try_out(options, device or (linears[0].module.weight.device if linears else None))
        found = _Findings(options=options, problems=more, widths=_widths(linears), num_linears=len(linears))
    except Exception as error:
        failure = error
    everyone = exchange(found)
    if not any(rank.failed for rank in everyone):
        failure = _disagreement(everyone)
    raise_together("quantize_base", failure)
    for body in bodies:
        inside = set(body.modules())
        keep_checksums(body, [linear.module.weight for linear in linears if linear.module in inside])
    report = _quantize_all(linears, options, device)
    precision = next(filter(None, exchange(report.precision)))  # a stage may have no linears
    for body in bodies:
        setattr(body, _PRECISION, precision)
        body.register_load_state_dict_pre_hook(refuse_loading)
    for chunk in {id(module): module for module in (*_chunks(model), *bodies)}.values():
        leave_to_ranks(chunk)
    return replace(report, precision=precision)


def leave_to_ranks(model: nn.Module) -> None:
    """Makes torch's DDP, if it wraps this very module, leave the codes alone: each rank has made the same ones.

    DDP would broadcast every parameter of rank 0, and codes have no memory of a weight to write into.
    """
    codes = [name for name, weight in model.named_parameters() if isinstance(weight, QuantizedWeight)]
    known = [name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", ()) if name not in codes]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*known, *codes])


def base_precision(model: nn.Module | Sequence[nn.Module]) -> str:
    """What the linears of a model's decoder are held in, the same on every rank.

    Returns:
        "nf4/64" (64 elements in a block), "nf4/64 double", "nf4/64 float32" (the absmax's dtype) or "int8/row"; for a
        base that is not quantised the dtype, such as "bfloat16".

    Raises:
        ConfigError: the model has no GPTModel.
    """
    body = model_bodies(model)[0]
    precision: str | None = getattr(body, _PRECISION, None)
    return precision or str(body.config.params_dtype).removeprefix("torch.")


def precision_facts(model: nn.Module | Sequence[nn.Module]) -> dict[str, str]:
    """What an adapter's file records: `base_precision`; of a quantised base also `base_dtype`, that of its products.

    It was the dtype of the weights before, too, and is that of all that is not quantised.
    """
    body = model_bodies(model)[0]
    facts = {"base_precision": base_precision(body)}
    dtype = str(body.config.params_dtype).removeprefix("torch.")
    return facts | ({"base_dtype": dtype} if hasattr(body, _PRECISION) else {})


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """What one rank tells the others before anything is changed. failed: whether it failed to find anything."""

    options: Any = None
    problems: Sequence[str] = ()
    widths: Collection[tuple[str, int, bool]] = ()
    """As `width_problems` takes them."""
    num_linears: int = 0
    failed: bool = False


def _scan(model: nn.Module | Sequence[nn.Module]) -> tuple[list[Any], list[DecoderLinear], list[str]]:
    """The GPTModels, their linears, and one line per problem. Changes nothing."""
    bodies = model_bodies(model)
    if any(hasattr(body.decoder, "tied_lora") for body in bodies):
        raise RuntimeError("model: it has an adapter; call quantize_base before inject, or adapter.remove() first")
    known = next((getattr(body, _PRECISION) for body in bodies if hasattr(body, _PRECISION)), None)
    if known is not None:
        raise RuntimeError(f"model: its base is {known} already; load the base again to quantise it in another way")
    scans = [find_decoder_linears(chunk, body) for chunk, body in zip(_chunks(model), bodies, strict=True)]
    linears = list(itertools.chain.from_iterable(scan[0] for scan in scans))
    return bodies, linears, [problem for scan in scans for problem in scan[1]]


def _chunks(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    return [model] if isinstance(model, nn.Module) else list(model)


def _widths(linears: Iterable[DecoderLinear]) -> set[tuple[str, int, bool]]:
    """(kind of linear, in-features on this rank, whether the tensor-parallel size divides them), each once."""
    return {
        (linear.group, linear.module.weight.shape[1], linear.kind == "row" and not is_routed(linear.short_name))
        for linear in linears
    }


def _try_out(options: dict[str, Any], device: torch.device | str | None) -> None:
    """Quantises a few numbers, to see that the kernels work on this machine and device."""
    block = options["block_size"] if options["kind"] == "nf4" else 64
    numbers = torch.linspace(-1, 1, 2 * block, device=device).view(2, block)
    error = (dequantize(quantize(numbers, **options)) - numbers).abs().max().item()
    if not error < 0.25:
        where = numbers.device.type
        raise RuntimeError(f"kind={options['kind']}: the kernels compute wrong values on this {where} (error {error})")


def _disagreement(everyone: Sequence[_Findings]) -> ConfigError | None:
    """The problems of all ranks, the same on each."""
    problems = sorted({problem for rank in everyone for problem in rank.problems})
    options = everyone[0].options
    if options["kind"] == "nf4":
        widths = {width for rank in everyone for width in rank.widths}
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        problems += width_problems(widths, options["block_size"], tp_size)
    for number, rank in enumerate(everyone):
        if rank.options != options:
            problems.append(
                f"quantize_base: rank {number} has other options than rank 0; pass the same ones on all ranks"
            )
            break
    if not problems and not any(rank.num_linears for rank in everyone):
        problems.append("model: its decoder has no linear_qkv, linear_proj, linear_fc1 or linear_fc2 to quantise")
    return ConfigError(problems) if problems else None


def _quantize_all(
    linears: Sequence[DecoderLinear], options: dict[str, Any], device: torch.device | str | None
) -> QuantizedBase:
    whole_rows = _absmax_of_split_rows(linears) if options["kind"] == "int8" else {}
    names, dtypes, precisions = [], set(), set()
    elements = before = after = 0
    failure: Exception | None = None
    try:
        for linear in linears:
            old = linear.module.weight
            elements, before = elements + old.numel(), before + old.numel() * old.element_size()
            dtypes.add(str(old.dtype).removeprefix("torch."))
            new = _quantized(old, options, device, whole_rows.get(linear.module))
            linear.module.weight = new
            del old
            names.append(linear.name)
            after += new.bytes_held
            precisions.add(new.codes.precision)
    except Exception as error:
        place = f"{linears[len(names)].name}: {type(error).__name__}: {error}"
        failure = RuntimeError(f"{place}; a part of the base is quantised: load it again")
    broken = next((f for f in exchange(None if failure is None else str(failure)) if f is not None), None)
    if broken is not None:
        raise failure or RuntimeError(f"quantize_base: another rank failed: {broken}")
    return QuantizedBase(
        precision=next(iter(precisions), ""),
        linears=tuple(names),
        num_weights=elements,
        bytes_before=before,
        bytes_after=after,
        dtype=", ".join(sorted(dtypes)),
    )


def _quantized(
    old: nn.Parameter, options: dict[str, Any], device: torch.device | str | None, absmax: torch.Tensor | None
) -> Any:
    """A frozen parameter with the codes of another one, and the attributes that Megatron has set on that."""
    weight = old.detach() if device is None else old.detach().to(device)
    absmax = None if absmax is None else absmax.to(weight.device)
    codes = quantize(weight, **options, absmax=absmax)
    new = nn.Parameter(QuantizedWeight(codes, old.dtype), requires_grad=False)
    for name, value in vars(old).items():
        setattr(new, name, value)
    return new


def _absmax_of_split_rows(linears: Sequence[DecoderLinear]) -> dict[nn.Module, torch.Tensor]:
    """The absmax of whole rows, (out,) float32, for linears whose rows are split over tensor-parallel ranks.

    So the codes of a shard are the shard of the whole weight's codes. One all-reduce per group of ranks; each rank has the
    same linears in the same order.
    """
    found: dict[nn.Module, torch.Tensor] = {}
    for routed in (False, True):
        split = [
            linear.module for linear in linears if linear.kind == "row" and is_routed(linear.short_name) is routed
        ]
        group = (
            parallel_state.get_expert_tensor_parallel_group()
            if routed
            else parallel_state.get_tensor_model_parallel_group()
        )
        if group.size() == 1 or not split:
            continue
        own = [row_absmax(module.weight) for module in split]
        joined = torch.cat(own).to(collective_device())
        torch.distributed.all_reduce(joined, op=torch.distributed.ReduceOp.MAX, group=group)
        found |= dict(zip(split, joined.split([part.numel() for part in own]), strict=True))
    return found
