# SPDX-License-Identifier: Apache-2.0
"""The README.md of an export for peft: how to load it, on the base that it was trained on. Runs no model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from nemo_tied_lora.conversion.to_peft_lora import write_hf_peft
from tests.harness.random_adapters import LLAMA, random_adapter

NF4 = 'load_in_4bit=True, bnb_4bit_quant_type="nf4"'


def test_the_model_card_shows_how_to_load_it(tmp_path: Path) -> None:
    folder = write_hf_peft(random_adapter(LLAMA, preset="tl6"), LLAMA, tmp_path / "peft", "my/base")
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "my/base"
    assert front["library_name"] == "peft"
    assert 'AutoModelForCausalLM.from_pretrained("my/base")' in card
    assert "| rank | 3 |" in card
    assert "BitsAndBytesConfig" not in card


@pytest.mark.parametrize(
    ("precision", "dtype", "recipe", "base"),
    [
        ("nf4/64", "float32", f"BitsAndBytesConfig({NF4})", "torch.float32  # of a base in float32"),
        ("nf4/64", None, f"BitsAndBytesConfig({NF4})", "torch.float32  # the training's dtype is not recorded"),
        ("nf4/64", "bfloat16", f"BitsAndBytesConfig({NF4}, bnb_4bit_compute_dtype=torch.bfloat16)", "torch.bfloat16"),
        ("nf4/64 double", "float32", f"BitsAndBytesConfig({NF4}, bnb_4bit_use_double_quant=True)", "torch.float32"),
    ],
)
def test_the_model_card_begins_with_the_recipe_of_the_trainings_base(
    tmp_path: Path, precision: str, dtype: str | None, recipe: str, base: str
) -> None:
    file = random_adapter(LLAMA, preset="tl6")
    file.yaml.update({"base_precision": precision} | ({"base_dtype": dtype} if dtype else {}))
    card = (write_hf_peft(file, LLAMA, tmp_path / "peft", "my/base") / "README.md").read_text()
    [snippet] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)  # no other one, which would load the plain base
    assert f"recipe = {recipe}\n" in snippet
    assert f"dtype = {base}" in snippet
    assert 'from_pretrained("my/base", torch_dtype=dtype, quantization_config=recipe)' in snippet
    compile(snippet, "card", "exec")
    assert f"| precision of that base | {precision} |" in card
    assert ("| dtype of its weights |" in card) == (dtype is not None)


@pytest.mark.parametrize(
    ("precision", "part"),
    [
        ("nf4/128", "transformers has blocks of\n64 alone"),
        ("int8/row", "its 8-bit layers round the activations too"),
    ],
)
def test_the_model_card_says_that_transformers_has_no_such_base(tmp_path: Path, precision: str, part: str) -> None:
    file = random_adapter(LLAMA, preset="tl6")
    file.yaml["base_precision"] = precision
    card = (write_hf_peft(file, LLAMA, tmp_path / "peft", "my/base") / "README.md").read_text()
    assert f"| precision of that base | {precision} |" in card
    assert part in card
    assert "BitsAndBytesConfig" not in card
