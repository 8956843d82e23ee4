"""Small recognizers and rows of random clips and words, without files or Hydra."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from omni_train.data.rows.batch import IGNORE, MODALITIES, PackedBatch
from omni_train.data.rows.packing import pack
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.samples.lengths import audio_tokens
from omni_train.recipe.schema import AudioEncoderConfig, Precision, Recipe, RecognizerConfig
from tests.support.encoders import randomized
from tests.support.thinker import VOCAB, small_recipe

AUDIO_PAD, START, STOP, TAG_END = 1, 2, 3, 4
FIRST_WORD = 5
CLIPS = [(161, 3), (33, 1), (520, 9), (16, 2), (300, 0)]  # frames, words


def recognizer_recipe(*, ctc: bool = False, precision: Precision = Precision.fp32, **changes) -> Recipe:
    audio = AudioEncoderConfig(
        hidden_size=28,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=36,
        num_mel_bins=20,
        conv_channels=5,
        train_window_frames=[32, 100, 0],
        eval_window_frames=48,
    )
    recognizer = RecognizerConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, ctc=ctc
    )
    return small_recipe(audio=audio, recognizer=recognizer, network="recognizer", precision=precision, **changes)


def build(recipe: Recipe):
    """A recognizer with random parameters, the same in every call."""
    import torch

    from omni_train import platform
    from omni_train.models.recognizer import SpeechRecognizer

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    torch.manual_seed(19)
    return randomized(SpeechRecognizer(recipe))


def write_recognizer(recipe: Recipe, checkpoint: Path) -> dict:
    """Write a recognizer with random parameters as the ZeRO engine does; its tensors."""
    import torch

    from omni_train.checkpoint.plain import write_networks
    from omni_train.checkpoint.sharded import described

    state = {key: value for key, value in build(recipe).state_dict().items() if isinstance(value, torch.Tensor)}
    checkpoint.mkdir(parents=True)
    write_networks(checkpoint, {"model": state})
    torch.save(described(recipe.model), checkpoint / "model.pt")
    (checkpoint / "metadata.json").write_text("{}")
    return state


def utterance(recipe: Recipe, frames: int, words: int, seed: int) -> TokenSequence:
    """A clip of noise and random words, in the layout of ``omni_train.data.rows.transcripts``."""
    generator = np.random.default_rng(seed)
    heard = audio_tokens(frames, recipe.model.audio)
    written = [FIRST_WORD, TAG_END, *generator.integers(FIRST_WORD, VOCAB, words).tolist(), STOP]
    labels = np.full(heard + 1 + len(written), IGNORE, dtype=np.int32)
    labels[heard:-1] = written
    return TokenSequence(
        np.array([AUDIO_PAD] * heard + [START, *written], dtype=np.int32),
        labels,
        modality=MODALITIES.index("audio"),
        mel=[generator.standard_normal((frames, recipe.model.audio.num_mel_bins), dtype=np.float32)],
        audio_slots=np.arange(heard),
    )


def utterances(recipe: Recipe, clips=CLIPS) -> list[TokenSequence]:
    return [utterance(recipe, frames, words, seed) for seed, (frames, words) in enumerate(clips)]


def row_of(sequences: list[TokenSequence], alignment: int = 8) -> PackedBatch:
    """A row with some padding behind."""
    tokens = sum(-(-len(sequence) // alignment) * alignment for sequence in sequences) + 3 * alignment
    return pack(sequences, row_tokens=tokens, alignment=alignment, padding_token=0)
