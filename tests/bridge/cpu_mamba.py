# SPDX-License-Identifier: Apache-2.0
"""Mamba 2 for a CPU and one rank, with the parameters of Megatron's MambaMixer, whose kernels need CUDA.

For each head, with x (head size), B and C (state size), a step size dt and A < 0:

    state = exp(dt A) state + dt x B^T        y = state C + D x

and then the linear out_proj of rms_norm(y silu(z)), normalised in groups.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn import functional

__all__ = ["CpuMamba"]

_WIDTH = 4
"""Tokens that the convolution sees."""


class CpuMamba(MegatronModule):
    """(S, N, hidden) to (S, N, hidden). The inner widths are those of the config's `mamba_...` fields."""

    def __init__(self, config: Any, d_model: int, pg_collection: Any, **_options: Any):
        super().__init__(config)
        self.heads, self.groups = config.mamba_num_heads, config.mamba_num_groups
        self.inner, self.states = self.heads * config.mamba_head_dim, self.groups * config.mamba_state_dim
        shared = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": True}
        shared["tp_group"] = pg_collection.tp
        mixed = self.inner + 2 * self.states
        self.in_proj = ColumnParallelLinear(d_model, self.inner + mixed + self.heads, gather_output=False, **shared)
        self.conv1d_weight, self.conv1d_bias = nn.Parameter(torch.zeros(mixed, 1, _WIDTH)), _zeros(mixed)
        self.A_log, self.D, self.dt_bias = (_zeros(self.heads) for _ in range(3))
        self.norm = nn.Module()
        self.norm.weight = _zeros(self.inner)
        self.out_proj = RowParallelLinear(self.inner, d_model, input_is_parallel=True, **shared)

    def forward(self, hidden_states: torch.Tensor, **_options: Any) -> tuple[torch.Tensor, None]:
        parts = [self.inner, self.inner + 2 * self.states, self.heads]
        z, mixed, dt = self.in_proj(hidden_states)[0].split(parts, dim=-1)
        length = mixed.shape[0]
        padded = functional.pad(mixed.permute(1, 2, 0), (_WIDTH - 1, 0))
        mixed = functional.conv1d(padded, self.conv1d_weight, self.conv1d_bias, groups=mixed.shape[-1])
        x, B, C = functional.silu(mixed.permute(2, 0, 1)).split([self.inner, self.states, self.states], dim=-1)
        x = x.unflatten(-1, (self.heads, -1))
        B, C = (
            t.unflatten(-1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, dim=-2) for t in (B, C)
        )
        dt = functional.softplus(dt + self.dt_bias).unsqueeze(-1)
        decay = (dt * -self.A_log.exp().unsqueeze(-1)).exp().unsqueeze(-1)
        state, outputs = 0.0, []
        for t in range(length):
            state = decay[t] * state + (dt[t] * x[t]).unsqueeze(-1) * B[t].unsqueeze(-2)
            outputs.append((state * C[t].unsqueeze(-2)).sum(-1) + self.D.unsqueeze(-1) * x[t])
        y = (torch.stack(outputs).flatten(-2) * functional.silu(z)).unflatten(-1, (self.groups, -1))
        y = functional.rms_norm(y, y.shape[-1:], eps=self.config.layernorm_epsilon).flatten(-2) * self.norm.weight
        return self.out_proj(y)[0], None


def _zeros(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))
