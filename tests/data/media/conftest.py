import pytest

from omni_train.data.samples.media.frames import Packets
from omni_train.recipe.schema import MediaConfig, VisionEncoderConfig


@pytest.fixture
def media() -> MediaConfig:
    return MediaConfig()


@pytest.fixture
def vision() -> VisionEncoderConfig:
    return VisionEncoderConfig(hidden_size=8, depth=1, num_heads=1, intermediate_size=8)


@pytest.fixture
def decodings(monkeypatch) -> list:
    """What every decoding of a video gives from here on: the place of a packet, and the frame or None."""
    given, decode = [], Packets.decode

    def noting(packets, begin):
        for one in decode(packets, begin):
            given.append(one)
            yield one

    monkeypatch.setattr(Packets, "decode", noting)
    return given
