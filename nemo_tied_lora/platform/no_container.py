# SPDX-License-Identifier: Apache-2.0
"""The switch for a machine outside NVIDIA's containers."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Callable
from typing import Any

from nemo_tied_lora.platform import detect
from nemo_tied_lora.platform.patching import Patch, apply

__all__ = ["NEMO_PATCHES", "enable"]


def enable(*, nemo: bool) -> tuple[str, ...]:
    """Makes NeMo start outside NVIDIA's containers.

    Returns:
        The names that were replaced; empty in a container, which sets ``NVIDIA_PYTORCH_VERSION``.
    """
    return apply(NEMO_PATCHES) if nemo and not detect.in_nvidia_container() else ()


def _noop(_original: Any) -> Callable[..., None]:
    return lambda *_args, **_kwargs: None


def _compile_for_this_python(original: Callable[[], None]) -> Callable[[], None]:
    folder = os.path.dirname(os.path.abspath(original.__code__.co_filename))

    def compile_helper() -> None:
        import pybind11

        includes = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        subprocess.run(["make", "-C", folder, f"CPPFLAGS={includes}", f"LIBEXT={suffix}"], check=True)

    return compile_helper


def _gpt_without_multimodal(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    def model_inference_strategy_dispatcher(model: Any, **args: Any) -> Any:
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
        from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy

        if type(model) is MegatronGPTModel or isinstance(model, MegatronGPTSFTModel):
            return GPTModelTextGenerationStrategy(model)
        return dispatch(model, **args)

    return model_inference_strategy_dispatcher


NEMO_PATCHES: tuple[Patch, ...] = (
    Patch(
        owner="nemo.collections.nlp.models.language_modeling.megatron_base_model:MegatronBaseModel",
        name="_enable_nvidia_optimizations",
        make=_noop,
        reason="matches NVIDIA_PYTORCH_VERSION with a regular expression before it checks that the variable is set",
    ),
    Patch(
        owner="nemo.collections.nlp.data.language_modeling.megatron.dataset_utils",
        name="compile_helper",
        make=_compile_for_this_python,
        reason="compiles its dataset code with the python3 on PATH, which is another one unless the venv is activated",
    ),
    Patch(
        owner="nemo.collections.nlp.modules.common.text_generation_utils",
        name="model_inference_strategy_dispatcher",
        make=_gpt_without_multimodal,
        reason="generates text with a GPT only after importing NeMo's multimodal models, which need torchvision and more",
    ),
)
