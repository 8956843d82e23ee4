"""A rank's part of a row of the Talker, on its device.

Axis letters: T positions of this context-parallel rank, S this rank's part of them under sequence parallelism, Q
codebooks, K states that are read, H width of the Thinker.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from omni_train import platform
from omni_train.data.rows.batch import SpeechRow
from omni_train.nn.context_parallel import context_slice_indices


@dataclass
class LocalSpeechRow:
    """The part of a row that this rank computes; shapes as in :class:`SpeechRow`, of the positions that it holds."""

    text_ids: torch.Tensor  # (T,) int64, of all tensor-parallel ranks' positions: they share the table
    sources: torch.Tensor  # (S,) int64
    codes: torch.Tensor  # (S, Q) int64
    labels: torch.Tensor  # (S,) int64
    label_codes: torch.Tensor  # (S, Q−1) int64
    text_ended: torch.Tensor  # (S,) bool
    draws: torch.Tensor  # (S,) float32
    position_ids: torch.Tensor  # (3, T)
    padding: torch.Tensor  # (S,) bool
    packed: PackedSeqParams  # boundaries in the whole row, or a decoding state
    states: torch.Tensor | None = None  # (K, H) on the first pipeline stage, of the whole row
    prepared: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_batch(cls, batch: SpeechRow, frame_dropout: float = 0.0) -> LocalSpeechRow:
        """Cut this rank's part out of a whole row; `states` are those that the row has, or was prepared with.

        Args:
            batch: the row.
            frame_dropout: fraction of the frames whose codes do not enter; which ones the row's `draws` decide.
        """
        device = platform.device()
        cu_seqlens = batch.speech_cu_seqlens.to(device)
        context, mine = parallel_state.get_context_parallel_world_size(), slice(None)
        if context > 1:
            mine = context_slice_indices(cu_seqlens, parallel_state.get_context_parallel_rank(), context)
        tensor, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )

        def whole(name: str) -> torch.Tensor:
            return getattr(batch, name).to(device, non_blocking=True)

        def part(name: str) -> torch.Tensor:
            here = whole(name)[mine]
            return here.chunk(tensor)[rank] if tensor > 1 else here

        longest = int(batch.speech_cu_seqlens.diff().max())
        states = batch.prepared.get("states")
        if states is None and parallel_state.is_pipeline_first_stage(ignore_virtual=True) and len(batch.states):
            states = whole("states")
        codes, draws = part("codes"), part("draws")
        if frame_dropout:
            # Other digits of the number than those by which the code predictor's frames are chosen.
            hidden = (draws.double() * 4096).frac() < frame_dropout
            codes = torch.where((hidden & (codes[:, 1] >= 0))[:, None], -1, codes)
        return cls(
            text_ids=whole("text_ids")[mine],
            sources=part("sources"),
            codes=codes,
            labels=part("speech_labels"),
            label_codes=part("label_codes"),
            text_ended=part("text_ended"),
            draws=draws,
            position_ids=whole("speech_positions")[:, mine],
            padding=part("speech_padding"),
            packed=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            ),
            states=states,
            prepared=batch.prepared,
        )
