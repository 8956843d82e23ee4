"""The table of the kinds of media: everything that differs between sound, images and videos hangs on it.

What reads files is imported when the first one is read: who trains on rows needs the names alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from omni_train import plugins

if TYPE_CHECKING:
    from omni_train.data.samples.clips import Clip
    from omni_train.data.samples.sample import Medium
    from omni_train.recipe.schema import MediaConfig, ModelConfig

MODALITIES: list[str] = ["text"]
"""What a sample counts as: the last of these that it has. The kinds of media add theirs."""


class MediumKind(ABC):
    """A kind of file that stands in a chat.

    Attributes:
        name: type of its parts in ``key.json``, and the key that names the file.
        modalities: what a sample with it may count as.
        timed: whether a part may give ``start`` and ``end`` in seconds.
        sounds: whether a part may give ``sound``.
        shrinks: whether it takes fewer tokens where there is less room. It is read after all that do not.
        wandb: name of wandb's class for its files; None: they are not shown.
        shown: suffixes of the files that class can show; None: all.
    """

    name: str
    modalities: tuple[str, ...]
    timed: bool = False
    sounds: bool = False
    shrinks: bool = False
    wandb: str | None = None
    shown: tuple[str, ...] | None = None

    @abstractmethod
    def encoders(self, medium: Medium) -> tuple[str, ...]:
        """The parts of the model that it needs: ``audio``, ``vision``. A sample is refused as ``no_…_encoder`` where
        one is missing."""

    @abstractmethod
    def read(
        self,
        medium: Medium,
        data: bytes,
        model: ModelConfig,
        media: MediaConfig,
        *,
        max_tokens: int | None = None,
        sound_tokens: int | None = None,
    ) -> Clip:
        """The features of a file, and how they are laid out among the tokens.

        Args:
            data: of the file.
            max_tokens: of one that ``shrinks``, beside those of its sound and timestamps.
            sound_tokens: sound that becomes more is decoded no further.

        Raises:
            SampleError: it cannot be read; or ``too_long`` for such sound.
        """


class Sound(MediumKind):
    """What is heard."""

    name, modalities, timed, wandb = "audio", ("audio",), True, "Audio"

    def encoders(self, medium: Medium) -> tuple[str, ...]:
        return ("audio",)

    def read(self, medium, data, model, media, *, max_tokens=None, sound_tokens=None) -> Clip:
        from omni_train.data.samples.clips import read_sound

        return read_sound(medium, data, model, media, sound_tokens)


class Picture(MediumKind):
    """What is seen at once."""

    name, modalities, wandb = "image", ("image",), "Image"

    def encoders(self, medium: Medium) -> tuple[str, ...]:
        return ("vision",)

    def read(self, medium, data, model, media, *, max_tokens=None, sound_tokens=None) -> Clip:
        from omni_train.data.samples.clips import read_picture

        return read_picture(data, model, media)


class Film(MediumKind):
    """What is seen over time, and heard where a part says ``sound``."""

    name, modalities = "video", ("video", "video_audio")
    timed = sounds = shrinks = True
    wandb, shown = "Video", (".mp4", ".webm")

    def encoders(self, medium: Medium) -> tuple[str, ...]:
        return ("vision", "audio") if medium.sound else ("vision",)

    def read(self, medium, data, model, media, *, max_tokens=None, sound_tokens=None) -> Clip:
        from omni_train.data.samples.clips import read_film

        return read_film(medium, data, model, media, max_tokens, sound_tokens)


_KINDS: dict[str, MediumKind] = {}


def register_medium(kind: MediumKind) -> None:
    """Add a kind of media. The module that does so has to be named in OMNI_TRAIN_PLUGINS, for other processes read too.

    Raises:
        ValueError: there is one of that name, or one of its modalities.
    """
    if kind.name in _KINDS or set(kind.modalities) & set(MODALITIES):
        raise ValueError(f"{kind.name} with {', '.join(kind.modalities)}: a kind of media has these names already")
    _KINDS[kind.name] = kind
    MODALITIES.extend(kind.modalities)


for _kind in (Sound(), Picture(), Film()):
    register_medium(_kind)


def medium_kinds() -> dict[str, MediumKind]:
    """The kinds of media by name.

    Raises:
        UserError: a module of OMNI_TRAIN_PLUGINS cannot be imported.
    """
    plugins.load()
    return _KINDS
