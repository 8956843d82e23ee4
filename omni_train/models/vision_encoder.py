"""Vision encoder of Qwen3-VL, Qwen3-Omni and Qwen3.5, and its adapter.

SigLIP2's lineage: a learned square table of positions interpolated to each image's grid, rotary embedding of row and
column, attention within each frame. Qwen3-Omni and Qwen3-VL add DeepStack: features of earlier layers for the first
layers of the language model (Qwen3-VL technical report, section 2).

Axis letters: P patches, D values of a patch, H hidden, V vision tokens, R rotary dimensions, G patches of a grid.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from omni_train import platform
from omni_train.nn.encoder import EncoderLayers, Projector, ShardedModuleList, encoder_config
from omni_train.nn.norm import LayerNorm
from omni_train.recipe.schema import VisionEncoderConfig

ROPE_THETA = 10000.0
NORM_EPS = 1e-6


class VisionEncoder(MegatronModule):
    """Vision encoder: patches of images and videos to features of the encoder's width.

    Args:
        vision: sizes of the encoder.
        thinker: Megatron's configuration of the Thinker, for its parallel layout, precision and recomputation.
    """

    def __init__(self, vision: VisionEncoderConfig, thinker: TransformerConfig) -> None:
        config = encoder_config(
            thinker,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.depth,
            num_attention_heads=vision.num_heads,
            activation=partial(F.gelu, approximate="tanh"),
            norm_eps=NORM_EPS,
        )
        super().__init__(config)
        self.vision = vision
        where = {"device": platform.device(), "dtype": config.params_dtype}
        patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.patch_embedding = torch.nn.Conv3d(3, vision.hidden_size, kernel_size=patch, stride=patch, **where)
        self.position_embedding = torch.nn.Embedding(vision.num_position_embeddings, vision.hidden_size, **where)
        config.init_method(self.position_embedding.weight)
        self.layers = EncoderLayers(config)

    def forward(self, patches_PD: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features of the patches of images and videos.

        Args:
            patches_PD: uint8; a patch is (channel, frame, y, x), and patches are ordered by frame, then in blocks of
                merge x merge.
            grid_thw: (images, 3) patches of each image or video in time, height and width.

        Returns:
            (P, H) of the last layer, and (P, H) of each layer in ``deepstack_visual_indexes``.
        """
        grids = [tuple(grid) for grid in grid_thw.tolist()]
        # On patches that are cut already a convolution is a matrix product; its parameter keeps the published shape.
        weight_HD = self.patch_embedding.weight.flatten(1)
        pixels_PD = patches_PD.float() / 127.5 - 1.0
        hidden = F.linear(pixels_PD.to(weight_HD.dtype), weight_HD, self.patch_embedding.bias)
        # Frames of one size share their positions.
        sizes = list(dict.fromkeys((h, w) for _, h, w in grids))
        starts, start = {}, 0
        for h, w in sizes:
            starts[h, w], start = start, start + h * w
        source_P = torch.cat([torch.arange(h * w).repeat(t) + starts[h, w] for t, h, w in grids]).to(hidden.device)
        orders = [_merge_order(h, w, self.vision.spatial_merge_size) for h, w in sizes]
        positions = torch.cat([self._positions(*size, *order) for size, order in zip(sizes, orders, strict=True)])
        rotary = torch.cat([self._rotary(*order) for order in orders]).to(hidden.device)
        hidden = hidden + positions.to(hidden.dtype).index_select(0, source_P)
        frames = [h * w for t, h, w in grids for _ in range(t)]
        return self.layers(hidden, frames, rotary.index_select(0, source_P), keep=self.vision.deepstack_visual_indexes)

    def _positions(self, h: int, w: int, row_G: Tensor, column_G: Tensor) -> Tensor:
        """Position embeddings of a frame's patches, (G, H) fp32, interpolated bilinearly from the square table.

        The table's corners are the frame's corners.
        """
        table = self.position_embedding.weight
        side = round(table.shape[0] ** 0.5)
        y, x = (index * (side - 1) / max(size - 1, 1) for index, size in ((row_G.float(), h), (column_G.float(), w)))
        top, left = y.floor(), x.floor()
        indices, weights = [], []
        for down in (0, 1):
            for right in (0, 1):
                row, column = ((low.long() + step).clamp(max=side - 1) for low, step in ((top, down), (left, right)))
                indices.append(row * side + column)
                weights.append((1 - (y - top - down).abs()) * (1 - (x - left - right).abs()))
        indices, weights = (torch.stack(parts, dim=1).to(table.device) for parts in (indices, weights))
        return F.embedding_bag(indices, table.float(), per_sample_weights=weights, mode="sum")

    def _rotary(self, row_G: Tensor, column_G: Tensor) -> Tensor:
        """Rotary cosines and sines of a frame's patches, (G, 1, R) fp32: half of the frequencies for the row."""
        half = self.config.kv_channels // 2
        frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, half, 2).float() / half)
        angles = torch.cat([row_G[:, None] * frequencies, column_G[:, None] * frequencies], dim=1)
        return torch.cat([angles.cos(), angles.sin()], dim=1).unsqueeze(1)


class VisionAdapter(MegatronModule):
    """Adapter of the vision encoder: each block of merge x merge patches becomes one token of the Thinker's width.

    Args:
        vision: sizes of the encoder.
        thinker: Megatron's configuration of the Thinker.
    """

    def __init__(self, vision: VisionEncoderConfig, thinker: TransformerConfig) -> None:
        super().__init__(thinker)
        self.merger = Merger(vision, thinker, norm_merged=False)
        self.deepstack_mergers = ShardedModuleList(
            Merger(vision, thinker, norm_merged=True) for _ in vision.deepstack_visual_indexes
        )

    def forward(self, hidden_PH: Tensor, deepstack: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Vision tokens and DeepStack features of the Thinker's width.

        Args:
            hidden_PH: output of the encoder's last layer.
            deepstack: (P, H) outputs of the layers in ``deepstack_visual_indexes``.

        Returns:
            (V, hidden size of the Thinker), and the same for each of DeepStack's layers.
        """
        merged = [merger(x) for merger, x in zip(self.deepstack_mergers, deepstack, strict=True)]
        return self.merger(hidden_PH), merged


class Merger(MegatronModule):
    """Patch merger: LayerNorm, Linear, GELU, Linear over the concatenated features of a block of merge x merge patches.

    Args:
        vision: sizes of the encoder.
        thinker: Megatron's configuration of the Thinker.
        norm_merged: whether the norm is over the whole block (DeepStack), rather than over each patch.
    """

    def __init__(self, vision: VisionEncoderConfig, thinker: TransformerConfig, *, norm_merged: bool) -> None:
        super().__init__(thinker)
        self.merged_size = vision.hidden_size * vision.spatial_merge_size**2
        self.mlp = Projector(thinker, self.merged_size)
        self.norm_merged = norm_merged
        width = self.merged_size if norm_merged else vision.hidden_size
        self.norm = LayerNorm(self.mlp.config, width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Merge blocks of patches, (P, H) -> (V, hidden size of the Thinker)."""
        if self.norm_merged:
            return self.mlp(self.norm(x.view(-1, self.merged_size)))
        return self.mlp(self.norm(x).view(-1, self.merged_size))


def _merge_order(h: int, w: int, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of each patch of a frame of h x w patches, in the order of blocks of merge x merge, (G,) each."""
    blocks = (h // merge, merge, w // merge, merge)
    row_G, column_G = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return tuple(index.reshape(blocks).transpose(1, 2).flatten() for index in (row_G, column_G))
