"""What one rank sees of a packed row: its context-parallel part, on its device."""

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
    """All sound and vision of a row, and where their tokens stand in this rank's part of it."""

    mel: torch.Tensor  # (F, M)
    mel_cu_seqlens: torch.Tensor  # (clips+1,)
    audio_places: torch.Tensor  # (S,) int64: which audio token stands at each of this rank's tokens, −1: none
    patches: torch.Tensor  # (P, D) uint8
    grid_thw: torch.Tensor  # (images, 3)
    vision_places: torch.Tensor  # (S,) int64
    next_audio_places: torch.Tensor  # (S,) int64: which stands at the token after each
    next_vision_places: torch.Tensor  # (S,) int64
    audio_window_frames: int  # that attend to each other, 0 for a whole clip


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
    modality: torch.Tensor  # (T,) uint8, index into MODALITIES
    media: LocalMedia | None = None  # where encoders are: the first pipeline stage
    next_embedding: torch.Tensor | None = None  # (S, 1, H) of the token after each, media included; from the model
    prepared: dict[str, torch.Tensor] = field(default_factory=dict)  # what frozen models said of this rank's part

    @classmethod
    def from_batch(cls, batch: PackedBatch, *, media: bool = False, audio_window_frames: int = 0) -> LocalRow:
        """Cut this rank's part out of a whole row.

        Args:
            batch: the row.
            media: with what the encoders need.
            audio_window_frames: frames that attend to each other in the audio encoder, 0 for a whole clip.
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

        def places(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Of each token, and of the token after it."""
            owner = torch.full_like(whole["tokens"], -1)
            owner[slots.to(device)] = torch.arange(len(slots), device=device)
            return sequence_parallel(owner), sequence_parallel(owner.roll(-1))

        local_media = None
        if media:
            audio_places, next_audio_places = places(batch.audio_slots)
            vision_places, next_vision_places = places(batch.vision_slots)
            local_media = LocalMedia(
                mel=batch.mel.to(device, non_blocking=True),
                mel_cu_seqlens=batch.mel_cu_seqlens,
                audio_places=audio_places,
                patches=batch.patches.to(device, non_blocking=True),
                grid_thw=batch.grid_thw,
                vision_places=vision_places,
                next_audio_places=next_audio_places,
                next_vision_places=next_vision_places,
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
