# SPDX-License-Identifier: Apache-2.0
"""Short fine-tuning runs on a quantised base in one process, and what loads their adapters. `main` prints a JSON object last."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.harness.command_runs import PRETRAIN
from tests.nemo import checkpoint_scenarios
from tests.nemo.checkpoint_runs import refusal, run, same, state, stopped

__all__ = ["NF4", "ON_WIDE", "SCENARIOS", "main"]

WIDE, DEQUANTISED = "wide.nemo", "dequantised.nemo"
ON_WIDE, NF4 = f"model.restore_from_path={WIDE}", "model.base_quantization=nf4"
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


def made() -> dict[str, bool]:
    """A base whose inputs are whole blocks on two tensor-parallel ranks too, and one with the weights that its codes stand for."""
    from nemo_tied_lora.nemo.restored_base import dequantise
    from nemo_tied_lora.nemo.training_runs import pretrain
    from nemo_tied_lora.planning.composing.compose import compose_config

    sizes = ["model.hidden_size=128", "model.ffn_hidden_size=128", "trainer.max_steps=1", "model.num_layers=2"]
    pretrain(compose_config("pretrain", [*PRETRAIN, *sizes, f"output={WIDE}", "name=wide"]))
    model = loaded(WIDE, "nf4")
    chunks = model._unwrap_model_list()
    held = [module for module in chunks[0].modules() if hasattr(getattr(module, "weight", None), "bytes_held")]
    dequantise(chunks)
    model.save_to(DEQUANTISED)
    return {"every linear of the decoder": len(held) == 4 * 2 and "8 linears" in str(model.quantized_base)}


def straight() -> dict[str, bool]:
    """A run on codes has the losses, the gradient norms and the adapter of a run on the weights that they stand for."""
    found = run("straight", ON_WIDE, NF4)
    expected = run("expected", f"model.restore_from_path={DEQUANTISED}")
    plain = run("plain", ON_WIDE)
    whole = plain["peak_memory_bytes"] is not None
    return {
        "losses and norms": curve(found) == curve(expected),
        "adapter": same(state(Path("straight/adapter.nemo")), state(Path("expected/adapter.nemo"))),
        "another run without codes": curve(plain) != curve(expected) and whole,
        "record": found["base_precision"] == "nf4/64" and plain["base_precision"] == "float32",
        "in the adapter": recorded("straight") == "nf4/64" and recorded("plain") == "float32",
        "the base's own fingerprint": fingerprint("straight") == fingerprint("plain") != fingerprint("expected"),
    }


def resumed() -> dict[str, bool]:
    """A resumed run quantises the base again and continues bit for bit; another quantisation is refused."""
    stopped("resumed", ON_WIDE, NF4)
    [last] = Path("resumed/checkpoints").glob("*-last")
    size = sum(file.stat().st_size for file in last.iterdir())
    other = refusal("resumed", ON_WIDE, "model.base_quantization=int8")
    none = refusal("resumed", ON_WIDE)
    settings = Path("resumed/checkpoints/settings.json")
    settings.rename("settings.json")
    by_itself = refusal("resumed", ON_WIDE, "model.base_quantization=int8")
    Path("settings.json").rename(settings)
    found = run("resumed", ON_WIDE, "model.base_quantization={kind: nf4, block_size: 64}")
    from nemo_tied_lora.commands.main import main as command

    command(["convert-checkpoint", "checkpoint=resumed", "output=converted.nemo"])
    return {
        "losses and norms": curve(found) == curve(json.loads(Path("straight/metrics.json").read_text())),
        "adapter": same(state(Path("resumed/adapter.nemo")), state(Path("straight/adapter.nemo"))),
        "no base in it": size < 3 * 4 * found["trained_parameters"] + 100_000,
        "refused": "model.base_quantization='int8/row': the checkpoints in" in other and "with 'nf4/64'" in other,
        "refused without the key": "model.base_quantization=None: the checkpoints in" in none,
        "by the checkpoint": "model.base_quantization: 'nf4/64' in the checkpoint, 'int8/row' in this" in by_itself,
        "converted": recorded("converted.nemo") == "nf4/64",
    }


def o2() -> dict[str, bool]:
    """int8 under O2, and nf4 with the distributed optimizer: the old base's weights are bfloat16 there."""
    half = ["model.megatron_amp_O2=true", "trainer.precision=bf16", "trainer.max_steps=2", ON_WIDE]
    int8 = run("o2", *half, "model.base_quantization=int8")
    double = "model.base_quantization={kind: nf4, double: true}"
    nf4 = run("spread", *half, double, "model.optim.name=mcore_distributed_optim")
    return {
        "int8": all(0 < step["loss"] < 10 and step["grad_norm"] > 0 for step in int8["steps"]),
        "nf4": all(0 < step["loss"] < 10 for step in nf4["steps"]) and nf4["steps"][0] != nf4["steps"][1],
        "records": (recorded("o2"), recorded("spread")) == ("int8/row", "nf4/64 double"),
    }


def served() -> dict[str, bool]:
    """An adapter meets its own precision in silence; on another one a note says by how much the logits or weights differ."""
    from nemo_tied_lora.nemo.base_precision_note import LogitsDifference, as_if_quantised
    from nemo_tied_lora.nemo.generation import next_token_logits
    from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization

    model = loaded(WIDE, None)
    on_plain = note(model, "straight")
    silent = note(model, "plain")
    model.load_adapters("straight/adapter.nemo")
    plain = next_token_logits(model, [PROMPT])
    as_if = {}
    for kind in ("nf4", "int8"):
        with as_if_quantised(model._unwrap_model_list(), BaseQuantization(kind=kind)):
            as_if[kind] = next_token_logits(model, [PROMPT])
    restored = torch.equal(next_token_logits(model, [PROMPT])[0], plain[0])
    model.remove_adapter()
    real, on_codes = {}, []
    for kind in ("nf4", "int8"):
        model = loaded(WIDE, kind, "straight/adapter.nemo", "plain/adapter.nemo")
        on_codes += [note(model, "straight"), note(model, "plain")]
        model.load_adapters("straight/adapter.nemo")
        real[kind] = next_token_logits(model, [PROMPT])
    expected = str(LogitsDifference.between(plain, real["nf4"]))
    percent = re.search(r"the weights of a layer differ by (\d+\.\d+)%", on_codes[1])
    return {
        "as if: the bits of a quantised base": all(torch.equal(as_if[k][0], real[k][0]) for k in real),
        "as if: differs": not torch.equal(plain[0], real["nf4"][0])
        and not torch.equal(real["int8"][0], real["nf4"][0]),
        "as if: the weights are back": restored,
        "own precision": silent == "" and on_codes[0] == "",
        "on a plain base": f"logits of 8 prompt tokens differ {expected}; model.base_quantization=nf4 gives"
        in on_plain,
        "trained on plain": percent is not None and 7 < float(percent[1]) < 11 and "=null gives" in on_codes[1],
        "on other codes": "in nf4/64, and meets one in int8/row: the weights of a layer differ by" in on_codes[2],
    }


def merged() -> dict[str, bool]:
    """The check of a merge says how far the merged model is from the quantised base and adapter of the training."""
    from nemo_tied_lora.commands.main import main as command
    from nemo_tied_lora.conversion.merging.verify_merge import compare_with_merged
    from nemo_tied_lora.nemo.base_precision_note import LogitsDifference
    from nemo_tied_lora.planning.composing.compose import compose_config

    found: dict[str, Any] = {}
    for names, weights in ((("straight",), (1.0,)), (("straight", "plain"), (0.5, 0.25)), (("plain",), (1.0,))):
        paths = [f"{name}/adapter.nemo" for name in names]
        words = [f"base={WIDE}", "output=merged.nemo", f"adapters=[{','.join(paths)}]", f"weights={list(weights)}"]
        with contextlib.redirect_stdout(io.StringIO()) as unmeasured:
            assert command(["merge", *words, "verify=false"]) == 0
        cfg = compose_config("merge", [*words, "trainer.accelerator=cpu"])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            pairs = list(zip(paths, weights, strict=True))
            compare_with_merged(cfg, pairs, "merged.nemo", "merged.check.json", "torch.float32")
        facts = json.loads(Path("merged.check.json").read_text())
        found["+".join(names)] = (facts, unmeasured.getvalue(), printed.getvalue())
    one, two, none = (found[key] for key in ("straight", "straight+plain", "plain"))
    nf4 = one[0]["against_training"]["nf4/64"]
    alone, apart = (
        nf4["base_alone"],
        LogitsDifference.between(*(bare_logits(kind, one[0]["prompts"]) for kind in (None, "nf4"))),
    )
    return {
        "exact merge": one[0]["relative"] < 1e-4,
        "measured": 1e-3 < nf4["relative"] < 0.5 and nf4["positions"] == one[0]["positions"],
        "said": f"({nf4['relative']:.2%})" in one[2] and "note: trained on a base in nf4/64: the merged" in one[2],
        "the base's own part": alone == apart.as_dict() and alone["relative"] > 1e-3 and alone != nf4,
        "the base's own part, said": f"without the adapter, the base's differ from that base's {apart}" in one[2],
        "said without the check": "note: straight/adapter.nemo: was trained on a base in nf4/64; verify=true"
        in one[1],
        "two adapters": list(two[0]["against_training"]) == ["nf4/64"],
        "silent": none[0]["against_training"] == {} and "note:" not in none[1] + none[2],
    }


def exported() -> dict[str, bool]:
    """transformers and peft, under the recipe of the export's card, give the logits of our quantised base and adapter."""
    import peft
    import transformers

    from nemo_tied_lora import TiedLoraConfig, inject, save_adapter
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
    from nemo_tied_lora.conversion.from_hf_base import import_hf_base
    from nemo_tied_lora.conversion.to_peft_lora import write_hf_peft
    from nemo_tied_lora.nemo.generation import next_token_logits
    from nemo_tied_lora.planning.base_config import base_model_config
    from nemo_tied_lora.planning.composing.compose import compose_config
    from tests.harness.hugging_face_models import save_model, tokens

    save_model("qwen2", Path("qwen2"), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    words = ["from=hf-base", "path=qwen2", "output=qwen2.nemo", "verify=false"]
    import_hf_base(compose_config("import", words))
    model = loaded("qwen2.nemo", "{kind: nf4, statistics: float32}")
    adapter = inject(model._unwrap_model_list(), TiedLoraConfig(rank=3))
    generator = torch.Generator().manual_seed(5)
    adapter.load_full_state(
        {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in adapter.full_state().items()}
    )
    save_adapter(adapter, "qwen2_adapter.nemo")
    batch = tokens("qwen2")
    ours = torch.stack(next_token_logits(model, batch.tolist()))
    folder = write_hf_peft(read_adapter("qwen2_adapter.nemo"), base_model_config("qwen2.nemo"), Path("peft"), None)
    card = (folder / "README.md").read_text()
    recipe = re.search(r"recipe = (BitsAndBytesConfig\(.*\))", card)
    theirs = {}
    for name in ("plain", "quantised"):
        options = {"quantization_config": eval(f"transformers.{recipe[1]}")} if name == "quantised" else {}
        # This check of transformers 4.51 asks for Intel's extension on a CPU; bitsandbytes needs it no longer.
        with patch("transformers.integrations.validate_bnb_backend_availability"):
            base = transformers.AutoModelForCausalLM.from_pretrained("qwen2", torch_dtype=torch.float32, **options)
        for module in base.modules():  # in evaluation, some CPUs would multiply in bfloat16
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        with torch.no_grad():
            logits = peft.PeftModel.from_pretrained(base, str(folder)).eval()(batch).logits
        theirs[name] = float((ours[..., : logits.shape[-1]] - logits).abs().max() / logits.abs().max())
    return {
        "the recipe of the card": recipe is not None and "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit" in recipe[0],
        "the precision in the card": "| precision of that base | nf4/64 float32 |" in card,
        "the dtype in the recipe": "dtype = torch.float32  # of a base in float32\n" in card,
        "same logits": theirs["quantised"] < 1e-4,
        "other logits without it": theirs["plain"] > 1e-2,
    }


def loaded(base: str, kind: str | None, *adapters: str) -> Any:
    """The base as `generate` loads it."""
    from nemo_tied_lora.nemo.generation import load_base
    from nemo_tied_lora.planning.composing.compose import compose_config

    words = [f"base={base}", "trainer.precision=32", "trainer.accelerator=cpu"]
    cfg = compose_config("generate", [*words, f"model.base_quantization={kind or 'null'}"])
    cfg.adapter = list(adapters)
    return load_base(cfg)


def bare_logits(kind: str | None, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Those of the base without an adapter."""
    from nemo_tied_lora.nemo.generation import next_token_logits

    return next_token_logits(loaded(WIDE, kind), prompts)


def note(model: Any, name: str) -> str:
    """What is printed when the adapter of a run meets the model."""
    from nemo_tied_lora.nemo.base_precision_note import say_precision

    path = f"{name}/adapter.nemo"
    model.load_adapters(path)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        say_precision(model, path, PROMPT)
    model.remove_adapter()
    return printed.getvalue()


def curve(metrics: dict[str, Any]) -> list[tuple[float, float]]:
    return [(step["loss"], step["grad_norm"]) for step in metrics["steps"]]


def recorded(name: str) -> str | None:
    from nemo_tied_lora.planning.nemo_model_config import recorded_precision

    return recorded_precision(name if name.endswith(".nemo") else f"{name}/adapter.nemo")


def fingerprint(name: str) -> str:
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter

    return str(read_adapter(f"{name}/adapter.nemo").yaml["base"]["fingerprint"]["value"])


SCENARIOS = {function.__name__: function for function in (made, straight, resumed, o2, served, merged, exported)}


def main(argv: list[str]) -> None:
    """Runs the scenarios in the folder `argv[0]`, in order: they use each other's files."""
    checkpoint_scenarios.main(argv, SCENARIOS)
