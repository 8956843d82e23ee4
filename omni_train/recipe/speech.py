"""The typed keys of the audio parts: the recognizer around the audio encoder, the speech codec, and their engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class AdversarialLoss(StrEnum):
    """What discriminators and generator play for."""

    hinge = "hinge"  # EnCodec, Mimi
    least_squares = "least_squares"  # HiFi-GAN, DAC


@dataclass
class RecognizerConfig:
    """The decoder that writes what the audio encoder hears: causal, with cross-attention, over the text tokenizer."""

    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    intermediate_size: int = MISSING
    ctc: bool = False  # a head on the encoder for the auxiliary CTC loss


@dataclass
class CodecConfig:
    """The codec's encoder and quantiser; names as in `transformers`' MimiConfig."""

    sampling_rate: int = 24000
    num_filters: int = 64
    upsampling_ratios: list[int] = field(default_factory=lambda: [8, 6, 5, 4])  # strides, last one first
    num_residual_layers: int = 1
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 2048
    sliding_window: int = 250  # frames, at twice the rate of the codes
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    layer_scale_initial_scale: float = 0.01
    num_quantizers: int = 16
    num_semantic_quantizers: int = 1
    codebook_size: int = 2048
    codebook_dim: int = 256


@dataclass
class Code2WavConfig:
    """Codes to waveform; names as in the released Qwen3-Omni."""

    codebook_size: int = 2048
    num_quantizers: int = 16
    hidden_size: int = 1024
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    intermediate_size: int = 3072
    sliding_window: int = 72
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    layer_scale_initial_scale: float = 0.01
    upsampling_ratios: list[int] = field(default_factory=lambda: [2, 2])
    upsample_rates: list[int] = field(default_factory=lambda: [8, 5, 4, 3])
    decoder_dim: int = 1536


@dataclass
class ZeroConfig:
    """DeepSpeed's ZeRO: what the data ranks share among them instead of each having all of it."""

    stage: int = 1  # 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too
    offload_optimizer: bool = False  # its state in the host's memory
    whole_below: int = 100000  # stage 3: parameters of fewer elements stay whole on every rank


@dataclass
class RecognitionConfig:
    """How the recognizer learns, and how it is asked while it does."""

    ctc_weight: float = 0.0  # of the auxiliary CTC loss beside the decoder's; needs model.recognizer.ctc
    beam: int = 1  # hypotheses kept by the search for held-out transcripts; 1 is greedy
    # Held-out clips are heard whole, and again with attention windows of these frames, as in streaming.
    eval_windows: list[int] = field(default_factory=lambda: [100])


@dataclass
class AugmentationConfig:
    """What the loader does to clips, anew each time that one is read; never in evaluation.

    The names are those of speed perturbation (Ko et al. 2015) and SpecAugment (Park et al. 2019, section 2); the values
    are ours.
    """

    speeds: list[float] = field(default_factory=lambda: [0.9, 1.0, 1.1])  # one is drawn; pitch changes with it
    noise_probability: float = 0.25  # that a clip gets noise, between white and brown
    noise_snr_db: list[float] = field(default_factory=lambda: [5.0, 30.0])  # bounds of its signal-to-noise ratio
    frequency_masks: int = 2
    frequency_mask_bins: int = 27  # widest
    time_masks: int = 2
    time_mask_frames: int = 100  # longest
    time_mask_fraction: float = 0.2  # of the clip that one may hide, at most


@dataclass
class DiscriminatorConfig:
    """Who tells speech from resynthesised speech: one complex STFT discriminator per window, one per period."""

    stft_windows: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128])  # samples; hops of a quarter
    stft_channels: int = 32
    periods: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 11])  # samples
    period_channels: list[int] = field(default_factory=lambda: [32, 128, 512, 1024, 1024])  # of each layer


@dataclass
class CodecTrainingConfig:
    """How the codec, or Code2Wav alone, learns. The weights of mel, features and adversary are DAC's (section 4.3)."""

    mel_windows: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512, 1024, 2048])  # samples
    mel_bins: list[int] = field(default_factory=lambda: [5, 10, 20, 40, 80, 160, 320])  # for each window
    # Amplitude, of full scale 1, added before the logarithm: what is below is hardly heard. Where recordings have
    # digital silence a low floor makes that the loudest part of the gradient.
    mel_floor: float = 1.0e-5
    mel_weight: float = 15.0  # of the distance of log-mel spectrograms
    linear_mel_weight: float = 0.0  # of the distance of mel spectrograms as they are
    commitment_weight: float = 0.25
    adversarial: AdversarialLoss = AdversarialLoss.hinge
    adversarial_weight: float = 1.0
    feature_weight: float = 2.0
    adversarial_start: int = 0  # steps before discriminators learn and judge
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    # What codebook 0 learns to mean: null, a folder of a WavLM model, or a checkpoint of our recognizer.
    teacher: str | None = None
    semantic_weight: float = 1.0  # of the cosine distance between the two
    quantized_fraction: float = 0.5  # of the crops; the others reach the decoder without the quantiser (Mimi)
    codebook_decay: float = 0.99  # of the moving averages that codewords are; lower where latents move fast
    dead_usage: float = 0.1  # codewords used less than this part of their codebook's mean begin anew
    quantizer_dropout: float = 0.5  # of the quantised crops, the fraction that keeps its first codebooks only
