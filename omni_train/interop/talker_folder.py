"""``config.json`` of a folder of our own names, ``format=omni_talker``, which holds a Talker of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omni_train.checkpoint.sharded import described
from omni_train.errors import UserError, first_line
from omni_train.recipe.schema import ModelConfig

MODEL_TYPE = "omni_train_talker"
_KEYS = ("name", "vocab_size", "initializer_range", "talker")


def read_talker_config(config: Mapping[str, Any], file: Path) -> ModelConfig:
    """Model with a Talker from a ``config.json``.

    Args:
        config: content of the file.
        file: its path, for messages.

    Raises:
        UserError: the file is of another kind, or a key is missing, unknown or has a value of another type.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(f"{file}: model_type={config.get('model_type')}; format=omni_talker reads {MODEL_TYPE}")
    try:
        model = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(ModelConfig), {key: config[key] for key in _KEYS if key in config})
        )
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {first_line(error)}; must be as format=omni_talker writes it") from error
    assert isinstance(model, ModelConfig)
    if model.talker is None:
        raise UserError(f"{file}: talker is missing; must be as format=omni_talker writes it")
    return model


def talker_config(model: ModelConfig) -> dict[str, Any]:
    """``config.json`` of a model with a Talker, without the type of its parameters."""
    values = described(model)
    return {"model_type": MODEL_TYPE, **{key: values[key] for key in _KEYS}}
