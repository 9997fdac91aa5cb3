# SPDX-License-Identifier: Apache-2.0
"""torch's Adam and AdamW with the step count saved once per parameter group, as apex's FusedAdam saves it.

torch keeps a 0-dim ``step`` beside each parameter's moments. NeMo's distributed checkpoint expects every entry of that
state to have the parameter's shape, and refuses to save (megatron/core/dist_checkpointing/optimizer.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

__all__ = ["GroupStepAdam", "GroupStepAdamW"]


class _GroupStep(torch.optim.Adam):
    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict, with ``step`` moved from the parameters to their group.

        The group's step is the largest of its parameters'.
        """
        saved = super().state_dict()
        for group in saved["param_groups"]:
            states = [saved["state"][index] for index in group["params"] if index in saved["state"]]
            group["step"] = max((float(state["step"]) for state in states if "step" in state), default=0.0)
        saved["state"] = {
            index: {key: value for key, value in state.items() if key != "step"}
            for index, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, or what torch's own class saved."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        states = {index: copy.copy(state) for index, state in state_dict["state"].items()}
        for group in groups:
            step = group.pop("step", None)
            for index in group["params"] if step is not None else ():
                if index in states:
                    states[index]["step"] = torch.tensor(float(step))
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})


class GroupStepAdam(_GroupStep):
    """``torch.optim.Adam`` that saves its step count per group."""


class GroupStepAdamW(_GroupStep, torch.optim.AdamW):
    """``torch.optim.AdamW`` that saves its step count per group."""
