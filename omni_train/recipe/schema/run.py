"""A whole run: its name, where it starts, its layout, what it saves and what watches it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omni_train.recipe.keys import Change, key
from omni_train.recipe.schema.data import DataConfig
from omni_train.recipe.schema.model import ModelConfig
from omni_train.recipe.schema.speech import TalkerTrainingConfig
from omni_train.recipe.schema.training import (
    CodecTrainingConfig,
    EvaluationConfig,
    FrozenConfig,
    OptimizerConfig,
    RecognitionConfig,
    ScheduleConfig,
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


@dataclass
class ParallelConfig:
    """How many ways each axis is split. Data parallelism is what remains of the world."""

    tensor: int = key(1, ge=1, first=True, help="ways that matrices are split, with sequence parallelism whenever > 1")
    pipeline: int = key(1, ge=1, first=True, help="stages that the layers are cut into")
    virtual_pipeline: int = key(1, ge=1, help="model chunks per pipeline rank")
    context: int = key(1, ge=1, first=True, help="ways that rows are cut")
    expert: int = key(1, ge=1, first=True, help="ways that the experts are shared out")
    expert_tensor: int = key(1, ge=1, help="ways that the matrices of each expert are split")


@dataclass
class CheckpointConfig:
    """When a run saves, and how checkpoints are read."""

    save_every: int = key(1000, ge=1, first=True, help="steps between checkpoints; the last step is always saved")
    keep: int = key(3, ge=0, help="newest complete checkpoints kept; 0 keeps all")
    asynchronous: bool = key(
        True,
        help="with engine=megatron training waits for a copy to the host, not for the disk; the other's checkpoints "
        "are small, and the run waits for them",
    )
    verify: Verify = key(
        Verify.all,
        help="which files of a checkpoint are compared with their digests before it is read; small: of tensors the "
        "sizes alone",
    )
    max_failures: int = key(
        3, ge=1, help="saves in a row that cannot be written end the run; the last save has as many tries"
    )


@dataclass
class TrackingConfig:
    """wandb, and the load of each expert. metrics.jsonl is always written."""

    mode: WandbMode = key(WandbMode.disabled, help="whether wandb is written; choose it with tracking=")
    expert_load_every: int = key(100, ge=0, help="steps between two lines of expert_load.jsonl; 0 writes none")
    project: str = key("omni_train", help="wandb's project")
    entity: str | None = key(None, help="wandb's entity; null: the account's own")
    tags: list[str] = key([], help="wandb's tags of the run")


@dataclass
class SafetyConfig:
    """What a run ends by itself for."""

    max_nonfinite_steps: int = key(3, ge=0, help="in a row; each is skipped and counted, one more stops the run")
    hang_seconds: int = key(1800, ge=1, help="a step, load or save longer than this dumps all stacks and exits")


@dataclass
class Recipe:
    """A whole run."""

    stage: str = key(resume=Change.free, help="name of the stage; stage= chooses its recipe")
    run: str = key(
        not_empty=True,
        resume=Change.free,
        first=True,
        help="name; files go to runs_dir/run. `<stage>-<model>` by itself",
    )
    runs_dir: str = key("runs", not_empty=True, resume=Change.free, help="folder of all runs")
    seed: int = key(
        1234,
        ge=0,
        le=2**62,  # ranks count on from it, and 64 bits hold it
        first=True,
        help="of initialisation, the order of the data, masks and windows",
    )
    precision: Precision = key(
        Precision.bf16,
        resume=Change.learned,
        first=True,
        help="arithmetic of the forward and backward pass; master weights are always fp32",
    )
    network: str = key(
        "thinker", help="what is trained: thinker, talker, recognizer, codec, code2wav, or one of one's own"
    )
    engine: EngineName = key(EngineName.megatron, help="who owns sharding and the optimizer step; deepspeed: ZeRO")
    zero: ZeroConfig = key(ZeroConfig)  # of engine=deepspeed
    recognition: RecognitionConfig = key(RecognitionConfig, resume=Change.learned)  # of network=recognizer
    codec_training: CodecTrainingConfig = key(CodecTrainingConfig, resume=Change.learned)  # of codec and code2wav
    talker_training: TalkerTrainingConfig = key(TalkerTrainingConfig, resume=Change.learned)  # of network=talker
    init_from: str | None = key(
        None, checkpoint=True, first=True, help="where parameters start: a checkpoint, or a run, whose latest is taken"
    )
    init_parts: dict[str, str] = key(
        {},
        checkpoint=True,
        help="fnmatch pattern over parameter names -> another checkpoint or run, or `random`; the first match wins "
        "over init_from",
    )
    trainable: list[str] = key(
        ["*"], not_empty=True, first=True, help="fnmatch patterns over parameter names; all else is frozen"
    )
    recompute: Recompute = key(
        Recompute.none,
        resume=Change.free,
        first=True,
        help="what the backward pass computes again instead of keeping",
    )
    loss_chunk_tokens: int = key(1024, ge=1, resume=Change.free, help="positions whose logits exist at once")
    model: ModelConfig = key(ModelConfig)
    parallel: ParallelConfig = key(ParallelConfig, resume=Change.free)
    data: DataConfig = key(DataConfig)
    frozen: FrozenConfig = key(FrozenConfig, resume=Change.free)
    optimizer: OptimizerConfig = key(OptimizerConfig, resume=Change.learned)
    schedule: ScheduleConfig = key(ScheduleConfig, resume=Change.free)
    evaluation: EvaluationConfig = key(EvaluationConfig, resume=Change.free)
    checkpoint: CheckpointConfig = key(CheckpointConfig, resume=Change.free)
    tracking: TrackingConfig = key(TrackingConfig, resume=Change.free)
    safety: SafetyConfig = key(SafetyConfig, resume=Change.free)
