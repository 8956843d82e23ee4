"""Audio encoder (AuT) and its adapter.

Qwen3.5-Omni: four convolutions that halve time and mel bins, 6.25 tokens a second (technical report, section 2.1).
Qwen3-Omni as released: three, over chunks of 100 frames. Both then attend in both directions inside windows.

Axis letters: F mel frames, M mel bins, C channels, A audio tokens, H hidden, B chunks of a batch.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omni_train import platform
from omni_train.data.samples.lengths import audio_tokens, convolved, window_tokens
from omni_train.nn.encoder import EncoderLayers, Projector, encoder_config
from omni_train.nn.norm import LayerNorm
from omni_train.nn.recompute import checkpoint
from omni_train.recipe.schema import AudioEncoderConfig

CONVOLVED_FRAMES = 8192
"""Mel frames convolved at once, at most (or one chunk): the first convolution's output is 480·64/2 values a frame."""


def drawn_window(audio: AudioEncoderConfig, seed: int, step: int) -> int:
    """Attention window of the audio encoder in a training step, in mel frames, 0 for whole clips.

    Drawn anew for each step, and the same for all of its rows.

    Args:
        audio: its `train_window_frames` are what is drawn from.
        seed: of the run.
        step: of training.
    """
    return random.Random(f"audio window {seed} {step}").choice(audio.train_window_frames)


class AudioEncoder(MegatronModule):
    """Audio encoder: log-mel frames to audio tokens of the encoder's width.

    Args:
        audio: sizes of the encoder.
        thinker: Megatron's configuration of the Thinker, for its parallel layout, precision and recomputation.
    """

    def __init__(self, audio: AudioEncoderConfig, thinker: TransformerConfig) -> None:
        config = encoder_config(
            thinker,
            hidden_size=audio.hidden_size,
            intermediate_size=audio.intermediate_size,
            num_layers=audio.num_hidden_layers,
            num_attention_heads=audio.num_attention_heads,
        )
        super().__init__(config)
        self.audio = audio
        self.tp_group = ProcessGroupCollection.use_mpu_process_groups().tp
        self.recompute = thinker.recompute_granularity is not None  # convolutions are small work and large memory
        where = {"device": platform.device(), "dtype": config.params_dtype}
        channels = audio.conv_channels
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(channels if index else 1, channels, kernel_size=3, stride=2, padding=1, **where)
            for index in range(audio.num_convolutions)
        )
        mel_bins = convolved(audio.num_mel_bins, audio.num_convolutions)
        self.conv_out = torch.nn.Linear(channels * mel_bins, audio.hidden_size, bias=False, **where)
        for convolution in self.convolutions:
            # The Thinker's small deviation would let the sound vanish beside the positions that are added to it.
            torch.nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            torch.nn.init.zeros_(convolution.bias)
        for parameter in (*self.convolutions.parameters(), *self.conv_out.parameters()):
            # Each rank sees some of the sound: Megatron sums the gradients, as under sequence parallelism.
            parameter.sequence_parallel = thinker.tensor_model_parallel_size > 1
        self.layers = EncoderLayers(config)
        self.final_norm = LayerNorm(config, audio.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, mel_FM: Tensor, mel_cu_seqlens: Tensor, window_frames: int) -> Tensor:
        """Audio tokens of clips, the same for a clip whatever other clips are given.

        Args:
            mel_FM: log-mel frames of all clips, one after the other.
            mel_cu_seqlens: (clips+1,) boundaries of the clips; none is empty.
            window_frames: mel frames that attend to each other, cut from the start of each clip; 0 for a whole clip.

        Returns:
            (A, H) after the final norm, clip after clip, :func:`omni_train.data.samples.lengths.audio_tokens` of each.
        """
        clips = mel_cu_seqlens.diff().tolist()
        chunks = [cut for frames in clips for cut in _cut(frames, self.audio.chunk_frames)]
        hidden = self._convolve(mel_FM, chunks)
        window = window_tokens(window_frames, self.audio)
        tokens = [audio_tokens(frames, self.audio) for frames in clips]
        windows = [cut for count in tokens for cut in _cut(count, window or count)]
        hidden, _ = self.layers(hidden, windows)
        return self.final_norm(hidden)

    def _tokens(self, frames: int) -> int:
        return convolved(frames, self.audio.num_convolutions)

    def _convolve(self, mel_FM: Tensor, chunks: list[int]) -> Tensor:
        """Convolved audio tokens (A, H) of chunks of the given numbers of mel frames, each by itself.

        Tensor-parallel ranks share the chunks and gather the outputs.
        """
        size, rank = self.tp_group.size(), self.tp_group.rank()
        order = sorted(range(len(chunks)), key=lambda index: -chunks[index])  # a batch pads to its longest
        # A rank for which none is left convolves one that has been taken: its collectives need it, nobody reads it.
        shares = [order[of_rank::size] or order[:1] for of_rank in range(size)]
        tokens = [self._tokens(frames) for frames in chunks]
        longest = max(sum(tokens[index] for index in share) for share in shares)
        made = self._convolve_share(mel_FM, chunks, shares[rank])
        if size > 1:
            made = F.pad(made, (0, 0, 0, longest - len(made)))
            # What reads the outputs is the same on all ranks, and so is its gradient: each takes its part of it.
            made = gather_from_sequence_parallel_region(made, tensor_parallel_output_grad=False, group=self.tp_group)
        indices = {}
        for of_rank, share in enumerate(shares):
            start = of_rank * longest
            for index in share:
                indices.setdefault(index, torch.arange(start, start + tokens[index]))
                start += tokens[index]
        return made.index_select(0, torch.cat([indices[index] for index in range(len(chunks))]).to(made.device))

    def _convolve_share(self, mel_FM: Tensor, chunks: list[int], share: list[int]) -> Tensor:
        """Convolved tokens of the chunks in `share`, longest first, in batches of bounded size."""
        mels, parts = mel_FM.split(chunks), []
        while len(parts) < len(share):
            frames = self._padded(chunks[share[len(parts)]])
            batch = [mels[index] for index in share[len(parts) :][: max(1, CONVOLVED_FRAMES // frames)]]
            if self.recompute and self.training:
                out_BTH = checkpoint(self._convolve_batch, batch, frames)
            else:
                out_BTH = self._convolve_batch(batch, frames)
            parts += [out_TH[: self._tokens(len(mel))] for out_TH, mel in zip(out_BTH, batch, strict=True)]
        return torch.cat(parts)

    def _padded(self, frames: int) -> int:
        """Mel frames to which a chunk is padded, so that its tokens do not depend on the batch.

        The last token depends on the silence behind the chunk, up to the end of a whole one. `transformers` pads the
        chunks of a call to the longest of them, so the last token of a clip shorter than a chunk depends there on the
        clips beside it. Here it is always what it is there beside a whole chunk.
        """
        step = 2**self.audio.num_convolutions
        return min(-(-frames // step) * step, self.audio.chunk_frames)

    def _convolve_batch(self, chunks: list[Tensor], frames: int) -> Tensor:
        """Convolved tokens with positions, which start anew in each chunk: (at most `frames`, M) -> (B, tokens, H)."""
        mel_BFM = pad_sequence(chunks, batch_first=True)
        x = F.pad(mel_BFM, (0, 0, 0, frames - mel_BFM.shape[1])).to(self.conv_out.weight.dtype)
        x = x.transpose(1, 2).unsqueeze(1)  # (B, 1, M, F)
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        x = self.conv_out(x.permute(0, 3, 1, 2).flatten(2))
        return x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)


class AudioAdapter(Projector):
    """Adapter of the audio encoder: Linear, GELU, Linear, (A, encoder's width) -> (A, hidden size of the Thinker)."""

    def __init__(self, audio: AudioEncoderConfig, thinker: TransformerConfig) -> None:
        super().__init__(thinker, audio.hidden_size)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal position embeddings as in Whisper (Radford et al. 2022): wavelengths from 2π to 20,000π.

    Returns:
        (length, width) fp32, sines followed by cosines.
    """
    frequencies = torch.exp(-math.log(10000.0) / (width // 2 - 1) * torch.arange(width // 2, device=device).float())
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _cut(total: int, size: int) -> list[int]:
    """Lengths of pieces of `size` that make up `total`; the last is the remainder."""
    whole, rest = divmod(total, size)
    return [size] * whole + ([rest] if rest else [])
