# SPDX-License-Identifier: Apache-2.0
"""The stages that test_hugging_face.py runs on ranks of real NeMo: import on one rank, training on four.

python -m tests.conversion.hugging_face_ranks import|train FOLDER
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from tests.harness.hugging_face_models import FAMILIES, SEQUENCE, save_model, tokens

__all__ = ["ADAPTERS", "main"]

ADAPTERS: dict[str, dict[str, Any]] = {
    "llama": {"preset": "tl6", "rank": 3, "alpha": 5.0},
    "mistral": {"preset": "tl5", "rank": 4, "layers": [0, 3], "targets": ["linear_qkv", "linear_fc1"]},
    "qwen2": {"preset": "vera", "rank": 5, "alpha": 2.5},
    "gpt2": {"preset": "tl6", "rank": 3},
}
_STEPS = 3


def main(argv: list[str]) -> int:
    """Runs one rank's part of a stage. Rank 0 writes its results to FOLDER/<stage>.pt."""
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    stage, folder = argv[0], Path(argv[1])
    results = {"import": _import_all, "train": _train_all}[stage](folder)
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / f"{stage}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def _import_all(folder: Path) -> dict[str, Any]:
    from nemo_tied_lora.commands.import_ import _run as run_import
    from nemo_tied_lora.conversion.from_hf_base import import_hf_base
    from nemo_tied_lora.planning.composing.compose import compose_config

    results: dict[str, Any] = {}
    for family in FAMILIES:
        model = save_model(family, folder / family)
        with torch.no_grad():
            logits = model(tokens(family)).logits
        source = _as_transformers_5(folder) if family == "mistral" else folder / family
        paths = [f"path={source}", f"output={folder / family}.nemo"]
        keys, comparison = import_hf_base(compose_config("import", ["from=hf-base", *paths]))
        results[family] = {"logits": logits, "keys": keys, "comparison": comparison}
    half = [f"path={folder / 'llama'}", f"output={folder / 'half.nemo'}", "dtype=bfloat16", "tolerance=0.1"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_import(compose_config("import", ["from=hf-base", *half]))
    results["half"] = printed.getvalue()
    results["gguf"] = _gguf(folder)
    results["refusal"] = _refusal(folder)
    results["stock"] = _stock_lora(folder)
    results["legacy"] = _legacy(folder)
    results["rowless"] = _rowless(folder)
    results["merge"] = _check_of_a_merge(folder)
    return results


def _gguf(folder: Path) -> dict[str, Any]:
    """The import of a quantised Llama with a byte-level BPE; the same numbers and ids without GGUF."""
    import transformers

    from nemo_tied_lora.commands.import_ import _run as run_import
    from nemo_tied_lora.nemo.generation import next_token_logits
    from nemo_tied_lora.planning.base_config import base_model_config
    from nemo_tied_lora.planning.composing.compose import compose_config
    from tests.harness.gguf_files import bpe_vocabulary, write_gguf

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "gpt2")
    vocabulary = bpe_vocabulary(tokenizer, "gpt-2", model.config.vocab_size, add_bos_token=False)
    file = write_gguf(folder / "tiny-model.Q4_1.gguf", model, vocabulary, kind=GGMLQuantizationType.Q4_1)
    words = [f"path={file}", f"output={folder / 'gguf.nemo'}"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_import(compose_config("import", ["from=hf-base", *words]))
    restored = _restore(folder / "gguf.nemo", tp=1, pp=1)
    with torch.no_grad():
        expected = model.eval()(tokens("llama")).logits
    text = "In 1376, def f(x): two  blanks"
    return {
        "printed": printed.getvalue(),
        "logits": torch.stack(next_token_logits(restored, tokens("llama").tolist())),
        "expected": expected,
        "ids": (list(restored.tokenizer.text_to_ids(text)), tokenizer(text)["input_ids"]),
        "record": dict(base_model_config(str(folder / "gguf.nemo"), key="base")["huggingface"]),
    }


def _as_transformers_5(folder: Path) -> Path:
    """A copy of the Mistral whose config.json has rope_parameters in place of rope_theta."""
    copied = Path(shutil.copytree(folder / "mistral", folder / "mistral_5"))
    config = json.loads((copied / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (copied / "config.json").write_text(json.dumps(config))
    return copied


def _rowless(folder: Path) -> dict[str, Any]:
    """What is said of a Qwen2 whose tokenizer got two tokens more than its embedding has rows."""
    import transformers

    from nemo_tied_lora.conversion.from_hf_base import import_hf_base
    from nemo_tied_lora.nemo.generation import complete
    from nemo_tied_lora.nemo.token_rows import rowless_note
    from nemo_tied_lora.planning.composing.compose import compose_config

    source = Path(shutil.copytree(folder / "qwen2", folder / "rowless"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<new{i}>" for i in range(5)])
    tokenizer.save_pretrained(source)
    words = [f"path={source}", f"output={folder / 'rowless.nemo'}", "verify=false"]
    keys, _ = import_hf_base(compose_config("import", ["from=hf-base", *words]))
    model = _restore(folder / "rowless.nemo", tp=1, pp=1)
    refusal = _error_of(lambda: complete(model, ["one <new2>", "two <new3>", "<new4>"], tokens_to_generate=1))
    return {
        "rows": keys.model["override_vocab_size"],
        "notes": keys.notes,
        "generate": rowless_note(model),
        "refusal": refusal,
    }


def _refusal(folder: Path) -> str:
    """The error of an import that mixes up the rows of a linear."""
    from nemo_tied_lora.conversion.from_hf_base import import_hf_base
    from nemo_tied_lora.conversion.hf_families import BaseSizes
    from nemo_tied_lora.errors import ConfigError
    from nemo_tied_lora.planning.composing.compose import compose_config

    right = BaseSizes.rows
    BaseSizes.rows = lambda self, target, share: right(self, target, share).flip(0)  # type: ignore[method-assign]
    try:
        paths = [f"path={folder / 'llama'}", f"output={folder / 'wrong.nemo'}"]
        import_hf_base(compose_config("import", ["from=hf-base", *paths]))
    except ConfigError as error:
        return str(error)
    finally:
        BaseSizes.rows = right  # type: ignore[method-assign]
    return "no error"


class _Evil:
    def __reduce__(self) -> Any:
        return exec, ("open('evidence', 'w')",)


def _legacy(folder: Path) -> dict[str, Any]:
    """Logits of the Llama as one rank's legacy checkpoint; refusals of code in its pickle and in a stock adapter's."""
    model = _restore(folder / "llama.nemo", tp=1, pp=1)
    # Transformer Engine adds such states.
    state = {**model.state_dict(), "model.decoder.layers.0.self_attention._extra_state": io.BytesIO(b"")}
    _with_weights(folder / "llama.nemo", folder / "legacy.nemo", state)
    restored = _restore(folder / "legacy.nemo", tp=1, pp=1)
    logits = single_rank_logits_of(restored)
    _with_weights(folder / "llama.nemo", folder / "evil.nemo", {**state, "x": _Evil()})
    _with_weights(folder / "stock_lora.nemo", folder / "evil_lora.nemo", {"x": _Evil()})
    calls = (
        lambda: _restore(folder / "evil.nemo", tp=1, pp=1),
        lambda: model.load_adapters(str(folder / "evil_lora.nemo")),
    )
    refusals = [_error_of(call) for call in calls]
    return {"logits": logits, "refusals": refusals, "run": Path("evidence").exists()}


def _with_weights(source: Path, path: Path, state: dict[str, Any]) -> None:
    """Writes a `.nemo` with the source's members, except the weights."""
    content = io.BytesIO()
    torch.save(state, content)
    with tarfile.open(source) as old, tarfile.open(path, "w") as new:
        for info in old:
            if "model_weights" not in info.name and info.isreg():
                new.addfile(info, old.extractfile(info))
        info = tarfile.TarInfo("./model_weights.ckpt")
        info.size = content.tell()
        content.seek(0)
        new.addfile(info, content)


def single_rank_logits_of(model: Any) -> torch.Tensor:
    """Logits of the test's tokens."""
    from nemo_tied_lora.nemo.generation import next_token_logits

    return torch.stack(next_token_logits(model, tokens("llama").tolist()))


def _error_of(call: Callable[[], Any]) -> str:
    from nemo_tied_lora.errors import ConfigError

    try:
        call()
    except ConfigError as error:
        return str(error)
    return "no error"


def _check_of_a_merge(folder: Path) -> list[str]:
    """Errors of the check for two adapters: none for the right merge; one for swapped weights, one for the bare base."""
    from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
    from nemo_tied_lora.commands.main import main as command
    from nemo_tied_lora.conversion.merging.verify_merge import compare_with_merged
    from nemo_tied_lora.planning.base_config import base_model_config
    from nemo_tied_lora.planning.composing.compose import compose_config
    from tests.harness.random_adapters import random_adapter

    base = folder / "llama.nemo"
    paths = [str(folder / f"{name}.nemo") for name in ("exported", "other")]
    other = random_adapter(base_model_config(base), preset="tl5", rank=2)
    write_adapter(Path(paths[1]), other.config, other.shapes, other.state, {})
    words = [f"base={base}", f"output={folder / 'two_merged.nemo'}", f"adapters=[{','.join(paths)}]"]
    assert command(["merge", *words, "weights=[0.7,-0.3]", "verify=false"]) == 0
    cfg = compose_config("merge", [*words, "trainer.accelerator=cpu", "prompts=['one two','three']"])

    def compared(weights: tuple[float, float], candidate: str) -> str:
        shares, record = list(zip(paths, weights, strict=True)), str(folder / "two.check.json")
        path = str(folder / f"{candidate}.nemo")
        return _error_of(lambda: compare_with_merged(cfg, shares, path, record, "torch.float32"))

    cases = (((0.7, -0.3), "two_merged"), ((-0.3, 0.7), "two_merged"), ((0.7, -0.3), "llama"))
    return [compared(weights, candidate) for weights, candidate in cases]


def _stock_lora(folder: Path) -> dict[str, Any]:
    """The updates of an adapter's nemo-lora export, loaded by stock NeMo, and those of the tied formula."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
    from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import ParallelLinearAdapter

    from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
    from nemo_tied_lora.conversion.to_nemo_lora import ADAPTER_MODULES, write_nemo_lora
    from nemo_tied_lora.planning.base_config import base_model_config
    from tests.harness.random_adapters import delta, random_adapter

    base = base_model_config(folder / "llama.nemo")
    file: AdapterFile = random_adapter(base, preset="tl6", rank=3, alpha=5.0, layers=[1, 2])
    path = write_nemo_lora(file, base, folder / "stock_lora.nemo")
    model = _restore(folder / "llama.nemo", tp=1, pp=1)
    MegatronGPTSFTModel.load_adapters(model, str(path))
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, ParallelLinearAdapter)}
    errors = {}
    for target, shape in file.shapes.items():
        for layer in shape.layers:
            x = torch.randn(2, 3, shape.in_features)
            added = adapters.pop(f"model.decoder.layers.{layer}.{ADAPTER_MODULES[target]}")(x)
            expected = x.double() @ delta(file, layer, target).T
            errors[f"{layer} {target}"] = float((added - expected).abs().max() / expected.abs().max())
    return {"errors": errors, "others": list(adapters), **_fitted(folder, file, path)}


def _fitted(folder: Path, file: Any, lora: Path) -> dict[str, Any]:
    """Logits of the base, of an exported adapter, and of the adapter fitted to the export."""
    from nemo_tied_lora.checkpoint.save_load_on_any_layout import load_adapter
    from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
    from nemo_tied_lora.commands.main import main as command

    base, fitted = folder / "llama.nemo", folder / "fitted.nemo"
    assert command(["import", "from=lora", f"path={lora}", f"base={base}", f"output={fitted}", "rank=3"]) == 0
    write_adapter(folder / "exported.nemo", file.config, file.shapes, file.state, {})
    model = _restore(base, tp=1, pp=1)
    logits = {"plain": single_rank_logits_of(model)}
    for name in ("exported", "fitted"):
        adapter = load_adapter(model.model, folder / f"{name}.nemo")
        logits[name] = single_rank_logits_of(model)
        adapter.remove()
    return {"logits": logits}


def _train_all(folder: Path) -> dict[str, Any]:
    return {family: _train(folder, family) for family in FAMILIES}


def _train(folder: Path, family: str) -> dict[str, Any]:
    """Trains with Tied-LoRA for a few steps of Adam and saves; logits of the base, with the adapter, and merged."""
    from nemo_tied_lora import TiedLoraConfig, inject, save_adapter
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
    from nemo_tied_lora.planning.base_config import recorded_model_keys

    model = _restore(folder / f"{family}.nemo", tp=2, pp=2)
    if family == "llama":
        model.save_to(str(folder / "llama_tp2_pp2.nemo"))
    body = model.model
    results: dict[str, Any] = {"base": _logits(body, tokens(family))}
    model.tied_lora = adapter = inject(body, TiedLoraConfig.from_mapping(ADAPTERS[family]))
    optimizer = torch.optim.Adam(list(adapter.parameters()), lr=5e-2)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        _run(body, tokens(family), forward_only=False)
        adapter.reduce_gradients()
        optimizer.step()
    results["adapted"] = _logits(body, tokens(family))
    save_adapter(adapter, folder / f"{family}_adapter.nemo", model._facts())
    results["recorded"] = recorded_model_keys(read_adapter(folder / f"{family}_adapter.nemo").yaml)
    adapter.merge()
    results["merged"] = _logits(body, tokens(family))
    return results


def _restore(path: Path, *, tp: int, pp: int) -> Any:
    from nemo_tied_lora.nemo.generation import load_base
    from nemo_tied_lora.planning.composing.compose import compose_config

    layout = [f"model.tensor_model_parallel_size={tp}", f"model.pipeline_model_parallel_size={pp}"]
    options = [f"base={path}", "trainer.precision=32", f"trainer.devices={tp * pp}", "trainer.accelerator=cpu"]
    model = load_base(compose_config("generate", [*options, *layout]))
    model.model.eval()
    return model


def _logits(body: Any, batch: torch.Tensor) -> torch.Tensor | None:
    """The whole logits, on every rank of the last stage and on rank 0."""
    with torch.no_grad():
        outputs = _run(body, batch, forward_only=True)
    shared = [outputs[0]["logits"] if outputs else None]
    last = torch.distributed.get_world_size() - 1
    torch.distributed.broadcast_object_list(shared, src=last)
    return shared[0]


def _run(body: Any, batch: torch.Tensor, *, forward_only: bool) -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def batches() -> Iterator[torch.Tensor]:
        yield batch

    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=batches(),
        model=body,
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=len(batch),
        forward_only=forward_only,
    )


def _forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    positions = torch.arange(SEQUENCE).expand(len(batch), SEQUENCE)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model(batch, positions, mask), partial(_loss, batch)


def _loss(batch: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    logits = gather_from_tensor_model_parallel_region(logits)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    return loss, {"logits": logits.detach()}
