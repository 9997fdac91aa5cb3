# SPDX-License-Identifier: Apache-2.0
"""Pure maths, one process: codes of a weight, and the tensor that holds them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from nemo_tied_lora import ConfigError
from nemo_tied_lora.adapter.quantized import kernels
from nemo_tied_lora.adapter.quantized.kernels import Codes, dequantize, quantize, row_absmax
from nemo_tied_lora.adapter.quantized.quantized_weight import QuantizedWeight
from tests.harness.tiny_gpt import full_tensor

OUT, IN = 96, 256
FORMS: dict[str, dict[str, Any]] = {
    "nf4/64": {},
    "nf4/32": {"block_size": 32},
    "nf4/64 float32": {"statistics": "float32"},
    "nf4/64 double": {"double": True},
    "int8/row": {"kind": "int8"},
}
# The largest distance of neighbouring codes is 0.304 of an absmax, and half of it is the largest error; int8: 1 / 254. Then
# the value is rounded to bfloat16, or the absmax is.
LARGEST_ERROR = {"nf4": 0.153, "int8": 0.0042}


def weight(dtype: torch.dtype = torch.float32, name: str = "weight") -> torch.Tensor:
    return full_tensor(name, (OUT, IN)).to(dtype)


def held(dtype: torch.dtype = torch.float32, **options: Any) -> QuantizedWeight:
    return QuantizedWeight(quantize(weight(dtype), **options), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_each_element_is_within_half_a_step_of_its_weight(form: str, dtype: torch.dtype) -> None:
    codes = quantize(weight(dtype), **FORMS[form])
    assert codes.precision == form
    values, exact = dequantize(codes).double(), weight(dtype).double()
    scale = exact.view(-1, codes.block_size).abs().amax(1, keepdim=True)
    errors = (values - exact).view(-1, codes.block_size).abs() / scale
    assert errors.max() < LARGEST_ERROR[codes.kind] + (0.01 if form == "nf4/64 double" else 0.004)
    relative = ((values - exact).norm() / exact.norm()).item()
    assert relative < (0.01 if codes.kind == "int8" else 0.095)
    assert relative > 0.003  # it is not the weight itself


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_give_the_same_codes_and_leave_the_weight_alone(form: str) -> None:
    source = weight()
    first, second = quantize(source, **FORMS[form]), quantize(weight(), **FORMS[form])
    assert torch.equal(source, weight())
    assert tensors(first).keys() == tensors(second).keys()
    assert all(torch.equal(tensor, tensors(second)[name]) for name, tensor in tensors(first).items())
    other = quantize(weight(name="another"), **FORMS[form])
    assert not torch.equal(first.packed, other.packed)


def test_work_by_slabs_changes_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {form: quantize(weight(), **options) for form, options in FORMS.items()}
    values = {form: dequantize(codes) for form, codes in whole.items()}
    monkeypatch.setattr(kernels, "_SLAB", 5 * IN)  # does not divide the rows
    for form, options in FORMS.items():
        codes = quantize(weight(), **options)
        assert all(torch.equal(tensor, tensors(whole[form])[name]) for name, tensor in tensors(codes).items()), form
        assert torch.equal(dequantize(codes), values[form]), form


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_codes_of_a_shard_are_the_shard_of_the_codes_and_double_decodes_to_others(form: str, parts: int) -> None:
    options, whole = FORMS[form], quantize(weight(), **FORMS[form])
    more = {"absmax": row_absmax(weight())} if form == "int8/row" else {}
    for dim in (0, 1):
        shards = [quantize(part, **options, **more if dim else {}) for part in weight().chunk(parts, dim)]
        codes = torch.cat([shard.packed.view(shard.shape[0], -1) for shard in shards], dim)
        assert torch.equal(codes, whole.packed.view(OUT, -1))
        values = torch.cat([dequantize(shard) for shard in shards], dim)
        assert torch.equal(values, dequantize(whole)) is (form != "nf4/64 double")


def test_a_shard_of_a_row_needs_the_absmax_of_the_whole_row_in_int8() -> None:
    parts = [dequantize(quantize(part, "int8")) for part in weight().chunk(2, 1)]
    assert not torch.equal(torch.cat(parts, 1), dequantize(quantize(weight(), "int8")))


def test_an_absmax_in_bfloat16_loses_nothing_of_a_bfloat16_weight() -> None:
    small, exact = (quantize(weight(torch.bfloat16), statistics=dtype) for dtype in ("bfloat16", "float32"))
    assert torch.equal(dequantize(small), dequantize(exact))
    assert small.bytes_held < exact.bytes_held


def test_a_row_or_block_of_zeros_stays_zero() -> None:
    source = weight()
    source[3] = 0.0
    for options in FORMS.values():
        if not options.get("double"):
            assert not dequantize(quantize(source, **options))[3].any()


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        ("nf4/64", 4 + 16 / 64),
        ("nf4/32", 4 + 16 / 32),
        ("nf4/64 float32", 4 + 32 / 64),
        # 384 blocks: two blocks of 256 of them, and one offset.
        ("nf4/64 double", 4 + 8 / 64 + 8 * (2 * 4 + 4) / (OUT * IN)),
        ("int8/row", 8 + 32 / IN),
    ],
)
def test_bytes_held_are_those_of_the_tensors(form: str, bits: float) -> None:
    codes = held(torch.bfloat16, **FORMS[form])
    assert codes.bytes_held == pytest.approx(bits * OUT * IN / 8)
    assert codes.bytes_held == sum(tensor.nbytes for tensor in tensors(codes.codes).values())


PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward": lambda x, w: torch.matmul(x, w.t()),
    "strided x": lambda x, w: torch.matmul(x.transpose(0, 1), w.t()),
    "transpose": lambda x, w: torch.matmul(x, w.transpose(-2, -1)),
    "linear": lambda x, w: functional.linear(x, w),
    "linear with bias": lambda x, w: functional.linear(x, w, x.new_ones(OUT)),
    "one vector": lambda x, w: x[0, 0] @ w.t(),
    "backward": lambda x, w: (x @ w.t()) @ w,
    "a matrix": lambda x, w: x[0] @ w.t().t().t(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_products_have_the_bits_of_the_dequantised_weight(form: str, dtype: torch.dtype) -> None:
    codes, x = held(dtype, **FORMS[form]), full_tensor("x", (3, 2, IN)).to(dtype)
    plain = codes.dequantize()
    assert type(plain) is torch.Tensor
    assert plain.dtype == dtype
    for name, product in PRODUCTS.items():
        with torch.no_grad():
            assert torch.equal(product(x, codes), product(x, plain)), name
        with torch.inference_mode():
            assert torch.equal(product(x, codes), product(x, plain)), name
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for leaf, w in zip(leaves, (codes, plain), strict=True):
            product(leaf, w).square().sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad), name


def test_autocast_uses_the_bits_of_the_dequantised_weight() -> None:
    codes, x = held(), full_tensor("x", (3, 2, IN)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = functional.linear(x, codes)
        assert torch.equal(product, functional.linear(x, codes.dequantize()))
    assert product.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_module_moves_and_casts_its_codes_and_keeps_megatrons_attributes(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(held(dtype), requires_grad=False)
    module.weight.partition_dim = 1
    values = module.weight.dequantize()
    for moved in (module.to(torch.bfloat16), module.to("cpu"), module.float(), module.to(dtype)):
        assert isinstance(moved.weight, nn.Parameter)
        assert isinstance(moved.weight, QuantizedWeight)
        assert moved.weight.partition_dim == 1
        assert moved.weight.dtype == moved.weight.dequantize().dtype
    assert torch.equal(module.weight.dequantize(), values)
    meta = module.to("meta").weight
    assert (meta.device.type, meta.codes.packed.device.type) == ("meta", "meta")


def test_copies_hold_codes_of_their_own() -> None:
    parameter = nn.Parameter(held(), requires_grad=False)
    parameter.partition_dim = 0
    for twin in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert isinstance(twin, nn.Parameter)
        assert twin.partition_dim == 0
        assert torch.equal(twin.dequantize(), parameter.dequantize())
        assert twin.codes.packed.data_ptr() != parameter.codes.packed.data_ptr()


FORBIDDEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "aten.add": lambda w: w + 1,
    "aten.copy_": lambda w: w.copy_(weight()),
    "aten.cat": lambda w: torch.cat([w, w]),
    "aten.view": lambda w: w.view(-1),
    "aten.select": lambda w: w[0],
    "aten.mul_": lambda w: w.mul_(2),
}


@pytest.mark.parametrize("operation", FORBIDDEN)
def test_every_other_operation_raises_by_name(operation: str) -> None:
    with pytest.raises(
        NotImplementedError, match=rf"{operation}.*: not possible with a quantised weight, which can only"
    ):
        FORBIDDEN[operation](held())


def test_it_never_gets_a_gradient() -> None:
    parameter = nn.Parameter(held(), requires_grad=False)
    module = nn.Module()
    module.weight = parameter
    module.requires_grad_(False)
    for unfreeze in (lambda: module.requires_grad_(True), lambda: setattr(parameter, "requires_grad", True)):
        with pytest.raises(RuntimeError, match="a quantised weight is frozen: train an adapter"):
            unfreeze()
    assert parameter.requires_grad is False


def test_weights_are_loaded_before_they_are_quantised() -> None:
    module = nn.Linear(IN, OUT, bias=False)
    module.weight = nn.Parameter(held(), requires_grad=False)
    with pytest.raises(RuntimeError, match="not possible with a quantised weight"):
        module.load_state_dict({"weight": weight()})


def test_torch_compile_is_refused_by_name() -> None:
    module = nn.Linear(IN, OUT, bias=False)
    module.weight = nn.Parameter(held(), requires_grad=False)
    with pytest.raises(Exception, match=r"torch\.compile: not possible with a quantised base"):
        torch.compile(module, backend="eager")(torch.ones(2, IN))


def test_nf4_without_bitsandbytes_says_how_to_install_it_and_int8_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes; run: pip install 'nemo_tied_lora\[quantized\]'"):
        quantize(weight())
    dequantize(quantize(weight(), "int8"))


def tensors(codes: Codes) -> dict[str, torch.Tensor]:
    found = {name: getattr(codes, name) for name in ("packed", "absmax", "nested_absmax", "offset")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
