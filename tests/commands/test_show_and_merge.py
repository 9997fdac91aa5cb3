# SPDX-License-Identifier: Apache-2.0
"""One process, no NeMo: runs `tied-lora show` and `tied-lora merge`. Another process measures the memory of a merge.

test_hugging_face.py covers the check at the end of a merge, which restores both models on real NeMo.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from nemo_tied_lora.adapter.rank_budget.masks import u_names
from nemo_tied_lora.adapter.update_statistics import inspect_layers
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.commands.main import main
from nemo_tied_lora.commands.show_picture import digits_that_differ, panels_of
from nemo_tied_lora.planning.base_config import other_architecture
from tests.conversion.test_merge import (
    HIDDEN,
    LAYERS,
    MODEL,
    PLACES,
    assert_close,
    content,
    distributed_base,
    legacy_base,
    merged_weights,
    part_of,
    whole_weights,
)
from tests.harness.adapter_files import shapes_of, tiny_adapter

PNG = b"\x89PNG"
# Of the base whose merge is measured; its largest tensor, a linear_fc1 of one rank, has 2 * WIDE * WIDE elements.
WIDE, WIDE_LAYERS = 896, 8


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tiny_adapter(tmp_path / "adapter.nemo", layers=LAYERS, hidden=HIDDEN, alpha=5.0)


def run(capsys: pytest.CaptureFixture[str], words: Sequence[str], code: int) -> str:
    """Runs the command; returns its stdout if it succeeds, else its stderr."""
    assert main(list(words)) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_show_prints_config_parameters_and_norms_and_draws(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, ["show", f"adapter={adapter}"], 0)
    assert "rank 3, trained v B u A, tied A B, alpha 5" in printed
    for target in PLACES:
        assert printed.count(target) == 1 + LAYERS
    picture = Path(f"{adapter}.png")
    assert str(picture) in printed
    assert picture.read_bytes().startswith(PNG)


def test_show_gives_the_scale_where_alpha_is_divided_by_the_root_of_the_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_adapter(tmp_path / "adapter.nemo", layers=LAYERS, hidden=HIDDEN, alpha=5.0, alpha_rule="sqrt")
    assert "tied A B, alpha 5 / sqrt(rank), scale 2.887, dropout" in run(
        capsys, ["show", f"adapter={path}", "output=null"], 0
    )


def test_show_names_the_precision_of_the_base_in_training(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, path = read_adapter(adapter), tmp_path / "on_nf4.nemo"
    write_adapter(path, file.config, file.shapes, file.state, {"base_precision": "nf4/64"})
    assert "precision nf4/64, of the base in training\n" in run(capsys, ["show", f"adapter={path}", "output=null"], 0)
    words = ["output=null", "format=json"]
    assert json.loads(run(capsys, ["show", f"adapter={path}", *words], 0))["base_precision"] == "nf4/64"
    assert json.loads(run(capsys, ["show", f"adapter={adapter}", *words], 0))["base_precision"] is None


def test_show_lists_the_ranks_that_a_budget_has_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = read_adapter(tiny_adapter(tmp_path / "whole.nemo", rank_budget={"target_rank": 2}, targets=["linear_qkv"]))
    masks = {name: torch.arange(3) < index for index, name in enumerate(u_names(file.shapes))}
    path = write_adapter(tmp_path / "pruned.nemo", file.config, file.shapes, file.state, {}, masks)
    assert main(["show", f"adapter={path}", "output=null"]) == 0
    text = capsys.readouterr().out
    assert "ranks     0 to 3 after pruning, mean 1.50 of 3; 3 of 3 shared atoms are in use" in text
    rows = [line.split() for line in text.splitlines() if " linear_qkv " in line and line.split()[0].isdigit()]
    assert [row[:3] for row in rows] == [[str(i), "linear_qkv", str(i)] for i in range(4)]
    assert main(["show", f"adapter={path}", "output=null", "format=json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert ranks == {f"layers.{i}.linear_qkv": i for i in range(4)}


def test_show_as_json_agrees_with_the_formula(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run(capsys, ["show", f"adapter={adapter}", "output=null", "format=json"], 0))
    file = read_adapter(adapter)
    assert facts["trained_parameters"] == sum(tensor.numel() for tensor in file.state.values())
    merged = merged_weights({key: torch.zeros(w.shape) for key, w in whole_weights().items()}, [(file, 1.0)])
    assert len(facts["layers"]) == len(merged)
    for layer in facts["layers"]:
        values = torch.linalg.svdvals(merged[layer["layer"], layer["target"]])
        shares = (values / values.sum())[:3]
        assert layer["update_norm"] == pytest.approx(float(values.square().sum().sqrt()), rel=1e-6)
        assert layer["effective_rank"] == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-5)
        u = file.state[f"layers.{layer['layer']}.{layer['target']}.u"]
        assert layer["rms"]["u"] == pytest.approx(float(u.square().mean().sqrt()), rel=1e-6)
    assert facts["picture"] is None
    assert not Path(f"{adapter}.png").exists()


@pytest.mark.parametrize("experts", ["per_expert", "tied"])
def test_show_counts_and_lists_every_expert(experts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_adapter(tmp_path / "moe.nemo", layers=2, num_experts=3, experts=experts)
    facts = json.loads(run(capsys, ["show", f"adapter={path}", "format=json"], 0))
    assert facts["trained_parameters"] == sum(tensor.numel() for tensor in read_adapter(path).state.values())
    assert {f"experts.{expert}.linear_fc2" for expert in range(3)} < {layer["target"] for layer in facts["layers"]}
    assert len(facts["layers"]) == 2 * len(PLACES) + 3 * 2
    assert Path(facts["picture"]).read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"preset": "tl6"}, ("u", "v", "rank")),
        ({"preset": "tl5"}, ("rank",)),
        ({"preset": "lora"}, ("rank",)),
        ({"trained": ["v", "B"], "tied": ["A", "B"]}, ("v", "rank")),
    ],
)
def test_the_picture_has_no_panel_of_a_frozen_u_or_v(
    tmp_path: Path, fields: dict, shown: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_adapter(tmp_path / "a.nemo", **fields)
    file = read_adapter(path)
    assert panels_of(inspect_layers(file.config, file.shapes, file.state)) == shown
    run(capsys, ["show", f"adapter={path}", f"output={tmp_path / 'new.png'}"], 0)
    assert (tmp_path / "new.png").read_bytes().startswith(PNG)


def test_numbers_in_the_picture_have_enough_digits_to_differ() -> None:
    assert digits_that_differ(np.array([0.2, 3.9])) == 2
    assert digits_that_differ(np.array([1.001, 1.012, 1.015])) == 4
    assert digits_that_differ(np.array([3.76, 3.94])) == 4
    assert digits_that_differ(np.ones(5)) == 2
    assert digits_that_differ(np.array([])) == 2


def test_show_reports_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = run(capsys, ["show", "adapter=nowhere.nemo", "output=x.pdf", "format=xml"], 2)
    for part in ("adapter=nowhere.nemo", "output=x.pdf", "format='xml'"):
        assert part in problems
    (tmp_path / "damaged.nemo").write_bytes(b"x" * 2000)
    assert "Traceback" not in run(capsys, ["show", f"adapter={tmp_path / 'damaged.nemo'}"], 2)
    assert "adaptr=" in run(capsys, ["show", "adaptr=a.nemo"], 2)


def words_of(base: Path, output: Path, *more: str) -> list[str]:
    return ["merge", f"base={base}", f"output={output}", "verify=false", *more]


def test_merge_reports_its_changes_and_replaces_an_older_file(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = distributed_base(tmp_path / "base.nemo", tmp_path / "base"), tmp_path / "merged.nemo"
    before = base.read_bytes()
    output.write_bytes(b"old")
    printed = run(capsys, words_of(base, output, f"adapter={adapter}"), 0)
    elements = sum(weight.numel() for weight in whole_weights().values())
    assert f"merged: {elements:,} elements of 4 weights" in printed
    assert f"written: {output} ({output.stat().st_size:,} bytes)" in printed
    assert output.stat().st_size == len(before)
    assert base.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.nemo", "base", "base.nemo", "merged.nemo"]


def test_merge_adds_several_adapters_with_weights_to_a_base_of_two_ranks(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_adapter(tmp_path / "b.nemo", preset="lora", rank=2, layers=LAYERS, hidden=HIDDEN)
    base, output = legacy_base(tmp_path / "base.nemo", tmp_path / "base", 2, 1), tmp_path / "merged.nemo"
    run(capsys, words_of(base, output, f"adapters=[{adapter},{other}]", "weights=[0.7,-0.3]"), 0)
    folder, shapes = content(output, tmp_path / "out"), shapes_of(HIDDEN, LAYERS)
    files = [(read_adapter(adapter), 0.7), (read_adapter(other), -0.3)]
    expected = merged_weights(whole_weights(), files)
    for rank in range(2):
        state = torch.load(folder / f"mp_rank_{rank:02d}" / "model_weights.ckpt", weights_only=True)
        assert len(state) == len(expected)
        for (layer, target), weight in expected.items():
            part = state[f"model.decoder.layers.{layer}.{PLACES[target]}.weight"]
            assert_close(part, part_of(weight, shapes[target], rank, 2))


@pytest.mark.parametrize("cause", ["base", "weights"])
def test_merge_refuses_what_is_not_finite_and_keeps_the_older_file(
    tmp_path: Path, adapter: Path, cause: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = whole_weights()
    if cause == "base":
        weights[2, "linear_proj"][5, 7] = float("nan")
    monkeypatch.setattr("tests.conversion.test_merge.whole_weights", lambda dtype=torch.float32: weights)
    base, output = distributed_base(tmp_path / "base.nemo", tmp_path / "base"), tmp_path / "merged.nemo"
    output.write_bytes(b"old")
    share = "1e38" if cause == "weights" else "1.0"
    problems = run(capsys, words_of(base, output, f"adapters=[{adapter}]", f"weights=[{share}]"), 2)
    assert "not finite in torch.float32; nothing is written" in problems
    if cause == "base":
        assert "layer 2 linear_proj" in problems
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.nemo", "base", "base.nemo", "merged.nemo"]


def test_merge_never_overwrites_its_inputs(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = distributed_base(tmp_path / "base.nemo", tmp_path / "base")
    (tmp_path / "link.nemo").symlink_to(base)
    before = base.read_bytes(), adapter.read_bytes()
    for output in (base, adapter, tmp_path / "link.nemo"):
        assert "is an input; name another" in run(capsys, words_of(base, output, f"adapter={adapter}"), 2)
    (tmp_path / "folder.nemo").mkdir()
    assert "is a folder" in run(capsys, words_of(base, tmp_path / "folder.nemo", f"adapter={adapter}"), 2)
    assert (base.read_bytes(), adapter.read_bytes()) == before


def test_merge_reports_every_problem(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["base=nowhere.nemo", "adapters=[none.nemo]", "weights=[1,2]", "output=x.pt", "verify=maybe", "prompts=[]"]
    problems = run(capsys, ["merge", *wrong], 2)
    for part in ("base=nowhere.nemo", "none.nemo", "weights=[1, 2]", "output=x.pt", "verify='maybe'", "prompts=[]"):
        assert part in problems
    assert "give one of them" in run(capsys, ["merge", "output=x.nemo"], 2)
    problems = run(capsys, words_of(adapter, tmp_path / "m.nemo", f"adapter={adapter}"), 2)
    assert f"base={adapter}: is a Tied-LoRA adapter, not a base" in problems
    base = distributed_base(tmp_path / "base.nemo", tmp_path / "base")
    wide = tiny_adapter(tmp_path / "wide.nemo", hidden=2 * HIDDEN, layers=LAYERS + 1)
    problems = run(capsys, words_of(base, tmp_path / "m.nemo", f"adapter={wide}"), 2)
    assert "linear_qkv: the adapter was trained on 48 x 144 (in x out), this base has 24 x 72" in problems
    assert "it has an update for layer 4; this base has layers 0 to 3" in problems


def test_an_adapter_of_a_pattern_is_shown_with_it_and_not_merged_into_nemos_base(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers are numbered by the pattern's places. No size tells the two bases apart."""
    file, recorded = (
        read_adapter(adapter),
        {"num_layers": LAYERS, "hidden_size": HIDDEN, "hybrid_layer_pattern": "M*-*"},
    )
    facts = {"base": {"architecture": recorded}}
    path = write_adapter(tmp_path / "hybrid.nemo", file.config, file.shapes, file.state, facts)
    assert f"{LAYERS} layers, hidden {HIDDEN}, pattern M*-*, fingerprint" in run(
        capsys, ["show", f"adapter={path}"], 0
    )
    base = distributed_base(tmp_path / "base.nemo", tmp_path / "base")
    refusal = f"adapter={path}: was trained on a HybridModel with hybrid_layer_pattern=M*-*"
    assert refusal in run(capsys, words_of(base, tmp_path / "m.nemo", f"adapter={path}"), 2)
    assert [line.startswith(refusal) for line in other_architecture(path, MODEL)] == [True]
    assert other_architecture(adapter, MODEL) == []


def test_a_base_whose_config_is_a_bomb_is_refused(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.nemo"
    with tarfile.open(base, "w:gz") as tar:
        info = tarfile.TarInfo("model_config.yaml")
        info.size = 64 << 20
        tar.addfile(info, io.BytesIO(b"#" * info.size))
    assert base.stat().st_size < 1 << 20
    problems = run(capsys, words_of(base, tmp_path / "m.nemo", f"adapter={adapter}"), 2)
    assert f"base={base}: not a whole .nemo file: its model_config.yaml claims 67108864 bytes" in problems


def test_merge_needs_a_few_of_the_bases_tensors_in_memory_not_the_model(tmp_path: Path) -> None:
    """The base has 260 MB on two ranks and tensors of up to 6 MB. The merge reads parts of at most 16 MB.

    Measured: 95 to 100 MB. This includes torch's imports for loading without contents, the allocator's reserve and
    mapped pages. The whole model would take 260 MB or more.
    """
    base, shapes, total = tmp_path / "base", shapes_of(WIDE, WIDE_LAYERS), 0
    for rank in range(2):
        state = {}
        for layer in range(WIDE_LAYERS):
            for target, shape in shapes.items():
                weight = part_of(torch.zeros(shape.out_features, shape.in_features), shape, rank, 2)
                state[f"model.decoder.layers.{layer}.{PLACES[target]}.weight"] = weight.contiguous()
        total += sum(weight.nbytes for weight in state.values())
        (base / f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save(state, base / f"mp_rank_{rank:02d}" / "model_weights.ckpt")
    sizes = {"hidden_size": WIDE, "ffn_hidden_size": 2 * WIDE, "num_layers": WIDE_LAYERS}
    (base / "model_config.yaml").write_text(yaml.safe_dump({**MODEL, **sizes}))
    adapter = tiny_adapter(tmp_path / "adapter.nemo", hidden=WIDE, layers=WIDE_LAYERS)
    output = tmp_path / "merged.nemo"
    words = words_of(base, output, f"adapter={adapter}")
    code = f"from tests.commands.test_show_and_merge import print_memory_of_merge; print_memory_of_merge({words!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    peak = int(done.stdout.splitlines()[-1])
    assert output.stat().st_size > total > 250e6
    assert peak < 0.5 * total
    output.unlink()


def print_memory_of_merge(words: list[str]) -> None:
    """Prints the command's peak memory in bytes, without the memory of its imports."""
    import nemo_tied_lora.conversion.merging.merge  # noqa: F401
    from tests.harness.resident_memory import memory_of

    torch.set_num_threads(1)
    codes: list[int] = []
    needed = memory_of(lambda: codes.append(main(words)))
    assert codes == [0]
    print(needed)
