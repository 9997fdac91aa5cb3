# SPDX-License-Identifier: Apache-2.0
"""The whole command: NeMo's datasets on files as people have them, empty prompts, and answers that are cut away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.command_runs import SHORT, TIMEOUT, finetune, finetune_arguments, tied_lora, user_environment
from tests.harness.forks import run_forked
from tests.nemo.dataset_scenarios import CHAT_TOKENS, chat_rows, report_datasets

CHAT = [
    "model.data.chat=true",
    "model.data.chat_prompt_tokens={" + ", ".join(f"{name}: '{text}'" for name, text in CHAT_TOKENS.items()) + "}",
    "model.data.train_ds.file_names=[chat.jsonl]",
    "model.data.validation_ds.file_names=[chat.jsonl]",
]


@pytest.fixture(scope="module")
def folder(workshop: Path) -> Path:
    """The workshop, with files as people have them."""
    train = [json.loads(line) for line in (workshop / "train.jsonl").read_text().splitlines()]
    clean = [{"input": f"{number}:", "output": str(number % 8)} for number in range(8)]
    lines = [json.dumps({**one, "output": int(one["output"])}) for one in clean]
    messy = (
        "\ufeff" + lines[0] + "\r\n\n \t\n" + "\n".join(lines[1:5]) + "\n\ufeff" + "\n\n".join(lines[5:]) + "\n\n \n"
    )
    (workshop / "messy.jsonl").write_text(messy, newline="")
    (workshop / "clean.jsonl").write_text("".join(json.dumps(one) + "\n" for one in clean))
    (workshop / "blanks.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(one) for one in train) + "\n\n")
    long = [{"input": "123 " * (i % 5), "output": "eins zwei " * (i % 3)} for i in range(1, 40)]
    (workshop / "long.jsonl").write_text("".join(json.dumps(one) + "\n" for one in long))
    lost = [{"input": "1" * 40, "output": "eins"}] * 8
    (workshop / "lost.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lost))
    letters = "einzwdrv"
    chats = [
        {
            "system": "",
            "mask": "s",
            "type": None if i % 3 else "VALUE_TO_TEXT",
            "conversations": [
                {"from": "su"[turn % 2], "value": letters[(i + turn) % 8]} for turn in range(2 + 2 * (i % 2))
            ],
        }
        for i in range(8)
    ]
    (workshop / "chat.jsonl").write_text("\n".join(json.dumps(one) for one in chats))
    return workshop


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    done = run_forked(report_datasets, folder, cwd=folder, env=user_environment(), timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "datasets.json").read_text())


def test_a_clean_file_gives_nemos_examples(report: dict[str, Any]) -> None:
    assert report["clean as in NeMo"]


def test_a_tasks_items_have_the_same_tokens_in_training_and_in_evaluation(report: dict[str, Any]) -> None:
    """The control: with the blank that the item's file holds, this tokenizer would make another token."""
    assert report["task items"] == {
        "adds blanks": True,
        " ": {"same": True, "naive": False},
        "": {"same": True, "naive": True},
    }


def test_marks_blank_lines_and_numbers_change_no_example(report: dict[str, Any]) -> None:
    assert report["messy as clean"]
    assert len(report["ends"]) == 8


def test_a_file_that_has_changed_is_read_anew(report: dict[str, Any]) -> None:
    """NeMo would cut the new file at the old one's line ends."""
    assert report["numbers"] == [3, 5]


def test_a_template_keeps_characters_beyond_ascii(report: dict[str, Any]) -> None:
    assert report["templates"] == ["ö\n{input} {output}", "Ã¶\n{input} {output}"]


def test_cut_answers_are_counted_as_nemo_cuts_them(report: dict[str, Any]) -> None:
    for name, (ours, by_hand) in report["truncation"].items():
        assert ours == by_hand, name
    kinds = {kind for ours, _ in report["truncation"].values() for kind, count in ours.items() if count}
    assert kinds == {"answers", "cut", "lost", "prompts_cut"}


def test_cut_answers_are_counted_before_the_base_is_loaded(report: dict[str, Any]) -> None:
    counts, (counted, line) = report["early"]["counts"], report["early"]["counted"]
    assert counted
    assert counts["cut"]
    assert line.startswith(
        f"model.data.train_ds: max_seq_length=16 cuts {counts['lost']} of {counts['answers']} answers wholly and "
        f"{counts['cut']} in part, and {counts['prompts_cut']} prompts"
    )
    assert line.count("\n") == 1


def test_without_ranks_or_a_readable_tokenizer_and_for_conversations_they_are_counted_later(
    report: dict[str, Any],
) -> None:
    assert report["early"]["not"] == [False, False, False]


def test_conversations_give_nemos_batch(report: dict[str, Any]) -> None:
    assert report["conversations"]
    assert all(report["conversations"])


def test_only_a_section_that_generates_leaves_room_for_it(report: dict[str, Any]) -> None:
    assert report["room"] == [32, 0, 32, 32]


def test_shuffle_false_keeps_the_order_of_the_file(report: dict[str, Any]) -> None:
    order = [*range(8), *range(4)]
    for form in ("prompts", "chats", "packed"):
        assert report["order"][f"{form} kept"] == order
        assert report["order"][f"{form} drawn"] != order


def test_packed_sequences_are_read_or_refused_in_one_line(report: dict[str, Any]) -> None:
    right, too_long, uneven, without_keys = report["packed"].values()
    assert right == ["[[4, 5, 6, 8, 9, 10, 11, 12]]", "3"]
    assert ["a pack of 18 tokens; set it to 18 or more" in line for line in too_long] == [True]
    assert ["pack 2: input_ids and loss_mask differ in length" in line for line in uneven] == [True]
    assert ["KeyError: 'seq_start_id'" in line for line in without_keys] == [True]


def test_a_file_with_marks_and_blank_lines_trains_as_without_and_one_in_its_own_order_does_not(folder: Path) -> None:
    losses = {}
    for name, file, shuffled in (("whole", "train", True), ("blanks", "blanks", True), ("in order", "train", False)):
        words = [f"model.data.train_ds.file_names=[{file}.jsonl]", f"model.data.train_ds.shuffle={shuffled}"]
        _, metrics, _ = finetune(folder, name.replace(" ", "_"), *words, "trainer.max_steps=2")
        losses[name] = [step["loss"] for step in metrics["steps"]]
    assert losses["whole"] == losses["blanks"]
    assert losses["whole"] != losses["in order"]


SPY = """
import json
from nemo_tied_lora.nemo import sft_datasets
collate = sft_datasets.ChatDataset.collate_fn
def spy(self, batch):
    made = collate(self, batch)
    with open("trained.jsonl", "a") as file:
        file.write(json.dumps([made["tokens"].tolist(), made["loss_mask"].tolist()]) + "\\n")
    return made
sft_datasets.ChatDataset.collate_fn = spy
"""


def test_a_run_on_conversations_trains_on_nemos_loss_mask(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SPY)
    planted = {"PYTHONPATH": str(tmp_path)}
    tied_lora("finetune", *finetune_arguments("chat"), *CHAT, "trainer.max_steps=2", folder=folder, planted=planted)
    done = run_forked(chat_rows, folder, cwd=folder, env=user_environment(), timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    expected = {tuple(map(tuple, row)) for row in json.loads((folder / "rows.json").read_text())}
    trained = [json.loads(line) for line in (folder / "trained.jsonl").read_text().splitlines()]
    rows = {_row(tokens, mask, expected) for batch in trained for tokens, mask in zip(*batch, strict=True)}
    assert rows == expected
    assert len(rows) == 8
    assert all(any(mask) and not all(mask) for _, mask in expected)


def _row(tokens: list[int], mask: list[int], expected: set[Any]) -> Any:
    """A row of a batch without its padding: the one that is expected for its tokens, if the mask is the same."""
    for its_tokens, _ in expected:
        length = len(its_tokens)
        if tuple(tokens[:length]) == its_tokens and set(tokens[length:]) <= {2} and not any(mask[length:]):
            return its_tokens, tuple(mask[:length])
    return tuple(tokens), tuple(mask)


def test_a_run_whose_answers_are_all_cut_away_is_refused_by_all_ranks_in_one_line(folder: Path) -> None:
    lost = ["model.data.train_ds.file_names=[lost.jsonl]", "model.data.train_ds.truncation_field=output"]
    done = tied_lora("finetune", *finetune_arguments("lost"), *lost, "layout=tp2", folder=folder, ok=False)
    assert done.stderr.count("model.data.train_ds.max_seq_length=32: cuts away all 8 answers") == 1
    assert "Traceback" not in done.stderr
    assert not (folder / "lost" / "adapter.nemo").exists()
    assert "of the base's" not in done.stdout  # the table of parameters, which follows the loading of the base


def test_an_empty_prompt_is_answered_and_no_other_answer_is_lost(folder: Path) -> None:
    common = ["base=base.nemo", "adapter=null", "trainer.precision=32", "tokens_to_generate=4"]
    (folder / "questions.jsonl").write_text('{"q": "1:", "id": 7}\n\n{"q": ""}\n{"q": 2}\n')
    own = ["prompts_file=questions.jsonl", 'prompt_template="{q}"', "output=answers.jsonl"]
    done = tied_lora("generate", *common, *own, folder=folder)
    assert "prompts without tokens, answered from the start token: 2\n" in done.stderr
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(one["prompt"], one.get("id")) for one in answers] == [("1:", 7), ("", None), ("2", None)]
    tied_lora("generate", *common, *own, "batch_size=1", "output=alone.jsonl", folder=folder)
    assert (folder / "alone.jsonl").read_text() == (folder / "answers.jsonl").read_text()


def test_wrong_lines_are_refused_by_ranks_that_a_launcher_has_started(folder: Path) -> None:
    from tests.harness.forks import fork_on_ranks

    (folder / "wrong.jsonl").write_text('{"input": "1:", "output": "eins"}\n{"input": "2:"}\n')
    arguments = [*SHORT, "model.restore_from_path=base.nemo", "model.data.train_ds.file_names=[wrong.jsonl]"]
    arguments += ["model.data.validation_ds.file_names=[validation.jsonl]", "layout=tp2"]
    module = "nemo_tied_lora.commands.finetune"
    done = run_forked(fork_on_ranks, module, arguments, 2, cwd=folder, env=user_environment(), timeout=TIMEOUT)
    assert done.returncode != 0
    assert done.stderr.count('wrong.jsonl: line 2: has no "output"') == 1
    assert "Traceback" not in done.stderr
