import pytest

from omni_train.recipe.schema import MediaConfig, VisionEncoderConfig


@pytest.fixture
def media() -> MediaConfig:
    return MediaConfig()


@pytest.fixture
def vision() -> VisionEncoderConfig:
    return VisionEncoderConfig(hidden_size=8, depth=1, num_heads=1, intermediate_size=8)
