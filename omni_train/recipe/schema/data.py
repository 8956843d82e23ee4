"""The data of a run: which samples, and how they become rows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omni_train.recipe.keys import Change, key
from omni_train.recipe.schema.speech import SpeechConfig


class LossOn(StrEnum):
    """Which turns of a chat are learned. Documents (samples without turns) are always learned whole."""

    assistant = "assistant"
    all = "all"


class ChatTemplate(StrEnum):
    """How chats are written; training has to write what serving will."""

    chatml = "chatml"  # every text as it is
    qwen3_5 = "qwen3_5"  # texts trimmed; answers behind the last question have a block of thinking, empty or not


class Positions(StrEnum):
    """Rotary ids (TM-RoPE) of media; text always counts on by one."""

    absolute = "absolute"  # video's time ids lie on the 160 ms grid of the audio tokens (Qwen3.5-Omni)
    contiguous = "contiguous"  # every temporal patch counts on, time is in the text timestamps (Qwen3.5)
    qwen3_omni = "qwen3_omni"  # as released: float times, 13 ids a second, sound interleaved with video, no timestamps


@dataclass
class SourceConfig:
    """One folder of energon-indexed WebDataset shards in the blend."""

    path: str = key(
        not_empty=True, data=True, help="local folder, or an object-store URL that energon understands (msc://, s3://…)"
    )
    weight: float = key(1.0, gt=0, remedy="leave the source out instead", help="share of the tokens drawn")


@dataclass
class QualityConfig:
    """Bounds of scores that `omni-train data strata` wrote, each [least, greatest], null where there is none.

    A sample is within all that are given; empty, the default, asks for nothing.
    """

    snr_db: list[float | None] = key([], help="signal-to-noise ratio, in dB (WADA)")
    dnsmos: list[float | None] = key([], help="DNSMOS P.835 of the whole, 1 to 5")
    clipping: list[float | None] = key([], help="fraction of the samples at full scale")
    silence: list[float | None] = key([], help="fraction of the frames below -50 dB of full scale")
    seconds: list[float | None] = key([], help="length of the speech")
    seconds_per_token: list[float | None] = key([], help="length per token of its text")
    error_rate: list[float | None] = key(
        [], help="word errors of a recognizer, or of characters without spaces between words"
    )


@dataclass
class StratumConfig:
    """Samples of like quality; a training sample belongs to the first that it matches."""

    name: str = key(not_empty=True, help="name in metrics: letters, digits and _")
    when: QualityConfig = key(QualityConfig)
    weight: float = key(
        1.0, ge=0, help="how often its samples are drawn, relative to those of the others; 0 leaves them out"
    )


@dataclass
class MediaConfig:
    """How sound, images and video become tokens. Sizes of patches and rates of tokens are the model's."""

    positions: Positions = key(
        Positions.absolute,
        help="rotary ids of media: absolute, on the 160 ms grid of the audio tokens (Qwen3.5-Omni); contiguous, one "
        "for each temporal patch (Qwen3.5); qwen3_omni, as released",
    )
    video_timestamps: bool = key(
        True, help="`<1.2 seconds>` in text before every temporal patch; never with positions=qwen3_omni"
    )
    audio_timestamp_seconds: list[float] = key(
        [10.0, 30.0], help="bounds of the random interval between timestamps inside a sound, in seconds; empty: none"
    )
    image_min_pixels: int = key(65536, ge=1, help="least pixels of an image, which is resized with its shape kept")
    image_max_pixels: int = key(16777216, ge=1, help="most pixels of an image")
    video_fps: float = key(2.0, gt=0, help="frames read per second; fewer where the token budget would be passed")
    video_min_frames: int = key(4, ge=1, help="least frames of a video")
    video_max_frames: int = key(768, ge=1, help="most frames of a video")
    video_min_pixels: int = key(4096, ge=1, help="least pixels of all frames of a video together")
    video_max_pixels: int = key(25165824, ge=1, help="most pixels of all frames of a video together")
    video_pixels_per_frame: bool = key(False, help="the two bound each frame by itself instead (Qwen3-Omni)")
    max_source_pixels: int = key(
        178956970, ge=1, help="pixels of an image or frame as encoded; larger is refused before it is decoded"
    )
    # 10 h are read into 2.3 GB, and more as features.
    max_audio_seconds: float = key(36000.0, gt=0, help="seconds of a sound; less where a row holds less")
    # It bounds the time of a file that is small and has no end.
    max_source_frames: int = key(
        1000000, ge=1, help="frames of a video file up to 1920 x 1080; of larger ones as many fewer as they are larger"
    )
    max_media: int = key(1024, ge=1, help="media of one sample")


@dataclass
class AugmentationConfig:
    """What the loader does to clips, anew each time that one is read; never in evaluation.

    The names are those of speed perturbation (Ko et al. 2015) and SpecAugment (Park et al. 2019, section 2); the values
    are ours.
    """

    speeds: list[float] = key(
        [0.9, 1.0, 1.1],
        ge=0.5,
        le=2.0,
        remedy="empty changes none",
        help="speeds of which one is drawn; pitch changes with it",
    )
    noise_probability: float = key(0.25, ge=0, le=1, help="that a clip gets noise, between white and brown")
    noise_snr_db: list[float] = key([5.0, 30.0], help="bounds of its signal-to-noise ratio, in dB")
    frequency_masks: int = key(2, ge=0, help="masks over mel bins")
    frequency_mask_bins: int = key(27, ge=0, help="bins of the widest")
    time_masks: int = key(2, ge=0, help="masks over time")
    time_mask_frames: int = key(100, ge=0, help="frames of the longest")
    time_mask_fraction: float = key(0.2, ge=0, le=1, help="of the clip that one may hide, at most")


@dataclass
class DataConfig:
    """What the rows of a run are made of, and how they are read."""

    name: str = key(resume=Change.free, help="name of the data")
    path: str = key(
        not_empty=True,
        data=True,
        resume=Change.free,  # what refers to it says where the data are
        first=True,
        help="folder, or object-store URL, that sources and tokenizer refer to",
    )
    sources: list[SourceConfig] = key([], not_empty=True, linkable=True)
    strata: list[StratumConfig] = key([])
    tokenizer: str = key(
        not_empty=True, data=True, linkable=True, help="folder with tokenizer.json (and tokenizer_config.json)"
    )
    rows: str = key("chats", help="kind of row, which the network decides")
    row_tokens: int = key(
        ge=1, first=True, help="T, tokens of one packed row; frames of the codec where rows are crops"
    )
    crop_seconds: float = key(12.0, gt=0, help="seconds of speech in a crop, a whole number of the codec's frames")
    codec: str | None = key(
        None,
        checkpoint=True,
        linkable=True,
        help="samples come with the codes that `omni-train data codes` wrote: the checkpoint of the codec that made "
        "them, or its content hash, and codes of another are refused; null: waveforms alone",
    )
    # The same whatever the layout, so that all layouts see the same rows.
    alignment: int = key(
        16, ge=1, help="every packed sequence is padded to a multiple of this, itself one of 2·parallel.context"
    )
    loss_on: LossOn = key(LossOn.assistant, help="turns of a chat that are learned; documents are learned whole")
    chat_template: ChatTemplate = key(
        ChatTemplate.chatml,
        help="how chats are written: chatml, every text as it is; qwen3_5, trimmed, with blocks of thinking. The "
        "template in the tokenizer's folder must agree",
    )
    media: MediaConfig = key(MediaConfig)
    speech: SpeechConfig = key(SpeechConfig)  # of rows=speech
    augmentation: AugmentationConfig | None = key(None)  # of transcribed clips; null: they are heard as they are
    # A run's rows depend on it, and not on workers or the number of data ranks.
    streams: int = key(
        8,
        ge=1,
        help="independent sequences of rows that the data are cut into; a multiple of data ranks x workers",
    )
    workers: int = key(
        2, ge=0, resume=Change.free, help="loader processes per data rank; 0 loads in the training process"
    )
    shuffle_buffer: int = key(1000, ge=0, help="samples that are shuffled, in each stream")
    packing_buffer: int = key(256, ge=1, help="samples considered together by best-fit packing, in each stream")
    max_skip_fraction: float = key(
        0.01, ge=0, le=1, resume=Change.free, help="of samples; above it (after 1,000 samples) the run stops"
    )
    # What one sample may cost a process: its files together are read into memory, and text takes some 200 bytes a
    # character while it becomes tokens.
    max_sample_bytes: int = key(2147483648, ge=1, help="bytes of a sample's files; larger ones are refused unread")
    max_text_bytes: int = key(8388608, ge=1, help="bytes of a sample's key.json; larger ones are refused unread")
