"""What one rank sees of a packed row: its context-parallel part, on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from omni_train import platform
from omni_train.data.batch import IGNORE, PackedBatch
from omni_train.nn.context_parallel import context_slice_indices


@dataclass
class LocalRow:
    """The part of a row that this context-parallel rank computes.

    T is the row's length over the context-parallel size; S is T over the tensor-parallel size, the part that sequence
    parallelism leaves to this rank between the parallel regions.
    """

    tokens: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64
    loss_weights: torch.Tensor  # (T,) float32
    position_ids: torch.Tensor  # (3, T)
    padding: torch.Tensor  # (S,) bool
    next_tokens: torch.Tensor  # (T,) int64: the token after each, what a multi-token-prediction layer embeds
    next_labels: torch.Tensor  # (T,) int64: the label after each, what that layer predicts
    next_loss_weights: torch.Tensor  # (T,) float32
    packed: PackedSeqParams  # boundaries in the whole row

    @classmethod
    def from_batch(cls, batch: PackedBatch) -> LocalRow:
        """Cut this rank's part out of a whole row."""
        device = platform.device()
        cu_seqlens = batch.cu_seqlens.to(device)
        whole = {name: getattr(batch, name).to(device, non_blocking=True) for name in PackedBatch.TENSORS}

        # Shifted over the whole row, where each token's successor is still beside it.
        last = cu_seqlens[1:].long() - 1
        next_tokens, next_labels = whole["tokens"].roll(-1), whole["labels"].roll(-1)
        next_loss_weights = whole["loss_weights"].roll(-1)
        next_labels[last], next_loss_weights[last] = IGNORE, 0.0

        context = parallel_state.get_context_parallel_world_size()
        if context > 1:
            mine = context_slice_indices(cu_seqlens, parallel_state.get_context_parallel_rank(), context)
        else:
            mine = slice(None)

        padding = whole["padding"][mine]
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        if tensor > 1:
            padding = padding.chunk(tensor)[parallel_state.get_tensor_model_parallel_rank()]
        longest = batch.max_seqlen
        return cls(
            tokens=whole["tokens"][mine],
            labels=whole["labels"][mine],
            loss_weights=whole["loss_weights"][mine],
            position_ids=whole["position_ids"][:, mine],
            padding=padding,
            next_tokens=next_tokens[mine],
            next_labels=next_labels[mine],
            next_loss_weights=next_loss_weights[mine],
            packed=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            ),
        )
