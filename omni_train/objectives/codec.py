"""Objectives of the speech codec and of Code2Wav alone: spectral and adversarial losses, and those of the quantiser.

Every loss is a mean over a crop, and the crops of the global batch count alike, however they are divided among rows and
ranks. Axis letters: B crops, S samples, N codebooks, K frames of codes.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import torch

from omni_train.data.rows.batch import WaveRow
from omni_train.models.code2wav import Code2Wav, frame_samples
from omni_train.models.codec import Regularization, SpeechCodec
from omni_train.models.discriminators import Discriminators
from omni_train.objectives.adversarial import adversarial_losses
from omni_train.objectives.base import Forward, GlobalBatch, NetworksObjective, Outcome
from omni_train.objectives.semantic import TEACHER_SAMPLING_RATE, Teacher, cosine_distance, to_frames
from omni_train.objectives.spectral import MelDistance, resampled
from omni_train.recipe.schema import CodecTrainingConfig, required


class WaveTraining(NetworksObjective):
    """Objective of a generator of waveforms and of the discriminators that learn beside it.

    Metrics, means over crops: ``loss`` of the generator without adversarial and feature losses, so that it means the
    same before and after ``adversarial_start`` and on held-out crops; ``loss_…`` of each part, unweighted; and
    ``discriminators_right``, the fraction of the discriminators' logits that tell real from generated rightly.

    Args:
        generator: SpeechCodec or Code2Wav.
        discriminators: of real and generated waveforms.
        config: weights and settings of the losses.
        sampling_rate: of the waveforms, in Hz.
        frame_samples: samples of a frame of codes.
    """

    def __init__(
        self,
        generator: torch.nn.Module,
        discriminators: Discriminators,
        config: CodecTrainingConfig,
        sampling_rate: int,
        frame_samples: int,
    ) -> None:
        self.networks = {"generator": generator, "discriminators": discriminators}
        self.config, self.sampling_rate, self.frame_samples = config, sampling_rate, frame_samples
        self.mel = MelDistance(config.mel_windows, config.mel_bins, sampling_rate, config.mel_floor)

    def weight(self, row: WaveRow) -> float:
        """Weight of a row: its crops."""
        return float(len(row.lengths))

    def tokens(self, row: WaveRow) -> float:
        """Frames of codes of a row in which there is speech."""
        return float((-(-row.lengths // self.frame_samples)).sum())

    def run(self, networks: Mapping[str, Any], row: WaveRow, batch: GlobalBatch) -> Outcome:
        """See :class:`NetworksObjective`. Before ``adversarial_start`` the discriminators have no loss, and rest."""
        training, total_weight = batch.training, batch.weight
        device = next(self.networks["generator"].parameters()).device
        real_BS, lengths_B = row.waveform.to(device), row.lengths.to(device)
        config, outcome = self.config, Outcome()
        with torch.set_grad_enabled(training):
            generated_BS, parts = self.synthesize(networks["generator"], row, real_BS, lengths_B, training)
            real_BS = real_BS[:, : generated_BS.shape[1]]
            lengths_B = lengths_B.clamp(max=generated_BS.shape[1])
            mask_BS = torch.arange(generated_BS.shape[1], device=device) < lengths_B[:, None]
            generated_BS = generated_BS.float() * mask_BS
            mel_B, linear_mel_B = self.mel(generated_BS, real_BS, lengths_B)
            parts |= {
                "mel": (config.mel_weight, mel_B),
                "linear_mel": (config.linear_mel_weight, linear_mel_B),
            }
            loss_B = reduce(add, (weight * part_B for weight, part_B in parts.values()))
            values = {"loss": loss_B} | {f"loss_{name}": part_B for name, (_, part_B) in parts.items()}
            of_game = dict.fromkeys(
                ("loss_adversarial", "loss_features", "loss_discriminators", "discriminators_right")
            )
            loss = loss_B.sum()
            adversarial = config.adversarial_weight > 0 or config.feature_weight > 0
            if training and adversarial and batch.step >= config.adversarial_start:
                game = adversarial_losses(
                    networks["discriminators"],
                    self.networks["discriminators"],
                    generated_BS,
                    real_BS,
                    lengths_B,
                    config,
                )
                # Not the value of the adversarial losses, but their gradient: it must not pass the discriminators.
                loss = loss + (generated_BS * game.waveform_gradient).sum()
                outcome.losses["discriminators"] = game.discriminators.sum() / total_weight
                found = (game.generator, game.features, game.discriminators, game.accuracy)
                of_game = dict(zip(of_game, found, strict=True))
            if training:
                outcome.losses["generator"] = loss / total_weight
        for name, value_B in (values | of_game).items():
            outcome.metrics[name] = (0.0, 0.0) if value_B is None else (value_B.detach().sum(), self.weight(row))
        return outcome

    @abstractmethod
    def synthesize(
        self, generator: Callable, row: WaveRow, real_BS: torch.Tensor, lengths_B: torch.Tensor, training: bool
    ) -> tuple[torch.Tensor, dict[str, tuple[float, torch.Tensor]]]:
        """Waveforms (B, up to S) that the generator makes of a row, and losses of its own: name -> (weight, (B,))."""


class CodecTraining(WaveTraining):
    """Objective of the codec, waveform to codes and back, with codebook 0 distilled from a teacher as in Mimi.

    Mimi: Défossez et al. 2024, "Moshi", section 3.3. With ``perceptual_weight`` the decoder learns to make sounds in
    which the teacher hears what it hears in the recording, a deep feature loss (Germain et al. 2018, "Speech Denoising
    with Deep Feature Losses"): in a spectrum every bin counts alike, and few of them tell one word from another.

    Args:
        codec: built with the teacher's ``size``.
        discriminators: of real and generated waveforms.
        config: weights and settings of the losses.
        seed: of the recipe.
        teacher: of codebook 0, which without one learns from the waveform alone.
    """

    def __init__(
        self,
        codec: SpeechCodec,
        discriminators: Discriminators,
        config: CodecTrainingConfig,
        seed: int,
        teacher: Teacher | None = None,
    ) -> None:
        frame = frame_samples(required(codec.code2wav))
        super().__init__(codec, discriminators, config, codec.config.sampling_rate, frame)
        self.codec, self.seed, self.teacher = codec, seed, teacher
        self.harder = Regularization(config.quantized_fraction, config.quantizer_dropout, config.semantic_alone)

    def synthesize(
        self, generator: Callable, row: WaveRow, real_BS: torch.Tensor, lengths_B: torch.Tensor, training: bool
    ) -> tuple[torch.Tensor, dict[str, tuple[float, torch.Tensor]]]:
        # Seeded by the row's own numbers, so that the draw is the same in every layout.
        drawn = torch.Generator().manual_seed(_number(row.draws.cpu().numpy().tobytes())) if training else None
        dtype = self.codec.bridge.weight.dtype
        output = generator(real_BS.to(dtype), drawn, self.harder if training else None)
        parts = {"commitment": (self.config.commitment_weight, output.commitment.mean(1))}
        if self.teacher is not None:
            distance_B = self._semantic(self.teacher, output.semantic, row, lengths_B)
            parts["semantic"] = (self.config.semantic_weight, distance_B)
            if self.config.perceptual_weight:
                heard_B = self._perceptual(self.teacher, output.waveform, row, real_BS, lengths_B)
                parts["perceptual"] = (self.config.perceptual_weight, heard_B)
        return output.waveform, parts

    def prepare(self, engine: Forward, rows: list[WaveRow]) -> list[WaveRow]:
        """Rows with the teacher's features (B, T, D) of their speech."""
        if self.teacher is None:
            return rows
        device = next(self.networks["generator"].parameters()).device
        with engine.on_device(*self.teacher.modules), torch.no_grad():
            heard = [self._features(self.teacher, row.waveform.to(device), row.lengths) for row in rows]
        return [
            replace(row, prepared=row.prepared | {"teacher": of_row}) for row, of_row in zip(rows, heard, strict=True)
        ]

    def _features(self, teacher: Teacher, waveform_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        waveforms = resampled(waveform_BS, self.sampling_rate, TEACHER_SAMPLING_RATE)
        lengths = (lengths_B * TEACHER_SAMPLING_RATE // self.sampling_rate).clamp_min(1).tolist()
        return teacher([waveform[:length] for waveform, length in zip(waveforms, lengths, strict=True)])

    def _perceptual(
        self,
        teacher: Teacher,
        generated_BS: torch.Tensor,
        row: WaveRow,
        real_BS: torch.Tensor,
        lengths_B: torch.Tensor,
    ) -> torch.Tensor:
        """Distance (B,) of the teacher's features of the generated waveform from those of the real one."""
        # The decoder does not reach the end of the crop: there the teacher hears the recording in both.
        whole_BS = torch.cat([generated_BS.float(), real_BS[:, generated_BS.shape[1] :]], dim=1)
        features_BTD = self._features(teacher, whole_BS, lengths_B)
        starts_T = torch.arange(features_BTD.shape[1], device=lengths_B.device) * self.sampling_rate / teacher.rate
        return cosine_distance(features_BTD, row.prepared["teacher"], starts_T < lengths_B[:, None])

    def _semantic(
        self, teacher: Teacher, student_BKD: torch.Tensor, row: WaveRow, lengths_B: torch.Tensor
    ) -> torch.Tensor:
        features_BTD, frames = row.prepared["teacher"], student_BKD.shape[1]
        teacher_BKD = to_frames(features_BTD, teacher.rate, frames, self.sampling_rate / self.frame_samples)
        starts_K = torch.arange(frames, device=lengths_B.device) * self.frame_samples
        return cosine_distance(student_BKD, teacher_BKD, starts_K < lengths_B[:, None])

    def after_step(self, step: int) -> dict[str, float]:
        """Move the codebooks towards the vectors that the global batch gave them; metrics of their use. Collective."""
        generator = torch.Generator().manual_seed(_number(f"codebooks {self.seed} {step}".encode()))
        usage = self.codec.quantizer.update(generator, self.config.codebook_decay, self.config.dead_usage)
        return {
            "codebook_used": float(usage.used.mean()),
            "codebook_perplexity": float(usage.perplexity.mean()),
            "codewords_revived": float(usage.revived.sum()),
        }

    def after_skipped_step(self) -> None:
        """Let the codebooks forget the vectors of the global batch."""
        self.codec.quantizer.forget()


class Code2WavTraining(WaveTraining):
    """Objective of Code2Wav alone, on the codes of a trained codec.

    Args:
        code2wav: the generator.
        discriminators: of real and generated waveforms.
        config: weights and settings of the losses; those of a quantiser have no meaning here.
        sampling_rate: of the waveforms, in Hz.
    """

    def __init__(
        self, code2wav: Code2Wav, discriminators: Discriminators, config: CodecTrainingConfig, sampling_rate: int
    ) -> None:
        super().__init__(code2wav, discriminators, config, sampling_rate, frame_samples(code2wav.config))

    def synthesize(
        self, generator: Callable, row: WaveRow, real_BS: torch.Tensor, lengths_B: torch.Tensor, training: bool
    ) -> tuple[torch.Tensor, dict[str, tuple[float, torch.Tensor]]]:
        assert row.codes is not None  # validation asks for data.codec
        return generator(row.codes.to(real_BS.device), clamp=False), {}


def _number(data: bytes) -> int:
    """Seed made of bytes, the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) >> 1
