"""Sound that is made piece by piece is that of the whole, in a memory that does not grow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from omni_train.models.codec import SpeechCodec
from omni_train.rollout.waveform import WaveStream
from tests.support.codec import CODE2WAV, CODEC
from tests.support.speech import randomized


@pytest.fixture(scope="module")
def codec():
    return randomized(SpeechCodec(CODEC, replace(CODE2WAV, num_hidden_layers=2)))


def frames(number, seed=11):
    return np.random.default_rng(seed).integers(0, CODEC.codebook_size, (CODEC.num_quantizers, number))


def memory(stream) -> int:
    """Bytes behind all tensors of a stream's state, also where these are views of larger ones."""
    tensors = [one for kept in stream.state.values() for one in (kept if isinstance(kept, tuple) else (kept,))]
    return sum(one.untyped_storage().nbytes() for one in tensors if isinstance(one, torch.Tensor))


@pytest.mark.parametrize("piece", [1, 3, 8])
def test_pieces_add_up_to_the_whole(codec, piece):
    codes = frames(41)
    stream = WaveStream(codec.to_code2wav(), piece)
    waveforms = [stream.add(one) for one in codes.T]
    assert [bool(len(one)) for one in waveforms] == [(m + 1) % piece == 0 for m in range(41)]
    streamed = np.concatenate([*waveforms, stream.end()])
    whole = codec.decode(torch.from_numpy(codes)[None])[0].numpy()
    assert whole.std() > 0.01
    np.testing.assert_allclose(streamed, whole, rtol=0, atol=1e-4)
    assert len(stream.end()) == 0


@pytest.mark.parametrize("piece", [1, 3])
def test_memory_does_not_grow_with_the_speech(codec, piece):
    stream, sizes = WaveStream(codec.to_code2wav(), piece), []
    for one in frames(90).T:
        stream.add(one)
        sizes.append(memory(stream))
    assert sizes[-1] == sizes[30 - 30 % piece + piece - 1] > 0


def test_a_piece_has_a_frame(codec):
    with pytest.raises(ValueError, match="frames=0: must be at least 1"):
        WaveStream(codec.to_code2wav(), 0)
