"""The parts of a model. Keys have the names of the published Hugging Face configurations."""

from __future__ import annotations

from dataclasses import dataclass

from omni_train.recipe.keys import Change, key
from omni_train.recipe.schema.stack import StackConfig
from omni_train.recipe.schema.talker import TalkerConfig


@dataclass
class AudioEncoderConfig:
    """AuT, the audio encoder: 2-D convolutions over log-mel frames of 10 ms, then bidirectional self-attention.

    The defaults are Qwen3.5-Omni's rate, 6.25 tokens a second. Qwen3-Omni as released has three convolutions and chunks
    of 100 frames.
    """

    hidden_size: int = key(ge=1, help="width")
    num_hidden_layers: int = key(ge=1, help="layers of attention")
    num_attention_heads: int = key(ge=1, help="heads; they divide hidden_size")
    intermediate_size: int = key(ge=1, help="width of the MLPs")
    num_mel_bins: int = key(128, ge=1, help="mel bins of a frame")
    conv_channels: int = key(480, ge=1, help="channels of the convolutions")
    num_convolutions: int = key(4, ge=1, help="convolutions; each halves time and mel bins")
    chunk_frames: int = key(800, ge=1, help="frames convolved by themselves; positions restart in each")
    train_window_frames: list[int] = key(
        [100, 200, 400, 800, 0],
        ge=0,
        not_empty=True,
        resume=Change.learned,
        help="frames that attend to each other, 0 for the whole clip; one is drawn for each batch in training",
    )
    eval_window_frames: int = key(
        800, ge=0, resume=Change.free, help="frames that attend to each other in evaluation; 0 for the whole clip"
    )


@dataclass
class VisionEncoderConfig:
    """The SigLIP2-like vision encoder of Qwen3-VL and Qwen3.5, attending within each frame."""

    hidden_size: int = key(ge=1, help="width; a multiple of 4·num_heads")
    depth: int = key(ge=1, help="layers")
    num_heads: int = key(ge=1, help="heads of attention")
    intermediate_size: int = key(ge=1, help="width of the MLPs")
    patch_size: int = key(16, ge=1, help="pixels of a patch, each way")
    temporal_patch_size: int = key(2, ge=1, help="frames of a patch")
    spatial_merge_size: int = key(2, ge=1, help="patches that become one token, each way")
    num_position_embeddings: int = key(2304, ge=1, help="places of a square table, interpolated to each image's grid")
    deepstack_visual_indexes: list[int] = key(
        [],
        help="layers whose features are added to the first layers of the language model, in this order (Qwen3-Omni)",
    )


@dataclass
class ThinkerConfig(StackConfig):
    """The Thinker's language model: Qwen3.5's hybrid MoE, its dense sibling, or Qwen3-Omni's."""

    tie_word_embeddings: bool = key(False, help="the output projection is the embedding")
    mtp_num_hidden_layers: int = key(0, ge=0, le=1, help="multi-token-prediction layers")
    mtp_loss_weight: float = key(0.1, ge=0, resume=Change.learned, help="weight of the multi-token-prediction loss")


@dataclass
class RecognizerConfig:
    """The decoder that writes what the audio encoder hears: causal, with cross-attention, over the text tokenizer."""

    hidden_size: int = key(ge=1, help="width")
    num_hidden_layers: int = key(ge=1, help="layers")
    num_attention_heads: int = key(ge=1, help="heads; they divide hidden_size")
    intermediate_size: int = key(ge=1, help="width of the MLPs")
    ctc: bool = key(False, help="a head on the encoder for the auxiliary CTC loss")


@dataclass
class CodecConfig:
    """The codec's encoder and quantiser; names as in `transformers`' MimiConfig."""

    sampling_rate: int = key(24000, ge=1, help="samples a second")
    num_filters: int = key(64, ge=1, help="channels of the first convolution; each stride doubles them")
    upsampling_ratios: list[int] = key([8, 6, 5, 4], ge=1, not_empty=True, help="strides, last one first")
    num_residual_layers: int = key(1, ge=0, help="residual units before each stride")
    kernel_size: int = key(7, ge=1, help="samples that the first convolution sees")
    last_kernel_size: int = key(3, ge=1, help="frames that the last convolution sees")
    residual_kernel_size: int = key(3, ge=1, help="places that a residual unit's convolution sees")
    dilation_growth_rate: int = key(2, ge=1, help="growth of the dilation from one residual unit to the next")
    compress: int = key(2, ge=1, help="how many times narrower a residual unit is inside")
    hidden_size: int = key(512, ge=1, help="width of the transformer")
    num_hidden_layers: int = key(8, ge=1, help="layers of the transformer")
    num_attention_heads: int = key(8, ge=1, help="query heads; a multiple of num_key_value_heads")
    num_key_value_heads: int = key(8, ge=1, help="key-value heads")
    head_dim: int = key(64, ge=1, help="width of a head, an even number")
    intermediate_size: int = key(2048, ge=1, help="width of the MLPs")
    sliding_window: int = key(250, ge=1, help="frames that attention looks back, at twice the rate of the codes")
    rope_theta: float = key(10000.0, gt=0, help="base of the rotary frequencies")
    norm_eps: float = key(1e-5, gt=0, help="epsilon of the norms")
    layer_scale_initial_scale: float = key(0.01, help="scale of a fresh layer's output")
    num_quantizers: int = key(16, ge=1, help="codebooks")
    num_semantic_quantizers: int = key(1, ge=1, help="codebooks of meaning, the first ones; fewer than num_quantizers")
    codebook_size: int = key(2048, ge=1, help="codewords of a codebook")
    codebook_dim: int = key(256, ge=1, help="width of a codeword")


@dataclass
class Code2WavConfig:
    """Codes to waveform; names as in the released Qwen3-Omni."""

    codebook_size: int = key(2048, ge=1, help="codewords of a codebook")
    num_quantizers: int = key(16, ge=1, help="codebooks")
    hidden_size: int = key(1024, ge=1, help="width of the transformer; a multiple of 2·num_attention_heads")
    num_hidden_layers: int = key(8, ge=1, help="layers of the transformer")
    num_attention_heads: int = key(16, ge=1, help="query heads; a multiple of num_key_value_heads")
    num_key_value_heads: int = key(16, ge=1, help="key-value heads")
    intermediate_size: int = key(3072, ge=1, help="width of the MLPs")
    sliding_window: int = key(72, ge=1, help="frames that attention looks back")
    rope_theta: float = key(10000.0, gt=0, help="base of the rotary frequencies")
    rms_norm_eps: float = key(1e-5, gt=0, help="epsilon of the norms")
    layer_scale_initial_scale: float = key(0.01, help="scale of a fresh layer's output")
    upsampling_ratios: list[int] = key([2, 2], ge=1, help="strides of the first convolutions after the transformer")
    upsample_rates: list[int] = key([8, 5, 4, 3], ge=1, help="strides of the decoder, each halving its channels")
    decoder_dim: int = key(1536, ge=1, help="channels that the decoder begins with")


def required[Part](part: Part | None) -> Part:
    """A part of the model where there is no work without it: validation refuses a recipe that lacks it."""
    assert part is not None, "validation refuses a model without this part"
    return part


@dataclass
class ModelConfig:
    """The parts of a model; a run builds, prints and checks those that its network is made of."""

    name: str = key(resume=Change.free, help="name of the model; a run is called after it")
    vocab_size: int = key(ge=1, help="ids of the text tokenizer, with room; a multiple of parallel.tensor")
    initializer_range: float = key(
        0.02, gt=0, resume=Change.free, help="standard deviation of fresh weights; the codec's parts have their own"
    )
    thinker: ThinkerConfig | None = key(None)
    audio: AudioEncoderConfig | None = key(None)  # null: does not hear
    vision: VisionEncoderConfig | None = key(None)  # null: does not see
    recognizer: RecognizerConfig | None = key(None)  # what pre-trains `audio`; no part of the Thinker
    talker: TalkerConfig | None = key(None)  # null: does not speak
    codec: CodecConfig | None = key(None)
    code2wav: Code2WavConfig | None = key(None)
