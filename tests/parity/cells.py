# SPDX-License-Identifier: Apache-2.0
"""The support table: the text of each cell, and the tests that prove it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import NEED_NEMO
from tests.parity.layouts import LAYOUTS, layouts_on
from tests.parity.runs import EXPERT_LAYOUTS, FLOAT32_LAYOUTS, HYBRID, INT8_LAYOUTS, TOLERANCES, Run, runs_of

__all__ = ["GPU", "NEWER", "NEWEST", "OLDER", "Cell", "Table", "tables"]

OLDER, NEWER, NEWEST = (0, 13), (0, 16), (0, 19)
"""The tested releases of megatron-core: the oldest with NeMo, the newest with Bridge."""

_FOLDER = "tests/parity"
_REPRODUCES = f"{_FOLDER}/test_layouts.py::test_the_layout_reproduces_the_single_process_run"
_BITS = f"{_FOLDER}/test_layouts.py::test_ranks_that_hold_the_same_element_hold_the_same_bits_after_every_step"
_SAME_AS_PLAIN = f"{_FOLDER}/test_layouts.py::test_a_quantised_base_gives_the_bits_of_the_dequantised_one"
_REFUSALS = f"{_FOLDER}/test_refusals.py::"
_MOE, _NEMO = "tests/adapter/test_experts.py::", "tests/nemo/test_nemo_loops.py::"
GPU = "untested (GPU only)"

ROWS = {
    "single": "one process",
    "tp2": "TP 2",
    "tp2 sp": "TP 2, sequence parallel",
    "tp4": "TP 4",
    "tp4 sp": "TP 4, sequence parallel",
    "pp2": "PP 2",
    "pp4": "PP 4",
    "pp4 vp2": "PP 4, interleaved, two chunks per stage",
    "tp2 pp2": "TP 2 x PP 2",
    "dp2": "DP 2",
    "tp2 dp2": "TP 2 x DP 2",
    "pp2 dp2": "PP 2 x DP 2",
    "tp2 sp pp2 dp2": "TP 2, sequence parallel, x PP 2 x DP 2",
    "cp2": "CP 2, the suite's own attention",
}
ON_A_GPU = ("CP 2, Transformer Engine's attention", "one GPU, bfloat16, NCCL")


@dataclass(frozen=True)
class Cell:
    """A cell of the support table.

    text: shown on the page. evidence: pytest's names of the tests that prove it. newer: the tests on the newer release;
    None: the same tests. newest: the tests on the newest release, which proves only the table of its own.
    """

    text: str
    evidence: tuple[str, ...] = ()
    newer: tuple[str, ...] | None = None
    newest: tuple[str, ...] = ()

    def proof(self, release: tuple[int, ...]) -> tuple[str, ...]:
        """The tests that must pass on a release. On the newer release, tests that need NeMo are left out."""
        if release == NEWEST:
            return self.newest
        if release == OLDER:
            return self.evidence
        tests = self.evidence if self.newer is None else self.newer
        return tuple(test for test in tests if Path(test.partition("::")[0]).parts[1] not in NEED_NEMO)


@dataclass(frozen=True)
class Table:
    """One table of the page. rows: each row's label to its cells, one per column."""

    title: str
    intro: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Cell, ...]]


def tables() -> Iterator[Table]:
    """The tables of the page, in its order."""
    for title, intro, columns in _FEATURES:
        rows = {label: tuple(_cell(layout, feature) for feature in columns) for layout, label in ROWS.items()}
        rows |= {label: (Cell(GPU),) * len(columns) for label in ON_A_GPU}
        yield Table(title, intro, tuple(columns.values()), rows)
    yield _float32_adapter()
    yield _quantised_base()
    yield _rank_budget()
    yield _stages()
    yield _experts()
    yield _nemo()
    yield _newest()
    yield _hybrid()


_FEATURES: list[tuple[str, str, dict[str, str]]] = [
    (
        "Loops",
        '"Ours" is a plain loop with `adapter.reduce_gradients()`. The others use megatron-core\'s `DistributedDataParallel` with '
        "`finalize_model_grads` and megatron-core's optimizer. Each run accumulates gradients over two microbatches or more. "
        "Call `nemo_tied_lora.check_ddp` before such a loop wraps the model: it refuses the settings that cannot work.",
        {
            "plain": "ours",
            "ddp": "DDP",
            "ddp overlap": "DDP, `overlap_grad_reduce`",
            "distributed": "distributed optimizer",
            "distributed overlap": "distributed optimizer, overlap of sums and gathers",
        },
    ),
    (
        "Activation recomputation",
        "",
        {
            "no recompute": "none",
            "selective recompute": "selective",
            "full recompute": "full",
            "overlap and full": "full, with `overlap_grad_reduce`",
        },
    ),
    (
        "Models",
        "GPT-2 style: biases, LayerNorm, GELU, learned positions. Llama style: no biases, RMSNorm, gated MLP, RoPE, and two query "
        "groups (four at TP 4 on megatron-core 0.13.1). In both, the output layer is not tied to the embedding.",
        {
            "gpt2": "GPT-2 style",
            "llama": "Llama style",
            "one query group": "Llama style, one query group",
            "head size": "head size other than hidden size / heads",
            "some targets": "layers without attention, layers without MLP",
            "some layers": "`layers` selects one layer",
        },
    ),
    (
        "Precision",
        "In the bfloat16 runs, parameters and activations are bfloat16; gradients and their sums are float32.",
        {"float64": "float64", "float32": "float32", "bfloat16": "bfloat16"},
    ),
    ("Presets", "", {"tl6": "`tl6`", "lora": "`lora`", "tl5": "`tl5`", "vera": "`vera`"}),
]


def _cell(layout: str, feature: str) -> Cell:
    older, newer = (_with(feature, layout, release) for release in (OLDER, NEWER))
    best = _short(min(TOLERANCES[run.dtype] for run in newer.values()))
    if older:
        return Cell(f"tested, {best}", _tests(older, layout), _tests(newer, layout))
    reason, refusals = _refused_by_the_older(feature, LAYOUTS[layout].tp)
    return Cell(f"tested on 0.16.1, {best}; refused on 0.13.1: {reason}", refusals, _tests(newer, layout))


def _with(feature: str, layout: str, release: tuple[int, ...]) -> dict[str, Run]:
    return {name: run for name, run in runs_of(layout, release).items() if feature in run.columns}


def _tests(runs: dict[str, Run], layout: str) -> tuple[str, ...]:
    return tuple(f"{test}[{layout}-{name}]" for name in runs for test in (_REPRODUCES, _BITS))


def _refused_by_the_older(feature: str, tp_size: int) -> tuple[str, tuple[str, ...]]:
    """The reason for a refusal, and its tests: that the run is refused, and that it would fail otherwise."""
    if feature == "overlap and full":
        name, case, reason = "overlapping_sums_with_full_recomputation", "", "a tied gradient would arrive in parts"
    else:
        name, case = "fewer_query_groups_than_tensor_parallel_ranks", f"[{tp_size}]"
        reason = f"{tp_size} ranks share one group"
    return reason, tuple(f"{_REFUSALS}test_{name}_{end}{case}" for end in ("are_refused_by_name", "would_fail"))


def _short(tolerance: float) -> str:
    return f"{tolerance:.0e}".replace("e-0", "e-")


def _float32_adapter() -> Table:
    rows = {ROWS[layout]: (_cell(layout, "float32 adapter"),) for layout in FLOAT32_LAYOUTS}
    intro = "The base and the activations are bfloat16; the adapter and its gradients are float32 (`dtype: float32`)."
    return Table("An adapter in float32", intro, ("distributed optimizer",), rows)


def _quantised_base() -> Table:
    columns = {"nf4": "nf4", "int8": "int8", "nf4 experts": "nf4, mixture of experts"}
    tested = {"nf4": tuple(ROWS), "int8": INT8_LAYOUTS, "nf4 experts": EXPERT_LAYOUTS}
    rows = {
        label: tuple(
            _quantised_cell(layout, feature) if layout in tested[feature] else Cell("") for feature in columns
        )
        for layout, label in ROWS.items()
    }
    return Table(
        "A quantised base",
        "The base's linears are [quantised](quantised_base.md). Each run has the bits of the run on the dequantised base on the "
        "same layout, in one step: losses, gradients, norms and adapter. The bounds are for the dequantised base in one process. "
        "The codes that the ranks hold together are those of the whole weights. nf4 runs with full recomputation in "
        "megatron-core's DDP; on several data-parallel ranks, with the distributed optimizer in float32. "
        "Empty cells are not tested.",
        tuple(columns.values()),
        rows,
    )


def _rank_budget() -> Table:
    loops = {
        label: {"plain": "ours", "ddp": "DDP"}.get(runs_of(layout, OLDER)["rank budget"].loop, "distributed optimizer")
        for layout, label in ROWS.items()
    }
    rows = {}
    for layout, label in ROWS.items():
        cell = _cell(layout, "rank budget")
        rows[label] = (Cell(f"{cell.text}, {loops[label]}", cell.evidence, cell.newer),)
    intro = (
        "A [rank budget](rank_budget.md) prunes entries of u, in four steps: two choices, a step with pruned entries that may "
        "return, and one whose choice is fixed. After each step every rank has the single process's masks, entry by entry. "
        "The distributed optimizer overlaps its sums and gathers."
    )
    return Table("A rank budget", intro, ("`tl6`",), rows)


def _quantised_cell(layout: str, feature: str) -> Cell:
    runs = [_with(feature, layout, release) for release in (OLDER, NEWER)]
    tests = [
        (*_tests(found, layout), *(f"{_SAME_AS_PLAIN}[{layout}-{name}]" for name in found if name == feature))
        for found in runs
    ]
    return Cell(f"equal bits, {_short(min(TOLERANCES[run.dtype] for run in runs[0].values()))}", *tests)


def _stages() -> Table:
    columns = {
        "short ends": "first and last stage shorter",
        "no layers": "first and last stage without a layer",
        "empty": "a stage or chunk without parameters",
    }
    cells = [_cell("pp4", feature) for feature in columns]
    chunks = _cell("pp4 vp2", "empty")
    cells[-1] = Cell(
        cells[-1].text, cells[-1].evidence + chunks.evidence, cells[-1].proof(NEWER) + chunks.proof(NEWER)
    )
    return Table(
        "Stages that differ",
        "A stage or chunk without parameters has no layers, no embedding and no output layer, as the second one of "
        '`pipeline_model_parallel_layout="Et||t|L"`. Its column is tested with two chunks per stage too.',
        tuple(columns.values()),
        {ROWS["pp4"]: tuple(cells)},
    )


def _experts() -> Table:
    sp, pp = ROWS["tp2 sp"], ROWS["pp2"]
    trains, names = f"{_MOE}test_training_matches_the_single_process", ("tl6, per expert", "tl6, tied")

    def own(layout: str, dispatcher: str) -> tuple[Cell, ...]:
        return tuple(Cell("tested, 1e-9", (f"{trains}[{layout}-{dispatcher}-{name}]",)) for name in names)

    def refused(reason: str, test: str) -> tuple[Cell, ...]:
        return (Cell(f"refused: {reason}", (f"{_MOE}{test}",)),) * 2

    by_name = "test_layouts_that_are_not_right_yet_are_refused_by_name"
    ddp = f"{_MOE}test_megatrons_own_loop_sums_experts_over_two_stages"
    rows = {
        f"{sp}, `allgather` dispatcher": own("tp2", "allgather"),
        f"{sp}, `alltoall` dispatcher": own("tp2", "alltoall"),
        pp: own("pp2", "allgather"),
        f"{pp}, megatron-core's DDP": tuple(Cell("tested, 1e-9", (f"{ddp}[{name}]",)) for name in names),
        "TP 2 without sequence parallelism": refused(
            "every rank would send the same tokens",
            "test_tensor_parallel_experts_need_sequence_parallelism_on_every_rank",
        ),
        "experts spread over ranks": refused(
            "they cannot be adapted yet", "test_experts_on_different_ranks_are_refused_on_each_of_them"
        ),
        "experts' TP other than TP": refused(
            "experts must be split as the rest is", f"{by_name}[expert_tensor_parallel_size=1: .* set it to 2]"
        ),
        "`flex` dispatcher": refused("not tested with an adapter", f"{by_name}[moe_token_dispatcher_type='flex']"),
        "overlap of shared experts": refused(
            "shared experts cannot be adapted in it", f"{by_name}[moe_shared_expert_overlap=True]"
        ),
        "grouped GEMM": refused(
            "all experts in one tensor", "test_grouped_experts_are_refused_by_name_and_attention_beside_them_is_not"
        ),
    }
    return Table(
        "Mixtures of experts",
        "The experts' linears are targets, in a Llama style mixture with a dense layer and shared experts. The loop is our own, "
        "unless the row names another.",
        ("`experts: per_expert`", "`experts: tied`"),
        rows,
    )


NEMO_TOLERANCES = {"O1": 1e-4, "O2": 4e-1, "mcore": 1e-4}
"""For each loop of NeMo: the largest relative error of a tensor's change, by its 2-norm."""


def _nemo() -> Table:
    columns = ("tp2", "pp2", "dp2")
    loops = {"O1": "plain (O1)", "O2": "`megatron_amp_O2`", "mcore": "`mcore_distributed_optim`"}
    gives, bits = f"{_NEMO}test_the_loop_gives_the_single_process_adapter", f"{_NEMO}test_replicas_hold_the_same_bits"
    rows = {
        label: tuple(
            Cell(
                f"tested, {_short(NEMO_TOLERANCES[loop])}{' (bfloat16)' if loop == 'O2' else ''}",
                (f"{gives}[{loop}-{layout}]", f"{bits}[{loop} {layout}]"),
            )
            for layout in columns
        )
        for loop, label in loops.items()
    }
    refused = f"{_NEMO}test_what_nemo_cannot_do_is_refused_by_name"
    for label, case, reason in (
        ("`distributed_fused_adam`", "distributed_fused_adam", "it leaves tied gradients unsummed"),
        (
            "`overlap_grad_sync` with full recomputation",
            "overlap with full recomputation",
            "gradients arrive in parts",
        ),
        ("`megatron_amp_O2` with context parallelism", "O2 with context parallelism", "gradients too large"),
    ):
        rows[label] = (Cell(f"refused: {reason}", (f"{refused}[{case}]",)),) * 3
    return Table(
        "NeMo 2.4's loops",
        "Five steps of `tied-lora finetune`'s model, in float32 except O2. The bounds are for the change of a tensor in these "
        "steps. Interleaved pipelines are refused in NeMo.",
        tuple(ROWS[layout] for layout in columns),
        rows,
    )


def _newest() -> Table:
    rows = {}
    for layout in layouts_on(NEWEST):
        if layout in ROWS:
            runs = {name: run for name, run in runs_of(layout, NEWEST).items() if name not in HYBRID}
            best = _short(min(TOLERANCES[run.dtype] for run in runs.values()))
            rows[ROWS[layout]] = (Cell(f"tested, {best}", newest=_tests(runs, layout)),)
    return Table(
        "megatron-core 0.19",
        "`make test-bridge` runs every loop, recomputation, model, precision, preset and quantised base of the tables above, on "
        "these layouts. It also trains at TP 2 x PP 2 through [Megatron-Bridge](bridge.md).",
        ("every run of the layout",),
        rows,
    )


def _hybrid() -> Table:
    """Empty cells are not tested."""
    names = {"apart": "a pair is a layer", "with Mamba": "with Mamba's layers", "nf4": "nf4", "budget": "rank budget"}
    rows: dict[str, tuple[Cell, ...]] = {}
    for layout in layouts_on(NEWEST):
        found = {name: run for name, run in runs_of(layout, NEWEST).items() if name in HYBRID}
        kinds: dict[str, dict[str, Run]] = {kind: {} for kind in names}
        for name, run in found.items():
            kinds[next(kind for kind in reversed(names) if kind in name)][name] = run
        rows[ROWS.get(layout, "PP 2, interleaved, two chunks per stage")] = tuple(
            _hybrid_cell(runs, layout) for runs in kinds.values()
        )
    return Table(
        "HybridModel",
        "megatron-core 0.19's `HybridModel`, whose attention and MLP are layers of their own. Where its pattern is pairs of them, "
        "the run must give what the *GPTModel* with the same weights gives in one process: losses, gradients, norms and adapter. "
        "The runs have our own loop, DDP with `overlap_grad_reduce`, the distributed optimizer, and full and selective "
        "recomputation; the stages of a pipeline are uneven, split a pair, or have no linear of the adapter. In the column of "
        "Mamba a mixer that a CPU can run stands for Megatron's, which needs CUDA kernels. nf4 has the bits of the dequantised "
        "base, as in its own table. Empty cells are not tested.",
        tuple(names.values()),
        rows,
    )


def _hybrid_cell(runs: dict[str, Run], layout: str) -> Cell:
    if not runs:
        return Cell("")
    best = _short(min(TOLERANCES[run.dtype] for run in runs.values()))
    quantised = tuple(f"{_SAME_AS_PLAIN}[{layout}-{name}]" for name, run in runs.items() if run.base is not None)
    return Cell(f"{'equal bits' if quantised else 'tested'}, {best}", newest=(*_tests(runs, layout), *quantised))
