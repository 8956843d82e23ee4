"""How a run learns and how it is asked while it does: optimizer, schedule, losses, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omni_train.recipe.keys import Change, key
from omni_train.recipe.schema.speech import SpeechScheduleConfig


class OptimizerName(StrEnum):
    adamw = "adamw"
    muon = "muon"


class Decay(StrEnum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


class Normalizer(StrEnum):
    """How transcripts are written before their errors are counted."""

    basic = "basic"  # small letters, no punctuation, one way of writing each character
    whisper = (
        "whisper"  # English as Whisper's normalizer writes it: numbers in digits, no contractions; others as basic
    )


class AdversarialLoss(StrEnum):
    """What discriminators and generator play for."""

    hinge = "hinge"  # EnCodec, Mimi
    least_squares = "least_squares"  # HiFi-GAN, DAC


@dataclass
class ParamGroupConfig:
    """Overrides for the parameters whose full name matches a pattern; the first match wins."""

    match: str = key(help="fnmatch pattern over names such as `embedding.word_embeddings.weight`")
    lr_factor: float = key(1.0, ge=0, help="factor of the learning rate")
    weight_decay_factor: float = key(1.0, ge=0, help="factor of the weight decay")


@dataclass
class OptimizerConfig:
    """The optimizer and its rates."""

    name: OptimizerName = key(OptimizerName.adamw, resume=Change.kept, help="optimizer; choose it with optimizer=")
    lr: float = key(gt=0, first=True, help="highest learning rate")
    min_lr: float = key(0.0, ge=0, help="learning rate that decay ends at")
    betas: list[float] = key([0.9, 0.95], ge=0, lt=1, help="decays of AdamW's two moments")
    eps: float = key(1.0e-8, gt=0, help="epsilon of AdamW")
    weight_decay: float = key(0.1, ge=0, help="decoupled weight decay; never on norms, biases, A_log and dt_bias")
    clip_grad: float = key(1.0, ge=0, help="most global L2 norm of the gradient; 0 does not clip")
    ema_decay: float = key(
        0.0,
        ge=0,
        lt=1,
        resume=Change.kept,
        help="decay of an average of the weights, evaluated and saved beside them; 0: none. engine=deepspeed only",
    )
    groups: list[ParamGroupConfig] = key([], resume=Change.kept)


@dataclass
class ScheduleConfig:
    """Length of the run and learning-rate shape. Lengths are steps, or tokens where `tokens` is set."""

    steps: int = key(ge=0, first=True, help="optimizer steps of the run; 0 writes the initial checkpoint and ends")
    tokens: int | None = key(
        None, ge=1, help="stop after this many tokens (padding excluded) instead; steps is then an upper bound"
    )
    global_batch: int = key(ge=1, first=True, help="rows per optimizer step, over all data ranks")
    warmup_fraction: float = key(0.01, ge=0, le=1, help="warm-up, as a part of the run's length")
    decay: Decay = key(Decay.cosine, help="shape of the learning rate after warm-up")
    decay_fraction: float = key(0.1, ge=0, le=1, help="decay of `wsd`, as a part of the run's length")
    log_every: int = key(1, ge=1, help="steps between lines of metrics.jsonl; the last is always logged")
    eval_every: int = key(0, ge=0, help="steps between held-out losses; 0 never evaluates")
    eval_rows: int = key(8, ge=1, help="held-out rows per evaluation, over all data ranks")
    stop_after: int | None = key(
        None, ge=1, help="end (and save) after this step without changing the schedule's shape"
    )


class RecognizerHead(StrEnum):
    """What of a recognizer writes what it hears."""

    decoder = "decoder"  # the attention decoder, which also knows what is usually said
    ctc = "ctc"  # the CTC head, which hears each word by itself


@dataclass
class EvaluationConfig:
    """Greedy answers to held-out samples while the run goes on, scored by what was asked (``meta.task``)."""

    every: int = key(0, ge=0, help="steps between evaluations; 0 never")
    samples: int = key(32, ge=1, help="samples of each source that has chats, shared among the data ranks")
    max_new_tokens: int = key(64, ge=1, help="tokens of an answer, at most")
    normalizer: Normalizer = key(
        Normalizer.basic,
        help="how transcripts are written before errors are counted: basic, small letters without punctuation; "
        "whisper, English as Whisper's normalizer does",
    )
    print_samples: int = key(4, ge=0, help="answers shown, and kept by wandb beside their media")
    swap_media: bool = key(
        False,
        help="also the loss of the answers with their own media and with those of another sample: what hearing and "
        "seeing gain",
    )
    utterance_seconds: float = key(
        20.0, gt=0, help="of each held-out utterance that the codec makes again; the rest is cut off"
    )
    recognizer: str | None = key(
        None,
        checkpoint=True,
        help="of codec and Talker: a recognizer's checkpoint that writes down what they say and the originals, for "
        "word error rates; null: the codec's teacher, where that is one",
    )
    recognizer_head: RecognizerHead = key(
        RecognizerHead.decoder,
        help="what of that recognizer writes: decoder, which knows what is usually said too; ctc, which hears each "
        "word by itself",
    )
    codec: str | None = key(
        None,
        checkpoint=True,
        help="of the Talker: a checkpoint of network=codec or code2wav, which makes its codes sound",
    )
    speech_schedules: list[SpeechScheduleConfig] = key(
        [],
        help="of the Talker: schedules that held-out texts are spoken with, whatever their weights; of several, "
        "metrics have suffixes such as `_turns_4_4`. []: the first of data.speech.schedules",
    )
    speech_temperature: float = key(
        0.9, ge=0, help="of the Talker: temperature of codebook 0; 0 takes the most probable codes, residual too"
    )
    speech_frames_per_token: float | None = key(
        None,
        gt=0,
        help="of the Talker: frames that are expected for each text token, for schedules of kind=tightest and lead; "
        "null: the mean of the held-out recordings",
    )


@dataclass
class ZeroConfig:
    """DeepSpeed's ZeRO: what the data ranks share among them instead of each having all of it."""

    stage: int = key(1, ge=0, le=3, help="0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too")
    offload_optimizer: bool = key(False, help="the optimizer's state lies in the host's memory")
    whole_below: int = key(100000, ge=0, help="stage 3: parameters of fewer elements stay whole on every rank")


@dataclass
class FrozenConfig:
    """Models that a network learns with and that do not learn: teachers, references."""

    offload: bool = key(False, help="their weights wait in the host's memory between steps")


@dataclass
class RecognitionConfig:
    """How the recognizer learns, and how it is asked while it does."""

    ctc_weight: float = key(
        0.0, ge=0, help="weight of the auxiliary CTC loss beside the decoder's; needs model.recognizer.ctc"
    )
    beam: int = key(
        1, ge=1, resume=Change.free, help="hypotheses kept by the search for held-out transcripts; 1 is greedy"
    )
    eval_windows: list[int] = key(
        [100],
        ge=1,
        remedy="whole clips are always evaluated",
        resume=Change.free,
        help="held-out clips are heard whole, and again with attention windows of these frames, as in streaming",
    )


@dataclass
class DiscriminatorConfig:
    """Who tells speech from resynthesised speech: one complex STFT discriminator per window, one per period."""

    stft_windows: list[int] = key([2048, 1024, 512, 256, 128], help="samples of each window; hops of a quarter")
    stft_channels: int = key(32, ge=1, help="channels of the STFT discriminators")
    periods: list[int] = key([2, 3, 5, 7, 11], ge=1, help="samples of each period")
    period_channels: list[int] = key(
        [32, 128, 512, 1024, 1024], ge=1, help="channels of each layer of the period discriminators"
    )


@dataclass
class CodecTrainingConfig:
    """How the codec, or Code2Wav alone, learns. The weights of mel, features and adversary are DAC's (section 4.3)."""

    mel_windows: list[int] = key(
        [32, 64, 128, 256, 512, 1024, 2048], not_empty=True, help="samples of each mel spectrogram's window"
    )
    mel_bins: list[int] = key([5, 10, 20, 40, 80, 160, 320], ge=1, help="mel bins, for each window")
    # Where recordings have digital silence a low floor makes that the loudest part of the gradient.
    mel_floor: float = key(
        1.0e-5,
        gt=0,
        help="amplitude, of full scale 1, added before the logarithm: what is below is hardly heard",
    )
    mel_weight: float = key(15.0, ge=0, help="weight of the distance of log-mel spectrograms")
    linear_mel_weight: float = key(0.0, ge=0, help="weight of the distance of mel spectrograms as they are")
    commitment_weight: float = key(0.25, ge=0, help="weight of the quantiser's commitment loss")
    adversarial: AdversarialLoss = key(AdversarialLoss.hinge, help="what discriminators and generator play for")
    adversarial_weight: float = key(1.0, ge=0, help="weight of the adversarial loss")
    feature_weight: float = key(2.0, ge=0, help="weight of the distance of the discriminators' features")
    adversarial_start: int = key(0, ge=0, help="steps before discriminators learn and judge")
    discriminators: DiscriminatorConfig = key(DiscriminatorConfig, resume=Change.kept)
    teacher: str | None = key(
        None,
        checkpoint=True,
        linkable=True,
        resume=Change.kept,
        help="what codebook 0 learns to mean: null, a folder of a WavLM model, or a checkpoint of our recognizer",
    )
    semantic_weight: float = key(1.0, ge=0, help="weight of the cosine distance between teacher and codebook 0")
    perceptual_weight: float = key(
        0.0,
        ge=0,
        help="weight of the cosine distance between the teacher's features of the resynthesis and of the recording",
    )
    quantized_fraction: float = key(
        0.5, ge=0, le=1, help="of the crops; the others reach the decoder without the quantiser (Mimi)"
    )
    codebook_decay: float = key(
        0.99, ge=0, le=1, help="of the moving averages that codewords are; lower where latents move fast"
    )
    dead_usage: float = key(
        0.1, ge=0, le=1, help="codewords used less than this part of their codebook's mean begin anew"
    )
    quantizer_dropout: float = key(
        0.5, ge=0, le=1, help="of the quantised crops, the fraction that keeps its first codebooks only"
    )
    semantic_alone: float = key(
        0.0, ge=0, le=1, help="of the crops, the fraction that codebook 0 alone, quantised, has to make intelligible"
    )
