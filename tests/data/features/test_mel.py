"""Log-mel frames against transformers' Whisper feature extractor."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from omni_train.data.samples.features import mel
from omni_train.data.samples.features.mel import log_mel, log_mel_with_gradient


def reference(waveform: np.ndarray, bins: int) -> np.ndarray:
    """(F, M): the frames that the extractor's own mask keeps."""
    extractor = WhisperFeatureExtractor(feature_size=bins)
    features = extractor(
        waveform, sampling_rate=16000, padding=True, truncation=False, return_attention_mask=True, return_tensors="np"
    )
    return features["input_features"][0].T[: features["attention_mask"][0].sum()]


@pytest.mark.parametrize("samples", [201, 319, 320, 16001, 48037, 480000 + 77])
@pytest.mark.parametrize("bins", [128, 80])
def test_log_mel_equals_whispers(samples, bins):
    rng = np.random.default_rng(samples)
    waveform = (rng.standard_normal(samples) * np.linspace(0.0, 0.3, samples)).astype(np.float32)
    found = log_mel(waveform, bins)
    assert found.shape == (samples // 160, bins) and found.dtype == np.float32
    np.testing.assert_allclose(found, reference(waveform, bins), atol=1e-4)


@pytest.mark.parametrize("samples", [201, 319, 16001])
def test_log_mel_with_gradient_is_the_same(samples):
    generator = torch.Generator().manual_seed(samples)
    waveform = torch.randn(samples, generator=generator, dtype=torch.float32) * torch.linspace(0.1, 0.3, samples)
    waveform.requires_grad_()
    found = log_mel_with_gradient(waveform, 80)
    np.testing.assert_allclose(found.detach().numpy(), log_mel(waveform.detach().numpy(), 80), atol=1e-4)
    direction, weights = (torch.randn(shape, generator=generator) for shape in (waveform.shape, found.shape))
    (found * weights).sum().backward()
    ahead, behind = (
        (log_mel_with_gradient((waveform + step * direction).detach().double(), 80).double() * weights).sum()
        for step in (1e-4, -1e-4)
    )
    slope = float(ahead - behind) / 2e-4
    assert float((waveform.grad * direction).sum()) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("samples", [160 * 14 - 1, 160 * 14, 160 * 14 + 1, 160 * 15 + 39])
def test_chunks_join_without_a_seam_and_share_one_maximum(samples, monkeypatch):
    waveform = np.random.default_rng(3).standard_normal(samples).astype(np.float32) * 1e-3
    waveform[:300] *= 1e3  # loud at first: the floor of the quiet rest comes from another chunk
    monkeypatch.setattr(mel, "CHUNK_FRAMES", 7)
    np.testing.assert_allclose(log_mel(waveform), reference(waveform, 128), atol=1e-4)


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (159, 0), (160, 1), (200, 1)])
def test_clips_shorter_than_a_window(samples, frames):
    found = log_mel(np.ones(samples, dtype=np.float32))
    assert found.shape == (frames, 128) and np.isfinite(found).all()
