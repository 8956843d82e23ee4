"""Speech codec: 24 kHz waveforms to 12.5 frames of codes a second and back."""

from omni_train.models.codec.codebooks import Usage, usage_of
from omni_train.models.codec.encoder import CodecEncoder
from omni_train.models.codec.model import CodecOutput, SpeechCodec
from omni_train.models.codec.quantizer import QuantizerOutput, Regularization, SplitQuantizer

__all__ = [
    "CodecEncoder",
    "CodecOutput",
    "QuantizerOutput",
    "Regularization",
    "SpeechCodec",
    "SplitQuantizer",
    "Usage",
    "usage_of",
]
