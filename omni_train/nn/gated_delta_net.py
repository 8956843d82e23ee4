"""Gated DeltaNet with a decoding state: Megatron's layer in training, its recurrence when text is generated.

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
class RecurrentState:
    """Decoding state of a Gated DeltaNet layer, whose size does not depend on the tokens before.

    Its fields are named as in flash-linear-attention.
    """

    conv_state: torch.Tensor  # (N, D, W) the last inputs of the causal convolution, oldest first
    recurrent_state: torch.Tensor  # (N, H, K, V) of the gated delta rule


class DecodingGatedDeltaNet(GatedDeltaNet):
    """Megatron's Gated DeltaNet, which also keeps its :class:`RecurrentState` in a :class:`DecodingState`.

    Parameters, their sharding and their names are Megatron's. `A_log` and the output norm's weight are fp32 in a model
    of any precision, as in the released checkpoints: a decay is exp(−exp(A_log)·…) to the power of the tokens that have
    passed, and bf16 leaves A_log two digits.
    """

    def reset_parameters(self) -> None:
        """Draw the initial parameters as Megatron does, `A_log` in fp32. The constructor calls it last."""
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
        """Mix the tokens within each sequence, with the arguments of Megatron's layer.

        Args:
            hidden_states: (T, 1, hidden), or this rank's part of it under sequence parallelism.
            attention_mask: None, the boundaries say it all.
            packed_seq_params: boundaries of the sequences in the whole row; a :class:`DecodingState` also keeps this
                layer's state.

        Returns:
            hidden states of the same shape, and the output projection's bias, which is None without one.
        """
        if not isinstance(packed_seq_params, DecodingState):
            return super().forward(hidden_states, attention_mask, packed_seq_params=packed_seq_params, **options)
        projected, _ = self.in_proj(hidden_states)
        T = len(projected)
        qkv, gate, beta, alpha = projected.transpose(0, 1).split(self.feat_dim_split, dim=-1)
        gate = gate.reshape(1, T, -1, self.value_head_dim)
        mix = self._prefill_sequences if packed_seq_params.is_prefill else self._decode_step
        return self.out_proj(self._gated_norm_and_a2a(*mix(packed_seq_params, qkv, gate, beta, alpha), None, 1, T))

    def _inputs(self, qkv, gate, beta, alpha):
        """(1, T, …) of the convolution's output and the other projections -> query, key, value, gate, decay, beta."""
        prepared = self._prepare_input_for_gated_delta_rule(qkv, gate, 1, qkv.shape[1], beta, alpha)
        query, key, value, gate, beta, alpha = prepared
        return query, key, value, gate, *self._compute_g_and_beta(self.A_log, self.dt_bias, alpha, beta)

    def _prefill_sequences(self, state: DecodingState, qkv, gate, beta, alpha):
        kernel = dict(output_final_state=True, cu_seqlens=state.cu_seqlens_q)
        qkv, conv_state = gdn.causal_conv1d(
            x=qkv, weight=self.conv1d.weight.squeeze(1), bias=self.conv1d.bias, activation=self.activation, **kernel
        )
        query, key, value, gate, g, beta = self._inputs(qkv, gate, beta, alpha)
        out, recurrent_state = self.gated_delta_rule(query, key, value, g=g, beta=beta, **kernel)
        state.layer_states[self] = RecurrentState(conv_state, recurrent_state)
        return out, gate

    def _decode_step(self, state: DecodingState, qkv, gate, beta, alpha):
        own: RecurrentState = state.layer_states[self]
        own.conv_state = torch.cat([own.conv_state[..., 1:], qkv[0].unsqueeze(-1)], dim=-1)
        convolved = (own.conv_state.float() * self.conv1d.weight.squeeze(1).float()).sum(-1)
        if self.conv1d.bias is not None:
            convolved = convolved + self.conv1d.bias
        qkv = F.silu(convolved).to(qkv.dtype).unsqueeze(0)
        query, key, value, gate, g, beta = self._inputs(qkv, gate, beta, alpha)
        out, own.recurrent_state = delta_rule_step(query[0], key[0], value[0], g[0], beta[0], own.recurrent_state)
        return out.unsqueeze(0), gate
