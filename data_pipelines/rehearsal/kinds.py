"""The kinds of samples, and the writing of their shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from omni_train.data_pipelines.rehearsal import conversations, lasting, listening, seeing, speaking, text, watching
from omni_train.data_pipelines.rehearsal.phrases import LANGUAGES
from omni_train.data_pipelines.rehearsal.world import HELD_OUT, SHARDS, Sample, World
from omni_train.data_pipelines.shards import write_shard, write_shards

# Folder of samples with media -> what makes a sample, and how many there are in all.
KINDS: dict[str, tuple[Callable[[World], Sample], int]] = {
    "long_audio": (lasting.long_audio, 18),
    "long_video": (lasting.long_video, 45),
    "video_audio": (watching.video_audio, 1800),
    "video": (watching.video, 2700),
    "multi_turn": (conversations.multi_turn, 540),
    "speech": (listening.speech, 3150),
    "audio_questions": (listening.audio_question, 720),
    "images": (seeing.image, 2250),
    "image_questions": (seeing.image_question, 4500),
}
# The same of samples that speak. Their words are those of the others, from which alone the tokenizer learns.
SPOKEN: dict[str, tuple[Callable[[World], Sample], int]] = {
    "spoken_long": (speaking.spoken_long, 36),
    "spoken": (speaking.spoken, 6750),
}


def per_shard(kind: str, share: float) -> int:
    """Samples of each shard of a ``share`` of a kind with media."""
    _, samples = (KINDS | SPOKEN)[kind]
    return max(2, round(share * samples / sum(SHARDS.values())))


def write(
    folder: Path, kind: str, split: str, shard: int, share: float, languages: Sequence[str] = tuple(LANGUAGES)
) -> None:
    """Write ``folder/kind/split-<shard>.tar`` with a ``share`` of its samples, those of SPOKEN in ``languages``.

    Always the same one in a process that has not spoken before (``speech.say``).
    """
    make, _ = (KINDS | SPOKEN)[kind]
    world = World(f"{kind} {shard}", split, languages)
    keys = (f"{kind}-{split}-{shard:02d}-{number:05d}" for number in range(per_shard(kind, share)))
    write_shard(folder / kind / f"{split}-{shard:05d}.tar", ((key, *make(world)) for key in keys))


def write_text(folder: Path, share: float) -> None:
    """Write ``folder/text`` and ``folder/chat``: the standard library, and what the ``share`` of the media asks."""
    documents, chats = text.read()
    for kind, read in (("text", text.usable(documents)), ("chat", chats)):
        held_out = len(read) // HELD_OUT
        for split, samples in (("train", read[held_out:]), ("val", read[:held_out])):
            if kind == "chat":
                samples = samples + conversations.without_media(split, round(2 * share * len(samples)))
            named = [(f"{kind}-{split}-{number:06d}", sample) for number, sample in enumerate(samples)]
            write_shards(folder / kind, split, named, SHARDS[split])
