# SPDX-License-Identifier: Apache-2.0
"""Compares the logits of an nf4 base with a tied adapter with those of transformers and peft, in float32.

The adapter has random factors. It is exported, and peft loads it onto transformers' own nf4 base, made by the recipe of the
export's card: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"). Blocks keep their statistics in float32 on
both sides. The bound is 1e-4 of the largest logit. On a CPU that multiplies bfloat16 matrices, bitsandbytes would do so in
evaluation, which this program switches off.

    python benchmarks/quantised_logits.py --base runs/smollm2/base.nemo --transformers my-hf-folder
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

__all__ = ["main"]

_BOUND = 1e-4
_PROMPTS, _LENGTH = 2, 32


def main(argv: list[str]) -> int:
    """Prints the differences. Returns 1 if the quantised models differ by more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="FILE", help="the base's .nemo")
    parser.add_argument(
        "--transformers", required=True, metavar="FOLDER", help="the same model, as transformers saves it"
    )
    options = parser.parse_args(argv)
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    with tempfile.TemporaryDirectory() as folder:
        prompts, ours = _ours(options.base, Path(folder))
        differences = {
            name: _difference(options.transformers, name, Path(folder), prompts, ours) for name in ("nf4", "whole")
        }
    for name, value in differences.items():
        print(f"transformers + peft on a base in {name}: logits differ by {value:.2e} of the largest")
    return 0 if differences["nf4"] < _BOUND else 1


def _ours(base: str, folder: Path) -> tuple[Any, Any]:
    """(prompts, logits) of the nf4 base with an adapter, which is exported into `folder`/peft."""
    import torch

    from nemo_tied_lora import TiedLoraConfig, inject, save_adapter
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
    from nemo_tied_lora.conversion.to_peft_lora import write_hf_peft
    from nemo_tied_lora.nemo.generation import load_base, next_token_logits
    from nemo_tied_lora.planning.base_config import base_model_config
    from nemo_tied_lora.planning.composing.compose import compose_config

    words = [f"base={base}", "trainer.precision=32", "model.base_quantization={kind: nf4, statistics: float32}"]
    model: Any = load_base(compose_config("generate", words))
    adapter = inject(model._unwrap_model_list(), TiedLoraConfig(rank=8))
    generator = torch.Generator().manual_seed(7)
    state = adapter.full_state()
    adapter.load_full_state({n: torch.randn(t.shape, generator=generator).mul(0.05).to(t) for n, t in state.items()})
    save_adapter(adapter, folder / "adapter.nemo")
    write_hf_peft(read_adapter(folder / "adapter.nemo"), base_model_config(base), folder / "peft", None)
    prompts = torch.randint(0, model.tokenizer.vocab_size, (_PROMPTS, _LENGTH), generator=generator)
    return prompts, torch.stack(next_token_logits(model, prompts.tolist()))


def _difference(source: str, name: str, folder: Path, prompts: Any, ours: Any) -> float:
    """The largest difference to the logits of transformers and peft, as a share of the largest logit."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    recipe = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if name == "nf4" else None
    # This check of transformers 4.51 asks for Intel's extension on a CPU; bitsandbytes needs it no longer.
    with patch("transformers.integrations.validate_bnb_backend_availability"):
        base = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32, quantization_config=recipe)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, str(folder / "peft")).eval()(prompts).logits
    return float((ours[..., : logits.shape[-1]] - logits).abs().max() / logits.abs().max())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
