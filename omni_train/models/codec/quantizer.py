"""Quantiser of the codec: one semantic codebook beside residual acoustic ones (Défossez et al. 2024, "Moshi", 3.3.2-4).

Our own rather than vector-quantize-pytorch's. That one smooths its codewords' counts, so a trained Mimi's codebooks (a
sum and a count for each codeword, which is their ratio) would give other codes and not come back out; it draws from
torch's global generator, so what a run draws would depend on its layout; it moves its codebooks in every forward pass,
so by how the global batch is cut into rows; and it drops codebooks for a whole batch at once.

Here a forward pass in training changes no codebook. It only counts; :meth:`SplitQuantizer.update`, once after each
optimizer step, sums the counts over all ranks and moves the codebooks, to the same values in every layout.

Axis letters: B batch, T frames, H hidden, D codebook dimension, N codebooks, K codewords, M samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from omni_train.models.codec.codebooks import Codebooks, Usage
from omni_train.nn.waveform import variance_preserving_init
from omni_train.recipe.schema import CodecConfig


@dataclass(frozen=True)
class Regularization:
    """Regularisation of the quantiser in training, drawn for each sequence on its own."""

    quantize_rate: float = 1.0
    """Probability that a sequence is quantised; otherwise its latents pass unquantised (Moshi: 0.5)."""
    dropout_rate: float = 1.0
    """Probability that a quantised sequence uses only its first n codebooks, n drawn from one acoustic codebook to all
    of them."""
    semantic_rate: float = 0.0
    """Probability that a sequence reaches the decoder through the semantic codebook alone, quantised (not in Moshi: it
    makes what is said intelligible without the acoustic codebooks, which a Talker predicts less well)."""


class QuantizerOutput(NamedTuple):
    """Outputs of the quantiser."""

    latents: Tensor
    """(B, T, H) quantised, with a straight-through gradient to the input."""
    semantic: Tensor
    """(B, T, H) the semantic codebook's part of the latents, quantised in every sequence."""
    commitment: Tensor
    """(B, N) mean squared distance of the codebook's input from its codeword; 0 where the sequence does not use it."""
    codes: Tensor
    """(B, N, T) int64."""


class _Draws(NamedTuple):
    """Random numbers for the sequences of a training row."""

    count: Tensor
    """(B,) int64 number of codebooks that the sequence uses."""
    quantized: Tensor
    """(B,) bool, whether the sequence is quantised."""
    priority: Tensor
    """(B, T) in [0, 1): frames below a threshold are the global batch's samples for k-means and revival."""


class SplitQuantizer(torch.nn.Module):
    """Split residual quantiser (Moshi, section 3.3.3): a semantic codebook beside residual acoustic ones.

    Both quantise the same latents, and their outputs are added.

    Args:
        config: sizes of the codec.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.num_semantic, self.num_quantizers = config.num_semantic_quantizers, config.num_quantizers
        self.semantic = ResidualQuantizer(config, self.num_semantic)
        self.acoustic = ResidualQuantizer(config, self.num_quantizers - self.num_semantic)

    def forward(
        self, latents: Tensor, generator: torch.Generator | None = None, regularization: Regularization | None = None
    ) -> QuantizerOutput:
        """Quantise latents.

        Args:
            latents: (B, T, H).
            generator: on the CPU. With it, in training mode, the codebooks' use is counted for :meth:`update`. Give
                each row one seeded by the run's seed, the step and the row's index in the global batch, so that the
                draws do not depend on the layout.
            regularization: see :class:`Regularization`; needs the generator.
        """
        draws = None
        if self.training and generator is not None:
            draws = self._draw(latents, generator, regularization or Regularization(dropout_rate=0.0))
        parts = [
            self.semantic(latents, draws and draws._replace(count=draws.count.clamp(max=self.num_semantic))),
            self.acoustic(latents, draws and draws._replace(count=draws.count - self.num_semantic)),
        ]
        return QuantizerOutput(
            latents=parts[0].latents + parts[1].latents,
            semantic=parts[0].quantized,
            commitment=torch.cat([part.commitment for part in parts], dim=1),
            codes=torch.cat([part.codes for part in parts], dim=1),
        )

    def encode(self, latents: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Codes of latents.

        Args:
            latents: (B, T, H).
            num_quantizers: n, the number of codebooks to use, from the first; None for all N.

        Returns:
            (B, n, T) int64.
        """
        count = num_quantizers or self.num_quantizers
        codes = self.semantic.encode(latents, min(count, self.num_semantic))
        if count == codes.shape[1]:
            return codes
        return torch.cat([codes, self.acoustic.encode(latents, count - self.num_semantic)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Latents of codes, (B, n, T) of the first n codebooks -> (B, T, H)."""
        latents = self.semantic.decode(codes[:, : self.num_semantic])
        if codes.shape[1] > self.num_semantic:
            latents = latents + self.acoustic.decode(codes[:, self.num_semantic :])
        return latents

    def update(self, generator: torch.Generator, decay: float = 0.99, dead_usage: float = 0.1) -> Usage:
        """Update the codebooks from the counts since the last update, and reset the counts. Collective.

        The first update initialises the codebooks by k-means on the latents of the step, which passed unquantised.
        Later ones are exponential moving averages, and revive dead codewords at an input. Codebooks between frozen
        projections stay as they are, so that the codes keep their meaning.

        Args:
            generator: on the CPU, seeded alike on all ranks.
            decay: of the moving averages.
            dead_usage: codewords used less than this fraction of their codebook's mean are dead.

        Returns:
            the use of all N codebooks by the step's global batch.

        Raises:
            UserError: frozen codebooks that have never been initialised.
        """
        parts = [
            part.codebooks.update(generator, decay, dead_usage, frozen=not part.learns)
            for part in (self.semantic, self.acoustic)
        ]
        return Usage(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def forget(self) -> None:
        """Discard the counts since the last update, and leave the codebooks as they are."""
        for part in (self.semantic, self.acoustic):
            part.codebooks.forget()

    def _draw(self, latents: Tensor, generator: torch.Generator, regularization: Regularization) -> _Draws:
        B, T, _ = latents.shape
        quantized_B = torch.rand(B, generator=generator) < regularization.quantize_rate
        dropped_B = torch.rand(B, generator=generator) < regularization.dropout_rate
        first = self.num_semantic + 1
        count_B = torch.randint(first, self.num_quantizers + 1, (B,), generator=generator)
        count_B = torch.where(dropped_B, count_B, self.num_quantizers)
        priority_BT = torch.rand(B, T, generator=generator)
        semantic_B = torch.rand(B, generator=generator) < regularization.semantic_rate
        count_B = torch.where(semantic_B, self.num_semantic, count_B)
        quantized_B = quantized_B | semantic_B
        return _Draws(*(x.to(latents.device) for x in (count_B, quantized_B, priority_BT)))


class _Part(NamedTuple):
    latents: Tensor
    quantized: Tensor
    commitment: Tensor
    codes: Tensor


class ResidualQuantizer(torch.nn.Module):
    """Residual vector quantiser (Zeghidour et al. 2021, section III-C) between two projections.

    Args:
        config: sizes of the codec.
        count: N.
    """

    def __init__(self, config: CodecConfig, count: int) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.codebook_dim
        self.input = torch.nn.Conv1d(hidden, dim, 1, bias=False)
        self.output = torch.nn.Conv1d(dim, hidden, 1, bias=False)
        variance_preserving_init(self)
        self.codebooks = Codebooks(count, config.codebook_size, dim)

    @property
    def learns(self) -> bool:
        """Whether training updates the codebooks: they have no gradient, and are frozen with their projections."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, latents: Tensor, draws: _Draws | None = None) -> _Part:
        """Quantise latents (B, T, H), and with `draws` count the codewords used; see :class:`QuantizerOutput`."""
        x = self.input(latents.transpose(1, 2)).transpose(1, 2)
        B, T, D = x.shape
        count = self.codebooks.count
        if draws is not None:
            self.codebooks.sample(x.detach(), draws.priority)
        if not self.codebooks.ready:  # before the first update
            passed = self._project(x)
            return _Part(passed, passed, x.new_zeros(B, count), x.new_zeros(B, count, T, dtype=torch.long))
        codes, sums = self.codebooks.quantize(x.detach().float().flatten(0, 1), count)
        sums = sums.unflatten(1, (B, T))  # (N, B, T, D) sums of the first 1 to N codewords
        commitment = (x.float() - sums).square().mean((2, 3)).T
        chosen = sums[-1]
        if draws is not None:
            self.codebooks.accumulate(x.detach().float(), sums, codes.unflatten(1, (B, T)), draws.count)
            used_BN = torch.arange(count, device=x.device) < draws.count[:, None]
            commitment = commitment * used_BN
            chosen = sums[draws.count.clamp(min=1) - 1, torch.arange(B, device=x.device)]
        quantized = passed = self._project(x + (chosen.to(x.dtype) - x).detach())
        if draws is not None:
            passed = torch.where(draws.quantized[:, None, None], quantized, self._project(x))
            passed = passed * (draws.count > 0)[:, None, None]
        return _Part(passed, quantized, commitment, codes.unflatten(1, (B, T)).transpose(0, 1))

    def encode(self, latents: Tensor, count: int) -> Tensor:
        """Codes of the first `count` codebooks, (B, T, H) -> (B, count, T)."""
        x = self.input(latents.transpose(1, 2)).transpose(1, 2)
        codes, _ = self.codebooks.quantize(x.float().flatten(0, 1), count)
        return codes.unflatten(1, x.shape[:2]).transpose(0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Latents of codes of the first n codebooks, (B, n, T) -> (B, T, H)."""
        return self._project(self.codebooks.lookup(codes).to(self.output.weight.dtype))

    def _project(self, x: Tensor) -> Tensor:
        return self.output(x.transpose(1, 2)).transpose(1, 2)
