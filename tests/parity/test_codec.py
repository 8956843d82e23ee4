"""The codec's encoder gives Mimi's codes, and Code2Wav gives transformers' waveforms."""

import pytest
import torch
from transformers import MimiConfig, MimiModel
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeCode2WavConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeCode2Wav

from omni_train.interop.speech import read_code2wav, read_mimi
from omni_train.models.code2wav import Code2Wav
from omni_train.models.codec import SpeechCodec
from tests.support.speech import random_codes, randomized, sound

FILTERS = dict(num_filters=4, upsample_groups=18)
SIZES = dict(hidden_size=18, num_hidden_layers=2, num_attention_heads=3, head_dim=6, intermediate_size=26)
CODEBOOKS = dict(codebook_size=64, codebook_dim=8, vector_quantization_hidden_dimension=8, num_quantizers=9)


@pytest.fixture(scope="module", params=[(11, 1, 3), (250, 2, 1)], ids=["short window", "Mimi's window"])
def mimi(request, tmp_path_factory):
    """transformers' model, and ours read from its folder."""
    window, units, kv_heads = request.param
    config = MimiConfig(
        **FILTERS, **SIZES, **CODEBOOKS, sliding_window=window, num_residual_layers=units, num_key_value_heads=kv_heads
    )
    theirs = randomized(MimiModel(config))
    folder = tmp_path_factory.mktemp("mimi")
    theirs.save_pretrained(folder)
    sizes, state = read_mimi(folder)
    ours = SpeechCodec(sizes, None).eval()
    ours.load_state_dict(state)
    return theirs, ours


def test_codes_are_mimis_on_clips_of_any_length(mimi):
    theirs, ours = mimi
    generator = torch.Generator().manual_seed(8)
    lengths = [1, 1919, 1920, 1921, *torch.randint(2, 40000, (46,), generator=generator).tolist()]
    for number, length in enumerate(lengths):
        clip = sound(1 + number % 2, length, seed=number)
        with torch.no_grad():
            want = theirs.encode(clip[:, None]).audio_codes
        have = ours.encode(clip)
        assert have.shape == (len(clip), 9, -(-length // 1920))
        assert torch.equal(have, want), f"clip {number} of {length} samples"


def test_the_first_codebooks_are_mimis_first(mimi):
    theirs, ours = mimi
    clip = sound(2, 30011)
    for count in (2, 5):
        with torch.no_grad():
            want = theirs.encode(clip[:, None], num_quantizers=count).audio_codes
        assert torch.equal(ours.encode(clip, count), want)
    assert torch.equal(ours.encode(clip, 1), ours.encode(clip)[:, :1])


def test_latents_of_codes_are_mimis(mimi):
    theirs, ours = mimi
    codes = ours.encode(sound(2, 30011))
    for count in (1, 4, 9):
        want = theirs.quantizer.decode(codes[:, :count]).transpose(1, 2)
        torch.testing.assert_close(ours.quantizer.decode(codes[:, :count]), want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def code2wav(tmp_path_factory):
    """transformers' Code2Wav, and ours read from its folder."""
    config = Qwen3OmniMoeCode2WavConfig(
        codebook_size=32,
        num_quantizers=7,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=22,
        sliding_window=6,
        decoder_dim=48,
    )
    theirs = randomized(Qwen3OmniMoeCode2Wav(config))
    folder = tmp_path_factory.mktemp("code2wav")
    theirs.save_pretrained(folder)
    sizes, state = read_code2wav(folder)
    ours = Code2Wav(sizes).eval()
    ours.load_state_dict(state)
    return theirs, ours


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 13, 41])
def test_waveforms_are_transformers(code2wav, frames):
    theirs, ours = code2wav
    codes = random_codes(2, frames)
    want, have = theirs(codes).squeeze(1), ours(codes)
    assert want.std() > 0.05 and (want.abs() == 1).float().mean() < 0.1  # a signal, and not one that is cut off
    torch.testing.assert_close(have, want, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("chunk", "context"), [(300, 25), (10, 4), (7, 7), (5, 12)])
def test_chunked_waveforms_are_transformers(code2wav, chunk, context):
    theirs, ours = code2wav
    codes = random_codes(2, 33)
    want = theirs.chunked_decode(codes, chunk, context).squeeze(1)
    torch.testing.assert_close(ours.chunked_decode(codes, chunk, context), want, rtol=0, atol=1e-5)


def test_gradients_are_transformers(code2wav):
    theirs, ours = code2wav
    codes = random_codes(2, 9)
    weight = sound(2, ours(codes).shape[1])
    for network in code2wav:
        network.zero_grad()
        (network(codes).view_as(weight) * weight).sum().backward()
    names = {
        "code_embedding.weight": "embedding.weight",
        "decoder.2.block.0.alpha": "decoder.stages.1.activation.alpha",
    }
    names |= {"decoder.1.block.1.conv.weight": "decoder.stages.0.up.weight"}
    names |= {"decoder.4.block.4.act1.beta": "decoder.stages.3.units.2.wide_activation.beta"}
    names |= {"pre_transformer.layers.0.self_attn.k_proj.weight": "decoder.transformer.layers.0.attention.key.weight"}
    for their_name, our_name in names.items():
        want, have = theirs.get_parameter(their_name).grad, ours.get_parameter(our_name).grad
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
