"""The speech codec: encoder, quantiser, and Code2Wav's decoder, trained end to end.

Axis letters: B batch, S samples, T frames, H hidden, N codebooks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from omni_train.models.code2wav import Code2Wav, WaveDecoder
from omni_train.models.codec.encoder import CodecEncoder
from omni_train.models.codec.quantizer import Regularization, SplitQuantizer
from omni_train.nn.waveform import Stream
from omni_train.recipe.speech import Code2WavConfig, CodecConfig


class CodecOutput(NamedTuple):
    """A training pass. A tuple, so that ZeRO 3 finds the tensors in it."""

    waveform: Tensor
    """(B, S′), not clamped: S′ = :func:`omni_train.models.code2wav.wave_samples` of T. Sample i answers to sample i of
    the input."""
    latents: Tensor
    """(B, T, H) of the encoder."""
    semantic: Tensor
    """(B, T, H) the semantic codebook's output, straight through; (B, T, teacher_size) where there is a teacher."""
    commitment: Tensor
    """(B, N) mean squared distance of each codebook's input from its codeword; 0 where the sequence does not use it."""
    codes: Tensor
    """(B, N, T)."""


class SpeechCodec(torch.nn.Module):
    """Waveform to codes and back.

    Training feeds the decoder, which is all of Code2Wav but its embedding, with the quantised latents, projected. As
    that is linear and without a bias, every codeword has a vector that it adds; :meth:`to_code2wav` makes them the
    embedding of a Code2Wav.

    Args:
        config: sizes of encoder and quantiser.
        code2wav: sizes of the decoder; None: only codes are made.
        teacher_size: width of what the semantic codebook learns from a teacher; 0: no teacher.
    """

    def __init__(self, config: CodecConfig, code2wav: Code2WavConfig | None, teacher_size: int = 0) -> None:
        super().__init__()
        self.config, self.code2wav = config, code2wav
        self.encoder = CodecEncoder(config)
        self.quantizer = SplitQuantizer(config)
        if code2wav is not None:
            self.bridge = torch.nn.Linear(config.hidden_size, code2wav.hidden_size, bias=False)
            self.decoder = WaveDecoder(code2wav)
        self.teacher = torch.nn.Linear(config.hidden_size, teacher_size, bias=False) if teacher_size else None

    def forward(
        self, waveform: Tensor, generator: torch.Generator | None = None, harder: Regularization | None = None
    ) -> CodecOutput:
        """Encode, quantise and decode, with gradients all the way.

        Args:
            waveform: (B, S) at 24 kHz.
            generator: see :meth:`SplitQuantizer.forward`; None: nothing is drawn and nothing counted.
            harder: see there.
        """
        latents = self.encoder(waveform)
        quantized = self.quantizer(latents, generator, harder)
        out = self.decoder(self.bridge(quantized.latents))
        semantic = quantized.semantic if self.teacher is None else self.teacher(quantized.semantic)
        return CodecOutput(out, latents, semantic, quantized.commitment, quantized.codes)

    @torch.no_grad()
    def encode(self, waveform: Tensor, num_quantizers: int | None = None, stream: Stream | None = None) -> Tensor:
        """Waveform to codes.

        Args:
            waveform: (B, S) at 24 kHz.
            num_quantizers: n, only the first so many codebooks; None for all N.
            stream: of a signal in pieces; all but the last are multiples of a frame long.

        Returns:
            (B, n, ceil(S / samples of a frame)) integers.
        """
        return self.quantizer.encode(self.encoder(waveform, stream), num_quantizers)

    @torch.no_grad()
    def decode(self, codes: Tensor, stream: Stream | None = None) -> Tensor:
        """Codes to waveform, as :meth:`Code2Wav.forward`.

        Args:
            codes: (B, n, T) of the first n codebooks.
            stream: of codes in pieces, of any lengths.

        Returns:
            (B, S).
        """
        return self.decoder(self.bridge(self.quantizer.decode(codes)), stream).clamp(-1, 1)

    @torch.no_grad()
    def to_code2wav(self) -> Code2Wav:
        """A Code2Wav that makes of codes what :meth:`decode` makes of them."""
        config, quantizer = self.code2wav, self.quantizer
        out = Code2Wav(config).to(self.bridge.weight)
        out.decoder.load_state_dict(self.decoder.state_dict())
        tables = []
        for part in (quantizer.semantic, quantizer.acoustic):
            codewords = part.codebooks.codewords.flatten(0, 1).to(self.bridge.weight.dtype)
            tables.append(self.bridge(part.output(codewords.T[None])[0].T))
        # N times, as the embedding takes the mean over the codebooks.
        out.embedding.weight.copy_(torch.cat(tables) * config.num_quantizers)
        return out.train(self.training)
