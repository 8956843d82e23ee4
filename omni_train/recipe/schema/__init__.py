"""The typed recipe: every key that a run understands, with its type, unit, default and bound.

Hydra composes YAML files from ``recipes/`` onto these dataclasses in struct mode, so a key that is not a field here, or
a value of another type, stops the run before anything is allocated. A new key is one line here, see
:mod:`omni_train.recipe.keys`.
"""

from omni_train.recipe.schema.data import (
    AugmentationConfig,
    ChatTemplate,
    DataConfig,
    LossOn,
    MediaConfig,
    Positions,
    SourceConfig,
)
from omni_train.recipe.schema.model import (
    AudioEncoderConfig,
    Code2WavConfig,
    CodecConfig,
    ModelConfig,
    RecognizerConfig,
    ThinkerConfig,
    VisionEncoderConfig,
    required,
)
from omni_train.recipe.schema.run import (
    CheckpointConfig,
    EngineName,
    ParallelConfig,
    Precision,
    Recipe,
    Recompute,
    SafetyConfig,
    TrackingConfig,
    Verify,
    WandbMode,
)
from omni_train.recipe.schema.training import (
    AdversarialLoss,
    CodecTrainingConfig,
    Decay,
    DiscriminatorConfig,
    EvaluationConfig,
    FrozenConfig,
    Normalizer,
    OptimizerConfig,
    OptimizerName,
    ParamGroupConfig,
    RecognitionConfig,
    ScheduleConfig,
    ZeroConfig,
)

__all__ = [
    "AdversarialLoss",
    "AudioEncoderConfig",
    "AugmentationConfig",
    "ChatTemplate",
    "CheckpointConfig",
    "Code2WavConfig",
    "CodecConfig",
    "CodecTrainingConfig",
    "DataConfig",
    "Decay",
    "DiscriminatorConfig",
    "EngineName",
    "EvaluationConfig",
    "FrozenConfig",
    "LossOn",
    "MediaConfig",
    "ModelConfig",
    "Normalizer",
    "OptimizerConfig",
    "OptimizerName",
    "ParallelConfig",
    "ParamGroupConfig",
    "Positions",
    "Precision",
    "Recipe",
    "RecognitionConfig",
    "RecognizerConfig",
    "Recompute",
    "SafetyConfig",
    "ScheduleConfig",
    "SourceConfig",
    "ThinkerConfig",
    "TrackingConfig",
    "Verify",
    "VisionEncoderConfig",
    "WandbMode",
    "ZeroConfig",
    "required",
]
