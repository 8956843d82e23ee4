"""Audio and vision in the Thinker: media are encoded, and their features scattered among the token embeddings.

Encoders stand on the first pipeline stage and are tensor-parallel inside, so their outputs are the same on all
tensor-parallel ranks. Context-parallel ranks hold the same row and share its media: each encodes a part, and all
gather the outputs. So nothing is encoded twice.

Axis letters: F mel frames, M mel bins, P patches, D values of a patch, A and V audio and vision tokens, H hidden, S the
tokens whose hidden states this rank holds.
"""

from __future__ import annotations

from math import lcm

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor

from omni_train.data.samples.lengths import audio_tokens, convolved, window_tokens
from omni_train.models.audio_encoder import AudioAdapter, AudioEncoder
from omni_train.models.row import LocalMedia
from omni_train.models.vision_encoder import VisionAdapter, VisionEncoder
from omni_train.nn.context_parallel import gather_shares, share_evenly
from omni_train.recipe.schema import AudioEncoderConfig


def encode_audio(encoder: AudioEncoder, adapter: AudioAdapter, media: LocalMedia, group) -> Tensor:
    """Embeddings of the row's audio tokens.

    Args:
        encoder: the audio encoder.
        adapter: from the encoder's width to H.
        media: the row's media.
        group: the context-parallel ranks, which share the clips.

    Returns:
        (A, H) in the order of the row; with A = 0 still part of the parameters' graph.
    """
    config = encoder.audio
    clips = media.mel_cu_seqlens.diff().tolist()
    pieces = _audio_pieces(clips, config, media.audio_window_frames) if group.size() > 1 else clips
    mine, counts = share_evenly(pieces, [audio_tokens(frames, config) for frames in pieces], group)
    start, frames = sum(pieces[: mine.start]), pieces[mine]
    mel = media.mel[start : start + sum(frames)]
    if not frames:
        frames = [2**config.num_convolutions]
        mel = media.mel.new_zeros(frames[0], config.num_mel_bins)
    boundaries = torch.tensor([0, *frames], device=mel.device).cumsum(0, dtype=torch.int32)
    with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(encoder)):
        encoded = encoder(mel, boundaries, media.audio_window_frames)
    embedded = adapter(encoded)
    return gather_shares(embedded, counts, group)


def encode_vision(encoder: VisionEncoder, adapter: VisionAdapter, media: LocalMedia, group) -> list[Tensor]:
    """Embeddings of the row's vision tokens, and their DeepStack features.

    Args:
        encoder: the vision encoder.
        adapter: from the encoder's width to H.
        media: the row's media.
        group: the context-parallel ranks, which share the frames.

    Returns:
        (V, H) embeddings in the order of the row, then (V, H) features of each DeepStack layer; with V = 0 still part
        of the parameters' graph.
    """
    config = encoder.vision
    grids = media.grid_thw.tolist()
    if group.size() > 1:  # attention stays within a frame, so frames can be shared out one by one
        grids = [[1, h, w] for t, h, w in grids for _ in range(t)]
    patches_each = [t * h * w for t, h, w in grids]
    merged = config.spatial_merge_size**2
    mine, counts = share_evenly(patches_each, [patches // merged for patches in patches_each], group)
    start, grid = sum(patches_each[: mine.start]), grids[mine]
    patches = media.patches[start : start + sum(patches_each[mine])]
    if not grid:
        grid = [[1, config.spatial_merge_size, config.spatial_merge_size]]
        width = 3 * config.temporal_patch_size * config.patch_size**2
        patches = media.patches.new_zeros(merged, width)
    with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(encoder)):
        encoded, levels = encoder(patches, torch.tensor(grid, device=patches.device))
    embedded, deep = adapter(encoded, levels)
    return [gather_shares(part, counts, group) for part in (embedded, *deep)]


def scatter_features(
    hidden: Tensor, features: Tensor, indices: Tensor, *, add: bool, sequence_parallel: bool
) -> Tensor:
    """Hidden states with features of media written to, or added at, their tokens.

    Args:
        hidden: (S, 1, H).
        features: (A or V, H), the same on every tensor-parallel rank.
        indices: (S,) int64, index of the feature that belongs to each token, −1: none.
        add: whether to add the features to what is there, instead of overwriting it.
        sequence_parallel: whether tensor-parallel ranks hold different tokens, whose gradients the features then sum.

    Returns:
        (S, 1, H).
    """
    if sequence_parallel:
        features = copy_to_tensor_model_parallel_region(features)
    # Without any feature here the encoder still joins the backward pass, so that all ranks run its collectives.
    here = (indices >= 0).nonzero().squeeze(1)
    return hidden.index_put((here,), features[indices[here]].unsqueeze(1).to(hidden.dtype), accumulate=add)


def _audio_pieces(clips: list[int], config: AudioEncoderConfig, window_frames: int) -> list[int]:
    """Mel frames of each piece that clips are cut into, so that ranks can share a long clip.

    The encoder treats a piece as a clip of its own. Chunks are convolved by themselves and windows attend by
    themselves, so that a cut between both changes nothing.
    """
    if not window_frames:
        return clips
    per_chunk = convolved(config.chunk_frames, config.num_convolutions)
    frames = lcm(window_tokens(window_frames, config), per_chunk) // per_chunk * config.chunk_frames
    return [min(frames, clip - start) for clip in clips for start in range(0, clip, frames)]


def _trains(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
