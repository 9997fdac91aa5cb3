# SPDX-License-Identifier: Apache-2.0
"""Measures the resident memory of a quantised base on the CPU, and compares it with `tied-lora plan`.

Each measurement is a process of its own. It builds the decoder of a model with random weights in bfloat16, quantises it,
injects an adapter and runs one forward pass. The kernel's count of resident pages is read in between, after the allocator
has returned what is free. A base takes the same memory whatever its weights are.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapted_models import build_llama
from command_line import between_marks, count, write
from provenance import provenance

__all__ = ["main"]

# LLaMA 3.2 1B's sizes: https://huggingface.co/meta-llama/Llama-3.2-1B
ONE_BILLION = {
    "num_layers": 16,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "override_vocab_size": 128256,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("smollm2", {}),
    "1B": ("smollm2", ONE_BILLION),
}
SETTINGS = {"bf16": "null", "nf4": "nf4", "nf4 double": "{kind: nf4, double: true}", "int8": "int8"}
MARKS = "<!-- memory: by benchmarks/quantised_memory.py -->", "<!-- end of memory -->"
_MIB = 2**20


def main(argv: list[str]) -> int:
    """Measures all, prints the table, and writes the JSON and the page's part if they are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), help="which models")
    parser.add_argument("--tokens", type=count, default=256, metavar="N", help="tokens of the forward pass")
    parser.add_argument("--layers", type=count, metavar="N", help="another number of layers, for a quick look")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a JSON file to write")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the page whose table is replaced")
    parser.add_argument("--measure", nargs=2, metavar=("BASE", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        base, setting = options.measure
        print(json.dumps(measure(overrides(base, setting, options.layers), options.tokens)))
        return 0
    found = {base: {name: _measured(base, name, options) for name in SETTINGS} for base in options.bases}
    result = {**provenance(threads=1), "tokens": options.tokens, "bases": found}
    print(table(found))
    if options.output:
        write(options.output, json.dumps(result, indent=1) + "\n")
    if options.page:
        write(options.page, between_marks(options.page.read_text(), *MARKS, table(found)))
    return 0


def overrides(base: str, setting: str, layers: int | None) -> list[str]:
    """The arguments of `tied-lora plan` for a base."""
    model, sizes = BASES[base]
    sizes = {**sizes, **({"num_layers": layers} if layers else {})}
    return [
        f"model={model}",
        *(f"model.{key}={value}" for key, value in sizes.items()),
        f"model.base_quantization={SETTINGS[setting]}",
    ]


def _measured(base: str, setting: str, options: argparse.Namespace) -> dict[str, Any]:
    """The result of `measure` in a process of its own, whose allocator gives every large block back when it is freed."""
    words = ["--measure", base, setting, "--tokens", str(options.tokens)]
    words += ["--layers", str(options.layers)] if options.layers else []
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(words: list[str], tokens: int) -> dict[str, Any]:
    """Bytes of each part, measured and planned, for the model of these arguments of `plan`."""
    import torch

    from nemo_tied_lora import TiedLoraConfig, inject, quantize_base
    from nemo_tied_lora.commands.plan import plan_of
    from nemo_tied_lora.planning.composing.compose import compose_config, plain
    from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization
    from nemo_tied_lora.platform import prepare

    prepare()
    torch.set_num_threads(1)
    values = plain(compose_config("plan", words))
    quantization = BaseQuantization.from_setting(values["model"]["base_quantization"])
    memory = plan_of(values)["memory"]
    _one_process()
    _warm_up()
    empty = _resident()
    model = build_llama(values["model"])
    found: dict[str, Any] = {"base": _resident() - empty, "planned_base": memory["base"]}
    if quantization is not None:
        with _peak() as peak:
            report = quantize_base(model, **vars(quantization))
        found |= {
            "quantised": _resident() - empty,
            "quantising_peak": peak["bytes"] - empty,
            "linears": report.bytes_after,
        }
        found |= {"planned_linears": memory["quantised"]["held_bytes"], "planned_peak": memory["dequantised"]}
        found["bits_per_weight"] = memory["quantised"]["bits_per_weight"]
    found["one_linear_peak"] = _one_linear(model)
    inject(model, TiedLoraConfig(rank=8))
    before = _resident()
    loss = _loss(model, tokens)
    found["kept_for_backward"] = _resident() - before
    loss.backward()
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The measurements as a Markdown table, in MiB."""
    rows = [
        "| base | held in | bits a weight | resident, measured | `plan` | kept for backward | peak of one linear | `plan` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for base, settings in found.items():
        for name, one in settings.items():
            held = one.get("quantised", one["base"])
            bits = f"{one['bits_per_weight']:.3f}" if "bits_per_weight" in one else "16"
            planned = f"{_mib(one['planned_base'])} ({held / one['planned_base'] - 1:+.1%})"
            peak = _mib(one["planned_peak"]) if "planned_peak" in one else "0"
            cells = [
                base,
                name,
                bits,
                _mib(held),
                planned,
                _mib(one["kept_for_backward"]),
                _mib(one["one_linear_peak"]),
            ]
            rows.append(f"| {' | '.join([*cells, peak])} |")
    return "\n".join(rows)


def _mib(number: float) -> str:
    return f"{number / _MIB:,.1f}"


def _one_process() -> None:
    import tempfile

    import torch
    from megatron.core import parallel_state, tensor_parallel

    store = torch.distributed.FileStore(tempfile.mktemp(), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _warm_up() -> None:
    """Does once, on a tiny model, what is measured later: libraries load, and thread pools start."""
    from nemo_tied_lora import TiedLoraConfig, inject, quantize_base

    sizes = {"num_layers": 1, "hidden_size": 128, "ffn_hidden_size": 128, "num_attention_heads": 2}
    more = {"num_query_groups": 2, "override_vocab_size": 128, "encoder_seq_length": 64}
    for kind in ("nf4", "int8"):
        model = build_llama({**sizes, **more})
        quantize_base(model, kind)
        inject(model, TiedLoraConfig(rank=2))
        _loss(model, 16).backward()


def _loss(model: Any, tokens: int) -> Any:
    import torch

    ids = torch.arange(tokens)[None] % 100
    mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[None, None]
    return model(ids, torch.arange(tokens)[None], mask, labels=ids).float().mean()


def _one_linear(model: Any) -> int:
    """The bytes that the model's largest linear needs beyond its input and output while it multiplies."""
    import torch

    linear = model.decoder.layers[0].mlp.linear_fc1
    x = torch.ones(1, 1, linear.weight.shape[1], dtype=torch.bfloat16)
    linear(x)
    before = _resident()
    with _peak() as peak:
        linear(x)
    return peak["bytes"] - before


def _resident() -> int:
    """Bytes of resident memory, after everything that is free has been returned."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


@contextlib.contextmanager
def _peak() -> Iterator[dict[str, int]]:
    """Within it, the kernel keeps the peak of the resident memory; the result has it under "bytes" afterwards."""
    found = {"bytes": 0}
    Path("/proc/self/clear_refs").write_text("5")
    yield found
    found["bytes"] = _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
