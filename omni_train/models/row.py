"""A context-parallel rank's part of a packed row, on its device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from omni_train import platform
from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.nn.context_parallel import context_slice_indices


@dataclass
class LocalMedia:
    """All audio and vision of a row, and which of their tokens this rank's tokens are."""

    mel: torch.Tensor  # (F, M) log-mel frames of all clips
    mel_cu_seqlens: torch.Tensor  # (clips+1,) boundaries of the clips in `mel`
    audio_indices: torch.Tensor  # (S,) int64: index of the row's audio token that each token is, −1: none
    patches: torch.Tensor  # (P, D) uint8
    grid_thw: torch.Tensor  # (images, 3) patches in time, height and width
    vision_indices: torch.Tensor  # (S,) int64: the same of vision tokens
    next_audio_indices: torch.Tensor  # (S,) int64: the same of the token after each
    next_vision_indices: torch.Tensor  # (S,) int64
    audio_window_frames: int  # mel frames that attend to each other, 0 for a whole clip


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
    next_tokens: torch.Tensor  # (T,) int64: the token after each, input of a multi-token-prediction layer
    next_labels: torch.Tensor  # (T,) int64: the label after each, target of that layer
    next_loss_weights: torch.Tensor  # (T,) float32
    packed: PackedSeqParams  # boundaries in the whole row
    modality: torch.Tensor  # (T,) uint8, index into MODALITIES
    media: LocalMedia | None = None  # where encoders are: the first pipeline stage
    next_embedding: torch.Tensor | None = None  # (S, 1, H) of the token after each, media included; from the model
    prepared: dict[str, torch.Tensor] = field(default_factory=dict)  # what frozen models said of this rank's part

    @classmethod
    def from_batch(cls, batch: PackedBatch, *, media: bool = False, audio_window_frames: int = 0) -> LocalRow:
        """Cut this rank's part out of a whole row.

        Args:
            batch: the row.
            media: whether to include what the encoders need.
            audio_window_frames: mel frames that attend to each other in the audio encoder, 0 for a whole clip.
        """
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

        tensor = parallel_state.get_tensor_model_parallel_world_size()

        def sequence_parallel(whole_row: torch.Tensor) -> torch.Tensor:
            here = whole_row[mine]
            return here.chunk(tensor)[parallel_state.get_tensor_model_parallel_rank()] if tensor > 1 else here

        def indices(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Index of the media token that each token is, and that the token after it is."""
            owner = torch.full_like(whole["tokens"], -1)
            owner[slots.to(device)] = torch.arange(len(slots), device=device)
            return sequence_parallel(owner), sequence_parallel(owner.roll(-1))

        local_media = None
        if media:
            audio_indices, next_audio_indices = indices(batch.audio_slots)
            vision_indices, next_vision_indices = indices(batch.vision_slots)
            local_media = LocalMedia(
                mel=batch.mel.to(device, non_blocking=True),
                mel_cu_seqlens=batch.mel_cu_seqlens,
                audio_indices=audio_indices,
                patches=batch.patches.to(device, non_blocking=True),
                grid_thw=batch.grid_thw,
                vision_indices=vision_indices,
                next_audio_indices=next_audio_indices,
                next_vision_indices=next_vision_indices,
                audio_window_frames=audio_window_frames,
            )
        longest = batch.max_seqlen
        return cls(
            tokens=whole["tokens"][mine],
            labels=whole["labels"][mine],
            loss_weights=whole["loss_weights"][mine],
            position_ids=whole["position_ids"][:, mine],
            padding=sequence_parallel(whole["padding"]),
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
            modality=whole["modality"][mine],
            media=local_media,
            prepared=batch.prepared,
        )
