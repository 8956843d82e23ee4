"""Table of the kinds of media: all that differs between sound, images and videos is in it.

The readers of files are imported when the first file is read: training on rows needs the names alone.
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
"""Modalities: a sample counts as the last of these that it has. The kinds of media add theirs."""


class MediumKind(ABC):
    """Kind of media: of a file that stands in a chat.

    Attributes:
        name: type of its parts in ``key.json``, and the key that names the file.
        modalities: modalities that a sample with it may count as.
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
        """Encoders that a medium needs, ``audio``, ``vision``: without one a sample is refused as ``no_…_encoder``."""

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
        """Clip of a medium: its features, and how they are laid out among the tokens.

        Args:
            medium: the medium.
            data: bytes of the file.
            model: model of the recipe.
            media: media settings of the recipe.
            max_tokens: most tokens of a medium that ``shrinks``, beside those of its sound and timestamps.
            sound_tokens: most audio tokens; longer sound is decoded no further.

        Raises:
            SampleError: the file cannot be read; or ``too_long`` for longer sound.
        """


class Sound(MediumKind):
    """Sound: audio alone."""

    name, modalities, timed, wandb = "audio", ("audio",), True, "Audio"

    def encoders(self, medium: Medium) -> tuple[str, ...]:
        return ("audio",)

    def read(self, medium, data, model, media, *, max_tokens=None, sound_tokens=None) -> Clip:
        from omni_train.data.samples.clips import read_sound

        return read_sound(medium, data, model, media, sound_tokens)


class Picture(MediumKind):
    """Image."""

    name, modalities, wandb = "image", ("image",), "Image"

    def encoders(self, medium: Medium) -> tuple[str, ...]:
        return ("vision",)

    def read(self, medium, data, model, media, *, max_tokens=None, sound_tokens=None) -> Clip:
        from omni_train.data.samples.clips import read_picture

        return read_picture(data, model, media)


class Film(MediumKind):
    """Video, with its sound where a part says ``sound``."""

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
    """Add a kind of media. The module that does so must be named in OMNI_TRAIN_PLUGINS, for other processes read too.

    Raises:
        ValueError: there is another of that name, or with one of its modalities.
    """
    if kind.name in _KINDS or set(kind.modalities) & set(MODALITIES):
        raise ValueError(f"{kind.name} with {', '.join(kind.modalities)}: a kind of media has these names already")
    _KINDS[kind.name] = kind
    MODALITIES.extend(kind.modalities)


for _kind in (Sound(), Picture(), Film()):
    register_medium(_kind)


def medium_kinds() -> dict[str, MediumKind]:
    """Kinds of media by name.

    Raises:
        UserError: a module of OMNI_TRAIN_PLUGINS cannot be imported.
    """
    plugins.load()
    return _KINDS
