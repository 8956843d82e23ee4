"""Speech codec: encoder, quantiser, and Code2Wav's decoder, trained end to end.

Axis letters: B batch, S samples, T frames, H hidden, N codebooks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from omni_train.models.code2wav import Code2Wav, WaveDecoder
from omni_train.models.codec.encoder import CodecEncoder
from omni_train.models.codec.quantizer import Regularization, SplitQuantizer
from omni_train.nn.waveform import StreamingState
from omni_train.recipe.schema import Code2WavConfig, CodecConfig


class CodecOutput(NamedTuple):
    """Outputs of a training pass of the codec. A tuple, so that ZeRO 3 finds the tensors in it."""

    waveform: Tensor
    """(B, S′), not clamped: S′ = :func:`omni_train.models.code2wav.wave_samples` of T. Sample i corresponds to
    sample i of the input."""
    latents: Tensor
    """(B, T, H) output of the encoder."""
    semantic: Tensor
    """(B, T, H) output of the semantic codebook, with a straight-through gradient; projected to (B, T, teacher_size)
    where there is a teacher."""
    commitment: Tensor
    """(B, N) mean squared distance of each codebook's input from its codeword; 0 where the sequence does not use it."""
    codes: Tensor
    """(B, N, T) int64."""


class SpeechCodec(torch.nn.Module):
    """Neural speech codec: 24 kHz waveforms to codes and back.

    Training feeds the decoder, which is all of Code2Wav but its embedding, with the quantised latents, projected. As
    that is linear and without a bias, every codeword has a vector that it adds; :meth:`to_code2wav` makes them the
    embedding of a Code2Wav.

    Args:
        config: sizes of encoder and quantiser.
        code2wav: sizes of the decoder; None for an encoder alone.
        teacher_size: width of the teacher's features, for semantic distillation; 0 without a teacher.
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
        self, waveform: Tensor, generator: torch.Generator | None = None, regularization: Regularization | None = None
    ) -> CodecOutput:
        """Resynthesis of a waveform, with gradients through encoder, quantiser and decoder.

        Args:
            waveform: (B, S) at 24 kHz.
            generator: see :meth:`SplitQuantizer.forward`; None draws and counts nothing.
            regularization: see :meth:`SplitQuantizer.forward`.
        """
        latents = self.encoder(waveform)
        quantized = self.quantizer(latents, generator, regularization)
        out = self.decoder(self.bridge(quantized.latents))
        semantic = quantized.semantic if self.teacher is None else self.teacher(quantized.semantic)
        return CodecOutput(out, latents, semantic, quantized.commitment, quantized.codes)

    @torch.no_grad()
    def encode(
        self, waveform: Tensor, num_quantizers: int | None = None, state: StreamingState | None = None
    ) -> Tensor:
        """Waveform to codes.

        Args:
            waveform: (B, S) at 24 kHz.
            num_quantizers: n, the number of codebooks to use, from the first; None for all N.
            state: streaming state, where the signal comes in pieces; all but the last are whole frames long.

        Returns:
            (B, n, ceil(S / samples of a frame)) int64.
        """
        return self.quantizer.encode(self.encoder(waveform, state), num_quantizers)

    @torch.no_grad()
    def decode(self, codes: Tensor, state: StreamingState | None = None) -> Tensor:
        """Waveform of codes, the same as that of :meth:`to_code2wav`.

        Args:
            codes: (B, n, T) of the first n codebooks.
            state: streaming state, where the codes come in pieces of any lengths.

        Returns:
            (B, S) at 24 kHz, from −1 to 1.
        """
        return self.decoder(self.bridge(self.quantizer.decode(codes)), state).clamp(-1, 1)

    @torch.no_grad()
    def to_code2wav(self) -> Code2Wav:
        """A Code2Wav whose output is that of :meth:`decode`, the codebooks folded into its embedding."""
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
