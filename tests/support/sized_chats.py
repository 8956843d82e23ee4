"""Random conversations whose media have sizes and no content, for what depends on sizes alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from omni_train.data.rows.chats import tokenize
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.samples import clips
from omni_train.data.samples.media import Video
from omni_train.data.samples.sample import Chat, Medium, Turn
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import AudioEncoderConfig, LossOn, MediaConfig, ModelConfig, VisionEncoderConfig

WORDS = ("kalan", " moper", "\n", "  ", " 12", "é", "risto.\n", "<0.5 seconds>", " tevin")


@dataclass
class Conversation:
    """A chat, and the sizes of its media in their order."""

    chat: Chat
    samples: dict[str, int] = field(default_factory=dict)  # file -> length of its sound at 16 kHz
    grids: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    seconds: dict[str, np.ndarray] = field(default_factory=dict)  # of each temporal patch

    @property
    def parts(self) -> dict[str, bytes]:
        return {medium.file: medium.file.encode() for medium in self.chat.media}

    def read_audio(self, data: bytes, media, start=None, end=None, most=None) -> np.ndarray:
        return np.zeros(self.samples[data.decode()], dtype=np.float32)

    def read_image(self, data: bytes, media, vision) -> tuple[np.ndarray, tuple[int, int, int]]:
        grid = self.grids[data.decode()]
        return np.zeros((np.prod(grid), 1), dtype=np.uint8), grid

    def read_video(self, data: bytes, media, vision, *, sound, start=None, end=None, max_tokens=None, **_) -> Video:
        patches, grid = self.read_image(data, media, vision)
        seconds = self.seconds[data.decode()]
        waveform = self.read_audio(data, media) if sound else None
        return Video(patches, grid, seconds, self.seconds_per_grid(data.decode()), waveform)

    def seconds_per_grid(self, file: str) -> float:
        seconds = self.seconds[file]
        return float(seconds[1] - seconds[0]) if len(seconds) > 1 else 0.75

    def tokenize(self, monkeypatch, tokenizer: Tokenizer, model: ModelConfig, media: MediaConfig) -> TokenSequence:
        for name in ("read_audio", "read_image", "read_video"):
            monkeypatch.setattr(clips, name, getattr(self, name))
        (sequence,) = tokenize(
            self.chat,
            tokenizer,
            row_tokens=1 << 20,
            loss_on=LossOn.assistant,
            media=media,
            model=model,
            parts=self.parts,
        )
        return sequence


def conversation(seed: int, kinds: str, *, merge: int = 2, spacing: float | None = None) -> Conversation:
    """Turns of text with 1 to 4 media of ``kinds``: (a)udio, (i)mage, silent (v)ideo, video with (s)ound.

    ``spacing`` is the time between temporal patches in seconds, random if not given.
    """
    generator = random.Random(seed)
    made = Conversation(Chat(()))
    turns = []
    number = 0

    def words() -> str:
        return "".join(generator.choices(WORDS, k=generator.choice((0, 1, 3, 40))))

    for _ in range(generator.randint(1, 3)):
        parts: list[str | Medium] = [words()]
        for _ in range(generator.randint(number == 0, 2) if kinds else 0):
            kind = generator.choice(kinds)
            file = f"{number}.{kind}"
            number += 1
            if kind in "as":
                made.samples[file] = generator.choice((161, 16000, 15999, 32160, generator.randint(160, 160 * 2500)))
            if kind in "ivs":
                t = 1 if kind == "i" else generator.randint(1, 6)
                made.grids[file] = (t, merge * generator.randint(1, 9), merge * generator.randint(1, 9))
                step = spacing or generator.choice((0.5, 1.0, 2 / generator.uniform(0.3, 8)))
                made.seconds[file] = step * (np.arange(t) + generator.uniform(0, 1))
            names = {"a": "audio", "i": "image", "v": "video", "s": "video"}
            parts += [Medium(names[kind], file, sound=kind == "s"), words()]
        turns += [Turn("user", tuple(parts)), Turn("assistant", (words(),))]
    made.chat = Chat(tuple(turns))
    return made


def model_with_encoders(merge: int = 2, convolutions: int = 4, chunk_frames: int = 800) -> ModelConfig:
    return ModelConfig(
        audio=AudioEncoderConfig(num_convolutions=convolutions, chunk_frames=chunk_frames),
        vision=VisionEncoderConfig(spatial_merge_size=merge),
    )
