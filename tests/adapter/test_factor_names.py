# SPDX-License-Identifier: Apache-2.0
"""Pure text: the names of an adapter's tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemo_tied_lora import TiedLoraConfig
from nemo_tied_lora.adapter.factor_names import FactorName, each_linear, expected_shapes, names_of_linear
from nemo_tied_lora.adapter.shapes import LinearShape, mlp_linears

SHAPES = {
    "linear_proj": LinearShape("row", 6, 5, 1, (0, 1)),
    **{f"experts.{linear}": shape for linear, shape in mlp_linears(5, 7, True, [1], num_experts=2).items()},
}


@pytest.mark.parametrize(
    ("text", "name", "group", "stacked"),
    [
        ("linear_qkv.A", FactorName(None, "linear_qkv", "A"), "linear_qkv", "linear_qkv.A"),
        ("layers.17.linear_qkv.u", FactorName(17, "linear_qkv", "u"), "linear_qkv", "linear_qkv.u"),
        ("shared_experts.linear_fc2.B", FactorName(None, "shared_experts.linear_fc2", "B"), *2 * [""]),
        ("experts.5.linear_fc1.A", FactorName(None, "experts.5.linear_fc1", "A"), "experts.linear_fc1", ""),
        ("experts.linear_fc1.A", FactorName(None, "experts.linear_fc1", "A"), "experts.linear_fc1", ""),
        ("layers.7.experts.5.linear_fc1.u", FactorName(7, "experts.5.linear_fc1", "u"), "experts.linear_fc1", ""),
    ],
)
def test_a_name_is_parsed_and_printed_back(text: str, name: FactorName, group: str, stacked: str) -> None:
    assert FactorName.parse(text) == name
    assert str(name) == text
    assert name.group == (group or name.linear)
    assert name.stacked == (stacked or f"{name.group}.{name.factor}")


@pytest.mark.parametrize("experts", ["per_expert", "tied"])
def test_the_names_of_every_linear_are_the_names_of_the_state(experts: str) -> None:
    config = TiedLoraConfig(rank=3, tied=("A",), experts=experts, targets=("linear_proj", "mlp"))
    state = expected_shapes(config, SHAPES)
    used = {
        str(n) for layer, linear, _ in each_linear(SHAPES) for n in names_of_linear(config, layer, linear).values()
    }
    assert used == set(state)
    assert len(list(each_linear(SHAPES))) == 2 + 2 * 2
    assert state["experts.0.linear_fc1.A" if experts == "per_expert" else "experts.linear_fc1.A"] == (3, 5)
    assert state["layers.1.experts.1.linear_fc1.B"] == (14, 3)


def test_a_shape_is_stored_under_the_files_keys_and_read_back() -> None:
    for shape in SHAPES.values():
        stored = shape.to_dict()
        assert list(stored) == ["kind", "in_features", "out_features", "blocks", "layers", "num_experts"]
        assert LinearShape.from_dict(stored) == shape
    with pytest.raises(TypeError):
        LinearShape.from_dict({**stored, "depth": 3})
    with pytest.raises(KeyError):
        LinearShape.from_dict({key: value for key, value in stored.items() if key != "blocks"})


def test_shapes_names_and_file_sizes_need_no_torch() -> None:
    code = (
        "import sys, nemo_tied_lora.adapter.factor_names, nemo_tied_lora.checkpoint.nemo_adapter_packing;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
