# SPDX-License-Identifier: Apache-2.0
"""docs/configuration.md lists this project's keys with their defaults, and docs/costs.md shows the plan's numbers. Pure text."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import yaml

from nemo_tied_lora.commands import plan
from nemo_tied_lora.config import PRESETS, TiedLoraConfig
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.config_folder import config_folder
from nemo_tied_lora.planning.settings.run_settings import GuardSettings
from tests.harness.paths import ROOT

# Sections of a run that belong to NeMo or Lightning.
NEMOS = {"trainer", "exp_manager", "model"}
# The page explains what null means.
DERIVED = {"preset": "`tl6`", "alpha": "rank", "targets": "all four", "layers": "all"}
DERIVED |= {
    "rank_budget": "none",
    "dtype": "the base's",
    "init_A": "`xavier`",
    "init_B": "`xavier`",
    "init_u": "1",
    "init_v": "0",
}


def table(heading: str, page: str = "configuration.md") -> dict[str, str]:
    """Maps key to default, from the first table of keys under a heading. A row may hold several of both."""
    section = re.split(rf"^#+ {re.escape(heading)}$", (ROOT / "docs" / page).read_text(), flags=re.M)[1]
    first = re.search(r"^\| key.*\| default \|.*\n(?:\|.*\n)+", section, flags=re.M)
    assert first is not None
    found: dict[str, str] = {}
    for row in first[0].splitlines()[2:]:
        keys, default = (cell.strip() for cell in row.strip("|").split("|")[:2])
        names = re.findall(r"`([\w.]+)`", keys)
        parts = default.split(", ") if len(names) > 1 else [default]
        found |= dict(zip(names, parts if len(parts) == len(names) else parts * len(names), strict=True))
    return found


def test_the_adapters_keys_are_the_dataclass_fields_with_their_defaults() -> None:
    expected = dict(DERIVED)
    for field in dataclasses.fields(TiedLoraConfig):
        if field.default is not None and field.name not in DERIVED:
            expected[field.name] = written(field.default)
    assert table("The adapter") == expected
    config = TiedLoraConfig()
    assert (config.scale, config.init_of("A"), config.init_of("B")) == (1, "xavier", "xavier")
    assert (config.init_of("u"), config.init_of("v"), config) == (1, 0, TiedLoraConfig.preset("tl6"))


def written(value: Any) -> str:
    """Returns a default as the page shows it."""
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_of_presets_is_the_presets(preset: str) -> None:
    parts = PRESETS[preset]
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert f"| `{preset}` | {', '.join(parts['trained'])} | {', '.join(parts['tied']) or '-'} |" in page


def test_a_runs_keys_are_the_yamls_with_their_defaults() -> None:
    cfg = plain(compose_config("finetune", []))
    own = {key: value for key, value in flat(cfg).items() if key.partition(".")[0] not in NEMOS}
    assert parsed(table("The run")) == own


def test_a_clusters_keys_are_the_yamls_with_their_defaults() -> None:
    cluster = plain(compose_config("launch", ["cluster=slurm"]))["cluster"]
    own = {f"cluster.{key}": value for key, value in flat({**cluster, "environment": None}).items()}
    assert {key: str(value) for key, value in parsed(table("The cluster")).items()} == {
        k: str(v) for k, v in own.items()
    }


def test_the_guards_keys_are_the_dataclass_fields_with_their_defaults() -> None:
    assert parsed(table("The guards of a run", "guards.md")) == dataclasses.asdict(GuardSettings())


@pytest.mark.parametrize(
    ("command", "heading"), [("export", "Export: `tied-lora export`"), ("import", "A LoRA: `from=lora`")]
)
def test_a_converters_keys_are_the_yamls_with_their_defaults(command: str, heading: str) -> None:
    cfg = plain(compose_config(command, []))
    named = parsed(table(heading, "adapters.md"))
    assert named.keys() <= cfg.keys() | {"preset"}
    # The YAML holds null where the page explains a default in words. The preset is a group.
    wrong = {key for key, value in named.items() if cfg.get(key, "tl6") not in (value, None)}
    assert wrong == set()


def parsed(defaults: dict[str, str]) -> dict[str, Any]:
    """Returns the values as YAML reads them."""
    return {key: yaml.safe_load(re.sub(r"^(\d)e", r"\1.0e", text.strip("`"))) for key, text in defaults.items()}


def flat(cfg: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Maps dotted keys to values. An empty section is a value."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def test_the_groups_and_their_choices_are_the_folders() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)=` \| (.*?) \|", page, flags=re.M))
    groups = {folder.name for folder in config_folder().iterdir() if folder.is_dir() and folder.name != "peft"}
    assert rows.keys() == groups
    for group, choices in rows.items():
        files = {path.stem for path in (config_folder() / group).glob("*.yaml")}
        assert set(re.findall(r"`(\w+)`", choices)) == files, group


@pytest.mark.parametrize("rank", [2, 8, 32, 128])
def test_the_table_of_parameters_is_the_plans(rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {}
    for preset in ("lora", "tl6", "tl5", "vera"):
        words = ["model=llama2_7b", f"preset={preset}", f"model.peft.tied_lora.rank={rank}", "format=json"]
        assert plan.main([*words, "model.peft.tied_lora.targets=[linear_qkv]"]) == 0
        counts[preset] = json.loads(capsys.readouterr().out)["trained_parameters"]
    lora, tl6, tl5, vera = counts.values()
    assert (
        f"| {rank} | {lora:,} | {tl6:,} | {tl6 / lora:.2%} | {tl5:,} | {vera:,} |"
        in (ROOT / "docs" / "costs.md").read_text()
    )
