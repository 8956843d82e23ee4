"""The typed recipe: every key a run understands, its type, unit and default.

Hydra composes YAML files from ``recipes/`` onto these dataclasses in struct mode, so a key that is
not a field here, or a value of another type, stops the run before anything is allocated.
Model fields keep the names of the published Hugging Face configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from omni_train.recipe.speech import (
    AugmentationConfig,
    Code2WavConfig,
    CodecConfig,
    CodecTrainingConfig,
    RecognitionConfig,
    RecognizerConfig,
    ZeroConfig,
)


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass; master weights are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class EngineName(StrEnum):
    """Who owns sharding and the optimizer step."""

    megatron = "megatron"
    deepspeed = "deepspeed"  # ZeRO, for networks that need no tensor or pipeline split


class Decay(StrEnum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


class OptimizerName(StrEnum):
    adamw = "adamw"
    muon = "muon"


class Recompute(StrEnum):
    """What the backward pass computes again instead of keeping."""

    none = "none"
    selective = "selective"
    full = "full"


class WandbMode(StrEnum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Verify(StrEnum):
    all = "all"
    small = "small"  # all but tensors, of which the sizes are compared
    none = "none"


class LossOn(StrEnum):
    """Which turns of a chat are learned. Documents (samples without turns) are always learned whole."""

    assistant = "assistant"
    all = "all"


class ChatTemplate(StrEnum):
    """How chats are written; training has to write what serving will."""

    chatml = "chatml"  # every text as it is
    qwen3_5 = "qwen3_5"  # texts trimmed; answers behind the last question have a block of thinking, empty or not


class Normalizer(StrEnum):
    """How transcripts are written before their errors are counted."""

    basic = "basic"  # small letters, no punctuation, one way of writing each character
    whisper = (
        "whisper"  # English as Whisper's normalizer writes it: numbers in digits, no contractions; others as basic
    )


class Positions(StrEnum):
    """Rotary ids (TM-RoPE) of media; text always counts on by one."""

    absolute = "absolute"  # video's time ids lie on the 160 ms grid of the audio tokens (Qwen3.5-Omni)
    contiguous = "contiguous"  # every temporal patch counts on, time is in the text timestamps (Qwen3.5)
    qwen3_omni = "qwen3_omni"  # as released: float times, 13 ids a second, sound interleaved with video, no timestamps


@dataclass
class AudioEncoderConfig:
    """AuT, the audio encoder: 2-D convolutions over log-mel frames of 10 ms, then bidirectional self-attention.

    The defaults are Qwen3.5-Omni's rate, 6.25 tokens a second. Qwen3-Omni as released has three convolutions and chunks
    of 100 frames.
    """

    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    intermediate_size: int = MISSING
    num_mel_bins: int = 128
    conv_channels: int = 480
    num_convolutions: int = 4  # each halves time and mel bins
    chunk_frames: int = 800  # convolved by themselves; positions restart in each
    # Frames that attend to each other, 0 for the whole clip: one is drawn for each batch in training.
    train_window_frames: list[int] = field(default_factory=lambda: [100, 200, 400, 800, 0])
    eval_window_frames: int = 800


@dataclass
class VisionEncoderConfig:
    """The SigLIP2-like vision encoder of Qwen3-VL and Qwen3.5, attending within each frame."""

    hidden_size: int = MISSING
    depth: int = MISSING  # layers
    num_heads: int = MISSING
    intermediate_size: int = MISSING
    patch_size: int = 16  # pixels
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # patches that become one token, each way
    num_position_embeddings: int = 2304  # a square table, interpolated to each image's grid
    # DeepStack (Qwen3-Omni): layers whose features are added to the first layers of the language model, in this order.
    deepstack_visual_indexes: list[int] = field(default_factory=list)


@dataclass
class ThinkerConfig:
    """The Thinker's language model: Qwen3.5's hybrid MoE, its dense sibling, or Qwen3-Omni's."""

    hidden_size: int = MISSING
    # Megatron's pattern string of one block, G = Gated DeltaNet, * = gated attention, E = MoE, - = dense MLP,
    # written `repeats` times. `|` may mark pipeline (and virtual pipeline) stage ends when repeats is 1;
    # without it the stages are cut evenly.
    pattern: str = "GEGEGE*E"
    repeats: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = 256
    partial_rotary_factor: float = 0.25
    rope_theta: float = 1.0e7
    mrope_section: list[int] = field(default_factory=lambda: [11, 11, 10])  # T, H, W; sums to half the rotary dims
    linear_num_key_heads: int = 0  # of Gated DeltaNet (`G`); 0 where the pattern has none
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    intermediate_size: int = 0  # of a dense MLP (`-`); 0 where the pattern has none
    num_experts: int = 0  # 0 where the pattern has no MoE
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0  # 0: no shared expert
    # Megatron's normalisation: the auxiliary loss is 1 at perfect balance (transformers' is top_k there).
    router_aux_loss_coef: float = 1.0e-3
    rms_norm_eps: float = 1.0e-6
    tie_word_embeddings: bool = False
    mtp_num_hidden_layers: int = 0  # 0 or 1 multi-token-prediction layer
    mtp_loss_weight: float = 0.1
    max_position_embeddings: int = 262144
    attention_output_gate: bool = True  # Qwen3-Omni has none
    zero_centered_norm: bool = True  # y = x̂·(1+w); Qwen3-Omni's norms are plain


@dataclass
class ModelConfig:
    """The parts of a model; a run builds, prints and checks those that its network is made of."""

    name: str = MISSING
    vocab_size: int = MISSING  # of the text tokenizer's ids, with room; a multiple of parallel.tensor
    initializer_range: float = 0.02  # standard deviation of fresh weights, of the codec's parts their own
    thinker: ThinkerConfig | None = None
    audio: AudioEncoderConfig | None = None  # null: does not hear
    vision: VisionEncoderConfig | None = None  # null: does not see
    recognizer: RecognizerConfig | None = None  # what pre-trains `audio`; no part of the Thinker
    codec: CodecConfig | None = None
    code2wav: Code2WavConfig | None = None


@dataclass
class ParallelConfig:
    """How many ways each axis is split. Data parallelism is what remains of the world."""

    tensor: int = 1  # with sequence parallelism whenever > 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks per pipeline rank
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1


@dataclass
class SourceConfig:
    """One folder of energon-indexed WebDataset shards in the blend."""

    path: str = MISSING  # local, or an object-store URL that energon understands (msc://, s3://…)
    weight: float = 1.0  # share of the tokens drawn


@dataclass
class MediaConfig:
    """How sound, images and video become tokens. Sizes of patches and rates of tokens are the model's."""

    positions: Positions = Positions.absolute
    video_timestamps: bool = True  # `<1.2 seconds>` in text before every temporal patch; never with qwen3_omni
    # Bounds in seconds of the random interval between timestamps inside a sound; empty: none.
    audio_timestamp_seconds: list[float] = field(default_factory=lambda: [10.0, 30.0])
    image_min_pixels: int = 65536  # an image is resized to lie between the two, its shape kept
    image_max_pixels: int = 16777216
    video_fps: float = 2.0  # frames read per second; fewer where the token budget would be passed
    video_min_frames: int = 4
    video_max_frames: int = 768
    video_min_pixels: int = 4096  # of all frames of a video together
    video_max_pixels: int = 25165824
    video_pixels_per_frame: bool = False  # the two bound each frame by itself (Qwen3-Omni) instead
    max_source_pixels: int = 178956970  # of an image or frame as encoded; larger is refused before it is decoded
    max_audio_seconds: float = 36000.0  # less where a row holds less: 10 h are read into 2.3 GB, and more as features
    # Of a video file, up to 1920 x 1080; of larger ones as many fewer as they are larger. It bounds the time of one
    # that is small and has no end.
    max_source_frames: int = 1000000
    max_media: int = 1024  # of one sample


@dataclass
class DataConfig:
    name: str = MISSING
    path: str = MISSING  # base that the sources refer to
    sources: list[SourceConfig] = field(default_factory=list)
    tokenizer: str = MISSING  # folder with tokenizer.json (and tokenizer_config.json)
    rows: str = "chats"  # what they are made of; the kinds are in omni_train/data/rows/kinds.py
    row_tokens: int = MISSING  # T, tokens of one packed row; frames of the codec where rows are crops
    crop_seconds: float = 12.0  # of speech in a crop, a whole number of the codec's frames
    # Crops come with the codes that `omni-train data codes` wrote: the checkpoint of the codec that made them, or its
    # content hash. Codes of another codec are refused. null: crops are waveforms alone.
    codec: str | None = None
    # Every packed sequence is padded to a multiple of this, whatever the layout, so that all layouts see the same
    # rows; a multiple of 2·parallel.context.
    alignment: int = 16
    loss_on: LossOn = LossOn.assistant
    chat_template: ChatTemplate = ChatTemplate.chatml  # what the template in the tokenizer's folder does
    media: MediaConfig = field(default_factory=MediaConfig)
    augmentation: AugmentationConfig | None = None  # of transcribed clips; null: they are heard as they are
    # Independent sequences of rows that the data are cut into. A run's rows depend on it, and not on workers or the
    # number of data ranks; fixed for a run's life, and a multiple of data ranks x workers.
    streams: int = 8
    workers: int = 2  # loader processes per data rank; 0 loads in the training process
    shuffle_buffer: int = 1000  # samples, in each stream
    packing_buffer: int = 256  # samples considered together by best-fit packing, in each stream
    max_skip_fraction: float = 0.01  # of samples; above it (after 1,000 samples) the run stops
    # What one sample may cost a process: its files together are read into memory, and text takes some 200 bytes a
    # character while it becomes tokens. Larger ones are refused before they are read.
    max_sample_bytes: int = 2147483648
    max_text_bytes: int = 8388608  # of its key.json


@dataclass
class ParamGroupConfig:
    """Overrides for the parameters whose full name matches a pattern; the first match wins."""

    match: str = MISSING  # fnmatch pattern over names such as `embedding.word_embeddings.weight`
    lr_factor: float = 1.0
    weight_decay_factor: float = 1.0


@dataclass
class OptimizerConfig:
    name: OptimizerName = OptimizerName.adamw
    lr: float = MISSING
    min_lr: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1.0e-8
    weight_decay: float = 0.1  # never on norms, biases, A_log and dt_bias
    clip_grad: float = 1.0  # global L2 norm; 0 does not clip
    # Decay of a moving average of the weights, evaluated and saved beside them; 0: none. engine=deepspeed only.
    ema_decay: float = 0.0
    groups: list[ParamGroupConfig] = field(default_factory=list)


@dataclass
class ScheduleConfig:
    """Length of the run and learning-rate shape. Lengths are steps, or tokens where `tokens` is set."""

    steps: int = MISSING  # 0 writes the initial checkpoint and ends
    tokens: int | None = None  # stop after this many tokens (padding excluded) instead; steps is then an upper bound
    global_batch: int = MISSING  # rows per optimizer step, over all data ranks
    warmup_fraction: float = 0.01  # of the run's length
    decay: Decay = Decay.cosine
    decay_fraction: float = 0.1  # of the run's length, `wsd` only
    log_every: int = 1  # steps; the last is always logged
    eval_every: int = 0  # steps; 0 never evaluates
    eval_rows: int = 8  # held-out rows per evaluation, over all data ranks
    stop_after: int | None = None  # end (and save) after this step without changing the schedule's shape


@dataclass
class EvaluationConfig:
    """Greedy answers to held-out samples while the run goes on, scored by what was asked (``meta.task``)."""

    every: int = 0  # steps; 0 never
    samples: int = 32  # of each source that has chats, shared among the data ranks
    max_new_tokens: int = 64
    normalizer: Normalizer = Normalizer.basic  # of transcripts
    print_samples: int = 4  # answers shown, and kept by wandb beside their media
    # Also the loss of the answers with their own media and with those of another sample: what hearing and seeing gain.
    swap_media: bool = False
    utterance_seconds: float = 20.0  # of each held-out utterance that the codec makes again; the rest is cut off
    # Of the codec: a recognizer's checkpoint that writes down originals and resyntheses, for their word error rates;
    # null: the teacher, where that is one.
    recognizer: str | None = None


@dataclass
class CheckpointConfig:
    save_every: int = 1000  # steps; the last step is always saved
    keep: int = 3  # newest complete checkpoints kept; 0 keeps all
    asynchronous: bool = True  # of engine=megatron; the other's are small, and the run waits for them
    verify: Verify = Verify.all  # which files of a checkpoint are compared with their digests before it is read
    max_failures: int = 3  # saves in a row that cannot be written end the run; the last save has as many tries


@dataclass
class TrackingConfig:
    """wandb, and the load of each expert. metrics.jsonl is always written."""

    mode: WandbMode = WandbMode.disabled
    expert_load_every: int = 100  # steps between two lines of expert_load.jsonl; 0 writes none
    project: str = "omni_train"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class SafetyConfig:
    max_nonfinite_steps: int = 3  # in a row; each is skipped and counted, one more stops the run
    hang_seconds: int = 1800  # a step, load or save longer than this dumps all stacks and exits


@dataclass
class FrozenConfig:
    """Models that a network learns with and that do not learn: teachers, references."""

    offload: bool = False  # their weights wait in the host's memory between steps


@dataclass
class Recipe:
    """A whole run."""

    stage: str = MISSING
    run: str = MISSING  # name; files go to runs_dir/run
    runs_dir: str = "runs"
    seed: int = 1234
    precision: Precision = Precision.bf16
    network: str = "thinker"  # a network of omni_train/networks, or of one's own
    engine: EngineName = EngineName.megatron
    zero: ZeroConfig = field(default_factory=ZeroConfig)  # of engine=deepspeed
    recognition: RecognitionConfig = field(default_factory=RecognitionConfig)  # of network=recognizer
    codec_training: CodecTrainingConfig = field(default_factory=CodecTrainingConfig)  # of network=codec and code2wav
    init_from: str | None = None  # a checkpoint directory, or a run directory (its latest)
    # fnmatch pattern over parameter names -> another checkpoint, or `random`; the first match wins over init_from.
    init_parts: dict[str, str] = field(default_factory=dict)
    trainable: list[str] = field(default_factory=lambda: ["*"])  # fnmatch patterns; all else is frozen
    recompute: Recompute = Recompute.none
    loss_chunk_tokens: int = 1024  # positions whose logits exist at once
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
