# SPDX-License-Identifier: Apache-2.0
"""One process, real NeMo, no model: the scheme in NeMo's map, and the remedies in its errors."""

from __future__ import annotations

from pathlib import Path

from tests.harness.command_runs import user_environment
from tests.harness.forks import fork_program, run_forked

PROGRAM = """
import os, pathlib
from nemo_tied_lora.platform import prepare
prepare(nemo=True)
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
from omegaconf import OmegaConf
from nemo_tied_lora import ConfigError, TiedLoraConfig
from nemo_tied_lora.nemo.model import MegatronGPTTiedLoraModel

assert issubclass(MegatronGPTTiedLoraModel, MegatronGPTSFTModel)
scheme = PEFT_CONFIG_MAP["tied_lora"]
assert set(PEFT_CONFIG_MAP) > {"lora", "adapter", "ia3", "ptuning", "tied_lora"}

cfg = OmegaConf.create({"peft": {"peft_scheme": "tied_lora", "tied_lora": {"preset": "tl5", "rank": 4, "alpha": None}}})
assert scheme(cfg).tied_lora == TiedLoraConfig.preset("tl5", rank=4)
assert scheme(OmegaConf.create({"peft": {"peft_scheme": "tied_lora"}})).tied_lora == TiedLoraConfig()

def message_of(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")

wrong = OmegaConf.create({"peft": {"tied_lora": {"adapter_dim": 8, "weight_tying": True}}})
text = message_of(ConfigError, lambda: scheme(wrong))
assert "write rank" in text and "tied: [A, B]" in text, text

# NeMo's own injection would silently skip a config that it does not know.
text = message_of(TypeError, scheme(cfg).get_config_dict)
assert "MegatronGPTTiedLoraModel" in text, text

model = MegatronGPTTiedLoraModel.__new__(MegatronGPTTiedLoraModel)
text = message_of(ValueError, lambda: MegatronGPTTiedLoraModel.add_adapter(model, [scheme(cfg), scheme(cfg)]))
assert "cannot be combined" in text, text

# Lightning's own error names neither the key nor a remedy.
import torch
from nemo_tied_lora.nemo.launched_trainer import LaunchedTrainerBuilder
torch.cuda.is_available = lambda: False
builder = LaunchedTrainerBuilder(OmegaConf.create({"trainer": {"accelerator": "gpu"}}))
text = message_of(ConfigError, builder.create_trainer)
assert text.startswith("trainer.accelerator=gpu: ") and "write auto" in text, text

# NeMo generates beyond max_seq_length where a conversation leaves too little room, and fails.
import types
from nemo_tied_lora.nemo.answer_truncation import _conversation
long = {"mask": torch.ones(12), "context_ids": [0] * 5}
chats = types.SimpleNamespace(max_seq_length=8, tokens_to_generate=4, _process_example=lambda example: long)
assert "exceed max_seq_length=8; raise it" in message_of(ValueError, lambda: _conversation(chats, {}))
chats.tokens_to_generate = 3
assert _conversation(chats, {}) == (11, 8, False)

# With several ranks, only one may have a damaged file. So it is not a ConfigError, which all ranks would share.
from nemo_tied_lora.nemo.legacy_weights import _load
pathlib.Path("model_weights.ckpt").write_bytes(b"no pickle")
assert "as tensors alone" in message_of(ConfigError, lambda: _load("model_weights.ckpt"))
os.environ["WORLD_SIZE"] = "2"
assert "as tensors alone" in message_of(RuntimeError, lambda: _load("model_weights.ckpt"))
print("done")
"""


def test_the_scheme_is_in_nemos_map_and_its_errors_name_the_remedy(tmp_path: Path) -> None:
    done = run_forked(fork_program, PROGRAM, cwd=tmp_path, env=user_environment(), timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "done"
