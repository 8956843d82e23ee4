"""The speech codec: causal, the same in a stream as whole, every part trained, and foldable into Code2Wav."""

import copy

import pytest
import torch

from omni_train.models.code2wav import Code2Wav, wave_samples
from omni_train.models.codec import Regularization, SpeechCodec
from omni_train.recipe.schema import Code2WavConfig
from tests.support.speech import CODE2WAV, CODEC, random_codes, randomized, sound

FRAME = 1920


@pytest.fixture
def codec():
    return randomized(SpeechCodec(CODEC, CODE2WAV))


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_codes_of_a_stream_are_those_of_the_whole(codec, frames):
    clip = sound(2, 29 * FRAME + 701)
    stream = {}
    pieces = [codec.encode(piece, state=stream) for piece in clip.split(frames * FRAME, dim=-1)]
    assert torch.equal(torch.cat(pieces, dim=-1), codec.encode(clip))


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_the_waveform_of_a_stream_is_that_of_the_whole(codec, frames):
    codes = random_codes(2, 29)
    stream = {}
    pieces = [codec.decode(piece, state=stream) for piece in codes.split(frames, dim=-1)]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), codec.decode(codes), rtol=0, atol=1e-5)


def test_one_frame_of_codes_is_heard_at_once(codec):
    assert codec.decode(random_codes(1, 1), state={}).shape == (1, FRAME - 555)


def test_streams_do_not_mix(codec):
    one, other = random_codes(1, 8, seed=1), random_codes(1, 8, seed=2)
    streams = {}, {}
    heard = [
        (
            codec.decode(one[..., at : at + 2], state=streams[0]),
            codec.decode(other[..., at : at + 2], state=streams[1]),
        )
        for at in range(0, 8, 2)
    ]
    for codes, pieces in zip((one, other), zip(*heard, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces, dim=-1), codec.decode(codes), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 5 * FRAME - 1, 5 * FRAME, 20 * FRAME + 7])
def test_a_sample_changes_no_frame_that_ends_before_it(codec, changed):
    clip = sound(1, 25 * FRAME)
    other = clip.clone()
    other[0, changed] += 0.5
    different = (codec.encoder(clip) != codec.encoder(other)).any(-1)[0].nonzero().flatten().tolist()
    assert different[0] == changed // FRAME and len(different) > 1


def test_a_frame_changes_nothing_before_it(codec):
    codes = random_codes(1, 25)
    other = codes.clone()
    other[0, 3, 11] += 1 - 2 * (other[0, 3, 11] > 0).long()
    different = (codec.decode(codes) != codec.decode(other))[0].nonzero().flatten()
    # The decoder sees 555 samples ahead; see wave_samples.
    assert 11 * FRAME - 555 <= int(different[0]) < 11 * FRAME


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_samples_of_frames(codec, frames):
    assert codec.decode(random_codes(1, frames)).shape[1] == wave_samples(CODE2WAV, frames) == 1920 * frames - 555
    assert wave_samples(Code2WavConfig(), frames) == 1920 * frames - 555


@pytest.mark.parametrize("count", [2, 5, 7])
def test_a_folded_codec_is_a_code2wav(codec, count):
    """Code2Wav makes of codes, and of the first codebooks' alone, what the codec's own way makes of them."""
    codes = codec.encode(sound(2, 9 * FRAME))[:, :count]
    folded = codec.to_code2wav()
    with torch.no_grad():
        torch.testing.assert_close(folded(codes), codec.decode(codes), rtol=0, atol=1e-5)


def test_training_hears_what_the_codes_say(codec):
    """The training pass and decoding of its codes give the same waveform."""
    clip = sound(2, 9 * FRAME)
    out = codec.train()(clip, torch.Generator().manual_seed(1))
    assert torch.equal(out.codes, codec.encode(clip))
    torch.testing.assert_close(out.waveform.detach().clamp(-1, 1), codec.decode(out.codes), rtol=0, atol=1e-5)


def test_every_parameter_learns():
    codec = randomized(SpeechCodec(CODEC, CODE2WAV, teacher_size=9)).train()
    clip = sound(4, 7 * FRAME + 11)
    out = codec(clip, torch.Generator().manual_seed(1), Regularization(0.5, 0.5))
    assert out.semantic.shape == (4, 8, 9) and out.latents.shape == (4, 8, 18)
    losses = (out.waveform.square().mean(), out.commitment.sum(), out.semantic.square().mean())
    sum(losses).backward()
    assert [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("loss", "reached"),
    [
        (lambda out: out.waveform.square().mean(), ("decoder", "bridge", "encoder", "quantizer")),
        (lambda out: out.commitment.sum(), ("encoder", "quantizer")),
        (lambda out: out.semantic.square().mean(), ("encoder", "quantizer", "teacher")),
    ],
)
def test_each_loss_reaches_the_encoder_through_the_codes(loss, reached):
    codec = randomized(SpeechCodec(CODEC, CODE2WAV, teacher_size=9)).train()
    loss(codec(sound(2, 7 * FRAME), torch.Generator().manual_seed(1))).backward()
    parts = {
        name.split(".")[0] for name, p in codec.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert parts == set(reached)


def test_in_bf16_the_codebooks_stay_in_fp32(codec):
    clip = sound(2, 6 * FRAME)
    before = codec.quantizer.acoustic.codebooks.embed_sum.clone()
    half = copy.deepcopy(codec).bfloat16()
    assert torch.equal(half.quantizer.acoustic.codebooks.embed_sum, before)
    out = half(clip.bfloat16())
    assert out.waveform.dtype is torch.bfloat16
    difference = out.waveform.detach().float() - codec.decode(out.codes)
    assert difference.std() < 0.1 * codec.decode(out.codes).std()


def test_codes_can_be_made_without_a_decoder(codec):
    encoder = SpeechCodec(CODEC, None).eval()
    encoder.load_state_dict({k: v for k, v in codec.state_dict().items() if k.startswith(("encoder.", "quantizer."))})
    clip = sound(1, 5000)
    assert torch.equal(encoder.encode(clip), codec.encode(clip))


def test_code2wav_is_cut_off_only_where_it_is_asked_to_be():
    network = randomized(Code2Wav(CODE2WAV))
    with torch.no_grad():
        network.decoder.last.weight.mul_(30)
        cut, whole = network(random_codes(1, 4)), network(random_codes(1, 4), clamp=False)
    assert whole.abs().max() > 1
    torch.testing.assert_close(cut, whole.clamp(-1, 1))
