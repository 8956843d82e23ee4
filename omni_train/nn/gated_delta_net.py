"""Gated DeltaNet that goes on from a state: Megatron's layer in training, its recurrence when a sequence is written.

Axis letters: T tokens of the row, N sequences, D channels of the convolution, W taps, H heads, K and V head dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, gdn
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from omni_train.nn.decoding import DecodingState
from omni_train.nn.delta_rule import delta_rule_step


@dataclass
class DeltaNetMemory:
    """All that Gated DeltaNet needs of the tokens before: the same for ten or for a million."""

    inputs: torch.Tensor  # (N, D, W) the last inputs of the convolution, oldest first
    state: torch.Tensor  # (N, H, K, V)


class DecodingGatedDeltaNet(GatedDeltaNet):
    """Megatron's Gated DeltaNet, which also keeps and takes up its states under a :class:`DecodingState`.

    Parameters, their sharding and their names are Megatron's. `A_log` and the output norm's weight are fp32 in a model
    of any precision, as in the released checkpoints: a decay is exp(−exp(A_log)·…) to the power of the tokens that have
    passed, and bf16 leaves A_log two digits.
    """

    def reset_parameters(self) -> None:
        """As Megatron's, which the constructor calls last, but drawn in fp32."""
        self.A_log.data = self.A_log.data.float()
        self.out_norm.float()
        if self.config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                self.dt_bias.data.fill_(1.0)
                self.A_log.data.uniform_(*self.A_init_range).log_()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None,
        packed_seq_params: PackedSeqParams | None = None,
        **options,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's: (T, 1, hidden), or this rank's part of it under sequence parallelism, and the bias."""
        if not isinstance(packed_seq_params, DecodingState):
            return super().forward(hidden_states, attention_mask, packed_seq_params=packed_seq_params, **options)
        projected, _ = self.in_proj(hidden_states)
        T = len(projected)
        qkv, gate, beta, alpha = projected.transpose(0, 1).split(self.feat_dim_split, dim=-1)
        gate = gate.reshape(1, T, -1, self.value_head_dim)
        mix = self._next_token if packed_seq_params.single else self._whole_sequences
        return self.out_proj(self._gated_norm_and_a2a(*mix(packed_seq_params, qkv, gate, beta, alpha), None, 1, T))

    def _inputs(self, qkv, gate, beta, alpha):
        """(1, T, …) of the convolution's output and the other projections -> query, key, value, gate, decay, beta."""
        prepared = self._prepare_input_for_gated_delta_rule(qkv, gate, 1, qkv.shape[1], beta, alpha)
        query, key, value, gate, beta, alpha = prepared
        return query, key, value, gate, *self._compute_g_and_beta(self.A_log, self.dt_bias, alpha, beta)

    def _whole_sequences(self, decoding: DecodingState, qkv, gate, beta, alpha):
        kernel = dict(output_final_state=True, cu_seqlens=decoding.cu_seqlens_q)
        qkv, inputs = gdn.causal_conv1d(
            x=qkv, weight=self.conv1d.weight.squeeze(1), bias=self.conv1d.bias, activation=self.activation, **kernel
        )
        query, key, value, gate, g, beta = self._inputs(qkv, gate, beta, alpha)
        out, state = self.gated_delta_rule(query, key, value, g=g, beta=beta, **kernel)
        decoding.memories[self] = DeltaNetMemory(inputs, state)
        return out, gate

    def _next_token(self, decoding: DecodingState, qkv, gate, beta, alpha):
        memory: DeltaNetMemory = decoding.memories[self]
        memory.inputs = torch.cat([memory.inputs[..., 1:], qkv[0].unsqueeze(-1)], dim=-1)
        convolved = (memory.inputs.float() * self.conv1d.weight.squeeze(1).float()).sum(-1)
        if self.conv1d.bias is not None:
            convolved = convolved + self.conv1d.bias
        qkv = F.silu(convolved).to(qkv.dtype).unsqueeze(0)
        query, key, value, gate, g, beta = self._inputs(qkv, gate, beta, alpha)
        out, memory.state = delta_rule_step(query[0], key[0], value[0], g[0], beta[0], memory.state)
        return out.unsqueeze(0), gate
