"""A trained recognizer beside the codec: teacher of codebook 0, and transcriber of resynthesized speech."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from omni_train import platform
from omni_train.checkpoint.integrity import require_intact
from omni_train.checkpoint.plain import is_plain, read_network
from omni_train.checkpoint.sharded import read_model_config
from omni_train.checkpoint.store import resolve
from omni_train.data.rows.codes import content_hash
from omni_train.data.rows.transcripts import split_tag
from omni_train.data.samples.features.mel import log_mel, log_mel_with_gradient
from omni_train.data.samples.lengths import audio_tokens_per_second
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.errors import UserError
from omni_train.models.recognizer import SpeechRecognizer
from omni_train.recipe.schema import (
    DataConfig,
    EvaluationConfig,
    ParallelConfig,
    Precision,
    Recipe,
    RecognizerHead,
    Recompute,
)
from omni_train.rollout.transcribe import boundaries, transcribe, transcribe_by_ctc

WHOLE_CLIPS = 0
LONGEST_TRANSCRIPT = 2048  # tokens: ten minutes of quick speech
SHORTEST = 0.2  # seconds; a shorter clip is padded with silence


class FrozenRecognizer:
    """A recognizer of a checkpoint, frozen, in fp32.

    As a teacher (:class:`omni_train.objectives.semantic.Teacher`) it returns the audio encoder's outputs.

    Args:
        checkpoint: a checkpoint of network=recognizer.
        recipe: recipe of the codec; its tokenizer must be the one that the recognizer was trained with.

    Raises:
        UserError: the checkpoint holds another network, or no CTC head where ``evaluation.recognizer_head`` is ctc.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe) -> None:
        if not is_plain(checkpoint) or (model := read_model_config(checkpoint)).recognizer is None:
            raise UserError(
                f"{checkpoint}: no recognizer; evaluation.recognizer is a checkpoint of network=recognizer, "
                "codec_training.teacher is one too or a folder of a WavLM model"
            )
        self.by_ctc = recipe.evaluation.recognizer_head is RecognizerHead.ctc
        if self.by_ctc and not model.recognizer.ctc:
            raise UserError(
                f"{checkpoint}: no CTC head; set evaluation.recognizer_head=decoder, or name a recognizer that was "
                "trained with model.recognizer.ctc=true"
            )
        settings = replace(recipe, model=model, precision=Precision.fp32, recompute=Recompute.none)
        self.model = SpeechRecognizer(settings)
        self.model.load_state_dict(read_network(checkpoint, "model"))
        self.model.eval().requires_grad_(False)
        self.audio, self.config, self.max_new_tokens = model.audio, model.recognizer, recipe.evaluation.max_new_tokens
        self.tokenizer, self.vocab_size = Tokenizer(recipe.data.tokenizer), model.vocab_size
        self.rate, self.size = audio_tokens_per_second(model.audio), model.audio.hidden_size

    @property
    def content_hash(self) -> str:
        """Hash of its weights and sizes."""
        tensors = {name: one for name, one in self.model.state_dict().items() if isinstance(one, torch.Tensor)}
        return content_hash(tensors, {"audio": asdict(self.audio), "recognizer": asdict(self.config)})

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Modules that hold the recognizer's weights."""
        return [self.model]

    def __call__(self, waveforms: list[torch.Tensor]) -> torch.Tensor:
        """Audio encoder's outputs (B, T, D) of waveforms (n,) at 16 kHz, zeros behind the end of a waveform."""
        mels = [
            log_mel_with_gradient(F.pad(waveform, (0, _missing(len(waveform)))), self.audio.num_mel_bins)
            for waveform in waveforms
        ]
        hidden_AH, lengths = self.model.encode_audio(torch.cat(mels), boundaries(mels), WHOLE_CLIPS)
        return torch.nn.utils.rnn.pad_sequence(hidden_AH.split(lengths), batch_first=True)

    def transcribe(self, waveforms: list[np.ndarray]) -> list[str]:
        """Transcripts of waveforms (n,) at 16 kHz, the audio encoder attending to the whole of each."""
        mels = [self._mel(waveform) for waveform in waveforms]
        if self.by_ctc:
            heard = transcribe_by_ctc(self.model, mels, window_frames=WHOLE_CLIPS)
            return [self.tokenizer.decode(tokens).strip() for tokens in heard]
        written = transcribe(
            self.model,
            mels,
            window_frames=WHOLE_CLIPS,
            start_token=self.tokenizer.im_start,
            stop_token=self.tokenizer.im_end,
            max_new_tokens=self.max_new_tokens,
        )
        words = [[token for token in one.tokens if token != self.tokenizer.im_end] for one in written]
        return [split_tag(tokens, self.tokenizer)[1] for tokens in words]

    def _mel(self, waveform: np.ndarray) -> np.ndarray:
        return log_mel(np.pad(waveform, (0, _missing(len(waveform)))), self.audio.num_mel_bins)


def _missing(samples: int) -> int:
    """Samples of silence that a clip is padded with."""
    return max(0, round(SHORTEST * 16000) - samples)


def open_recognizer(checkpoint: str, recipe: Recipe) -> FrozenRecognizer:
    """The recognizer of a checkpoint, or of a run's latest. Collective.

    Raises:
        UserError: there is no checkpoint, or it is damaged, or it holds another network.
    """
    found = resolve(checkpoint)
    require_intact(found, recipe.checkpoint.verify, only=("model.pt", "model*.safetensors"))
    return FrozenRecognizer(found, recipe)


def open_transcriber(checkpoint: str, tokenizer: str) -> FrozenRecognizer:
    """The recognizer of a checkpoint, or of a run's latest, in a process that has no recipe and no other ranks.

    Args:
        checkpoint: as in :func:`open_recognizer`.
        tokenizer: folder of the tokenizer that it was trained with.

    Raises:
        UserError: as :func:`open_recognizer`, or the tokenizer has more tokens than the recognizer.
    """
    platform.init_distributed()
    platform.parallel.initialize(ParallelConfig(), seed=0)
    recipe = Recipe(
        data=DataConfig(tokenizer=tokenizer), evaluation=EvaluationConfig(max_new_tokens=LONGEST_TRANSCRIPT)
    )
    found = open_recognizer(checkpoint, recipe)
    if found.tokenizer.size > found.vocab_size:
        raise UserError(
            f"{tokenizer} has {found.tokenizer.size} tokens, more than the {found.vocab_size} of {checkpoint}; give "
            "the tokenizer that the recognizer was trained with"
        )
    return found
