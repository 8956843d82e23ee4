"""Training the speech codec end to end, and Code2Wav alone: spectra, an adversary, and what keeps the codes well.

Every loss is a mean over a crop, and the crops of the global batch count alike, however they are divided among rows and
ranks. Axis letters: B crops, S samples, N codebooks, K frames of codes.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from omni_train.data.rows.batch import WaveRow
from omni_train.models.code2wav import Code2Wav, frame_samples
from omni_train.models.codec import Regularization, SpeechCodec
from omni_train.models.discriminators import Discriminators
from omni_train.objectives.adversarial import play
from omni_train.objectives.base import Forward, GlobalBatch, NetworksObjective, Outcome
from omni_train.objectives.semantic import TEACHER_SAMPLING_RATE, Teacher, cosine_distance, to_frames
from omni_train.objectives.spectral import MelDistance, resampled
from omni_train.recipe.schema import CodecTrainingConfig


class WaveTraining(NetworksObjective):
    """What the two have in common: a generator of waveforms, and discriminators that learn beside it.

    Metrics, means over crops: ``loss`` of the generator without the adversary's part, so that it means the same before
    and after ``adversarial_start`` and on held-out crops; ``loss_…`` of each part, unweighted; and
    ``discriminators_right``, which part of the discriminators' logits is right.

    Args:
        generator: SpeechCodec or Code2Wav.
        discriminators: they judge it.
        config: what counts how much.
        sampling_rate: of the waveforms, in Hz.
        frame_samples: of a frame of codes.
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
        """Crops."""
        return float(len(row.lengths))

    def tokens(self, row: WaveRow) -> float:
        """Frames of codes in which there is speech."""
        return float((-(-row.lengths // self.frame_samples)).sum())

    def run(self, networks: Mapping[str, Any], row: WaveRow, batch: GlobalBatch) -> Outcome:
        """See :class:`NetworksObjective`. Before ``adversarial_start`` without losses of the "
        "discriminators: they rest."""
        training, total_weight = batch.training, batch.weight
        device = next(self.networks["generator"].parameters()).device
        real_BS, lengths_B = row.waveform.to(device), row.lengths.to(device)
        config, outcome = self.config, Outcome()
        with torch.set_grad_enabled(training):
            spoken_BS, parts = self.synthesize(networks["generator"], row, real_BS, lengths_B, training)
            real_BS = real_BS[:, : spoken_BS.shape[1]]
            lengths_B = lengths_B.clamp(max=spoken_BS.shape[1])
            heard_BS = torch.arange(spoken_BS.shape[1], device=device) < lengths_B[:, None]
            spoken_BS = spoken_BS.float() * heard_BS
            mel_B, linear_mel_B = self.mel(spoken_BS, real_BS, lengths_B)
            parts |= {
                "mel": (config.mel_weight, mel_B),
                "linear_mel": (config.linear_mel_weight, linear_mel_B),
            }
            loss_B = sum(weight * part_B for weight, part_B in parts.values())
            values = {"loss": loss_B} | {f"loss_{name}": part_B for name, (_, part_B) in parts.items()}
            game = dict.fromkeys(("loss_adversarial", "loss_features", "loss_discriminators", "discriminators_right"))
            pulled = loss_B.sum()  # with the gradient of the adversary's part, not its value
            judged = config.adversarial_weight > 0 or config.feature_weight > 0
            if training and judged and batch.step >= config.adversarial_start:
                played = play(
                    networks["discriminators"],
                    self.networks["discriminators"],
                    spoken_BS,
                    real_BS,
                    lengths_B,
                    config,
                )
                pulled = pulled + (spoken_BS * played.pull).sum()
                outcome.losses["discriminators"] = played.discriminators.sum() / total_weight
                parts_of_game = (played.generator, played.features, played.discriminators, played.right)
                game = dict(zip(game, parts_of_game, strict=True))
            if training:
                outcome.losses["generator"] = pulled / total_weight
        for name, value_B in (values | game).items():
            outcome.metrics[name] = (0.0, 0.0) if value_B is None else (value_B.detach().sum(), self.weight(row))
        return outcome

    @abstractmethod
    def synthesize(
        self, generator: Callable, row: WaveRow, real_BS: torch.Tensor, lengths_B: torch.Tensor, training: bool
    ) -> tuple[torch.Tensor, dict[str, tuple[float, torch.Tensor]]]:
        """What the generator makes of a row (B, up to S), and its own parts of the loss: name -> (weight, (B,))."""


class CodecTraining(WaveTraining):
    """The codec: waveform to codes and back, with codebook 0 taught what speech means.

    Args:
        codec: built with the teacher's ``size``.
        discriminators: they judge it.
        config: what counts how much.
        seed: of the recipe.
        teacher: None: codebook 0 learns from the waveform alone.
    """

    def __init__(
        self,
        codec: SpeechCodec,
        discriminators: Discriminators,
        config: CodecTrainingConfig,
        seed: int,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(codec, discriminators, config, codec.config.sampling_rate, frame_samples(codec.code2wav))
        self.seed, self.teacher = seed, teacher
        self.harder = Regularization(config.quantized_fraction, config.quantizer_dropout)

    def synthesize(self, generator, row, real_BS, lengths_B, training):
        # Of the row's own numbers: the same in every layout.
        drawn = torch.Generator().manual_seed(_number(row.draws.cpu().numpy().tobytes())) if training else None
        dtype = self.networks["generator"].bridge.weight.dtype
        output = generator(real_BS.to(dtype), drawn, self.harder if training else None)
        parts = {"commitment": (self.config.commitment_weight, output.commitment.mean(1))}
        if self.teacher is not None:
            parts["semantic"] = (self.config.semantic_weight, self._semantic(output.semantic, row, lengths_B))
        return output.waveform, parts

    def prepare(self, engine: Forward, rows: list[WaveRow]) -> list[WaveRow]:
        """Rows with the teacher's features (B, T, D) of their speech."""
        if self.teacher is None:
            return rows
        with engine.on_device(*self.teacher.modules):
            return [replace(row, prepared=row.prepared | {"teacher": self._taught(row)}) for row in rows]

    def _taught(self, row: WaveRow) -> torch.Tensor:
        device = next(self.networks["generator"].parameters()).device
        heard = resampled(row.waveform.to(device), self.sampling_rate, TEACHER_SAMPLING_RATE)
        lengths = (row.lengths * TEACHER_SAMPLING_RATE // self.sampling_rate).clamp_min(1).tolist()
        return self.teacher([clip[:length] for clip, length in zip(heard, lengths, strict=True)])

    def _semantic(self, student_BKD: torch.Tensor, row: WaveRow, lengths_B: torch.Tensor) -> torch.Tensor:
        features_BTD, frames = row.prepared["teacher"], student_BKD.shape[1]
        teacher_BKD = to_frames(features_BTD, self.teacher.rate, frames, self.sampling_rate / self.frame_samples)
        starts_K = torch.arange(frames, device=lengths_B.device) * self.frame_samples
        return cosine_distance(student_BKD, teacher_BKD, starts_K < lengths_B[:, None])

    def after_step(self, step: int) -> dict[str, float]:
        """Move the codebooks to what the global batch used. Collective."""
        generator = torch.Generator().manual_seed(_number(f"codebooks {self.seed} {step}".encode()))
        usage = self.networks["generator"].quantizer.update(
            generator, self.config.codebook_decay, self.config.dead_usage
        )
        return {
            "codebook_used": float(usage.used.mean()),
            "codebook_perplexity": float(usage.perplexity.mean()),
            "codewords_revived": float(usage.revived.sum()),
        }

    def after_skipped_step(self) -> None:
        """Let the codebooks forget the global batch."""
        self.networks["generator"].quantizer.forget()


class Code2WavTraining(WaveTraining):
    """Code2Wav alone, on the codes of a codec that is given.

    Args:
        code2wav: what is trained.
        discriminators: they judge it.
        config: what counts how much; nothing of a quantiser does.
        sampling_rate: of the waveforms, in Hz.
    """

    def __init__(
        self, code2wav: Code2Wav, discriminators: Discriminators, config: CodecTrainingConfig, sampling_rate: int
    ) -> None:
        super().__init__(code2wav, discriminators, config, sampling_rate, frame_samples(code2wav.config))

    def synthesize(self, generator, row, real_BS, lengths_B, training):
        return generator(row.codes.to(real_BS.device), clamp=False), {}


def _number(data: bytes) -> int:
    """A seed."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) >> 1
