"""The encoders compute what those of transformers compute, forward and backward, whole and tensor-parallel."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionModel
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoderConfig,
    Qwen3OmniMoeVisionEncoderConfig,
)
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoeVisionEncoder,
)

from omni_train.interop.encoder_tensors import audio_map, vision_map
from omni_train.interop.families import Names
from omni_train.recipe.schema import AudioEncoderConfig, ParallelConfig, VisionEncoderConfig
from tests.support.encoders import THINKER_HIDDEN, laid, randomized, thinker_config

AUDIO = AudioEncoderConfig(
    hidden_size=36,
    num_hidden_layers=3,
    num_attention_heads=6,
    intermediate_size=50,
    num_mel_bins=37,
    conv_channels=7,
    num_convolutions=3,
    chunk_frames=100,
)
CLIPS = {  # mel frames; one at least as long as a chunk, to which transformers pads the others
    "many": [237, 100, 1, 99, 1250, 34, 61, 808],
    "fewer chunks than ranks": [100],
}
OMNI = Names(text="", head="", vision="", merger=("ln_q", "mlp.0", "mlp.2"), deepstack="merger_list")
QWEN3_5 = Names(text="", head="", vision="")
GRIDS = [(1, 6, 4), (3, 4, 10), (1, 2, 2), (2, 6, 4), (1, 14, 8)]  # patches in time, height and width


def vision_config(deepstack: list[int]) -> VisionEncoderConfig:
    return VisionEncoderConfig(
        hidden_size=40,
        depth=4,
        num_heads=2,
        intermediate_size=46,
        patch_size=6,
        num_position_embeddings=49,
        deepstack_visual_indexes=deepstack,
    )


def boundaries(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def build(kind, config, tensor, theirs, table):
    """Encoder and adapter of this rank, filled from a whole state of theirs; the places of their parameters."""
    from omni_train import platform
    from omni_train.models.audio_encoder import AudioAdapter, AudioEncoder
    from omni_train.models.vision_encoder import VisionAdapter, VisionEncoder

    platform.setup()
    platform.parallel.initialize(ParallelConfig(tensor=tensor), 3)
    thinker = thinker_config(tensor)
    encoder, adapter = (AudioEncoder, AudioAdapter) if kind == "audio" else (VisionEncoder, VisionAdapter)
    modules = torch.nn.ModuleDict(
        {f"{kind}_encoder": encoder(config, thinker), f"{kind}_adapter": adapter(config, thinker)}
    )
    sharded = {}
    for name, module in modules.items():
        sharded |= module.sharded_state_dict(prefix=f"{name}.")
    sharded = {name: part for name, part in sharded.items() if not name.endswith("_extra_state")}
    places = {
        name: tuple(slice(at, at + size) for at, size in zip(part.global_offset, part.local_shape, strict=True))
        for name, part in sharded.items()
    }
    assert set(sharded) == set(dict(modules.named_parameters())) == set(table)
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            parameter.copy_(laid(table[name], theirs, sharded[name].global_shape)[places[name]])
    return modules, places


def forward(modules, kind, inputs):
    if kind == "audio":
        return [modules["audio_adapter"](modules["audio_encoder"](*inputs))]
    merged, deepstack = modules["vision_adapter"](*modules["vision_encoder"](*inputs))
    return [merged, *deepstack]


def run(rank, world_size, kind, config, theirs, table, inputs, weights):
    """Outputs, and the gradients of their weighted sum, each with its place in the whole parameter."""
    from omni_train import platform

    modules, places = build(kind, config, world_size, theirs, table)
    mel = inputs[0].requires_grad_() if kind == "audio" else None
    outputs = forward(modules, kind, inputs)
    sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    # Ranks share the convolutions: their gradients are summed by the trainer, through this mark.
    shared = [parameter.grad for parameter in modules.parameters() if getattr(parameter, "sequence_parallel", False)]
    for gradient in shared + ([] if mel is None else [mel.grad]):
        torch.distributed.all_reduce(gradient)
    gradients = {name: (places[name], parameter.grad) for name, parameter in modules.named_parameters()}
    platform.parallel.destroy()
    return [out.detach() for out in outputs], None if mel is None else mel.grad, gradients


def assert_equal(model, table, expected, expected_input_grad, results):
    """Outputs and input gradients of every rank, and parameters' gradients put together, are those of `model`."""
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    for outputs, input_grad, gradients in results:
        for out, want in zip(outputs, expected, strict=True):
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        if expected_input_grad is not None:
            torch.testing.assert_close(input_grad, expected_input_grad, rtol=1e-4, atol=1e-5)
        for name, (place, gradient) in gradients.items():
            whole_shape = [max(other[2][name][0][axis].stop for other in results) for axis in range(len(place))]
            want = laid(table[name], theirs, whole_shape)[place]
            scale = want.abs().max()
            torch.testing.assert_close(gradient, want, rtol=1e-4, atol=float(1e-5 * scale + 1e-6), msg=name)


@pytest.fixture(scope="module", params=CLIPS)
def audio(request):
    """(model, clips, mel, outputs, gradient of the mel, weights of the sum) of transformers."""
    clips = CLIPS[request.param]
    torch.manual_seed(21)
    model = randomized(
        Qwen3OmniMoeAudioEncoder(
            Qwen3OmniMoeAudioEncoderConfig(
                num_mel_bins=AUDIO.num_mel_bins,
                encoder_layers=AUDIO.num_hidden_layers,
                encoder_attention_heads=AUDIO.num_attention_heads,
                encoder_ffn_dim=AUDIO.intermediate_size,
                d_model=AUDIO.hidden_size,
                output_dim=THINKER_HIDDEN,
                downsample_hidden_size=AUDIO.conv_channels,
            )
        )
    )
    mel = torch.randn(sum(clips), AUDIO.num_mel_bins, requires_grad=True)
    out = model(mel.T, feature_lens=torch.tensor(clips)).last_hidden_state
    weights = [torch.randn(out.shape)]
    (out * weights[0]).sum().backward()
    return model, clips, mel.detach(), [out.detach()], mel.grad, weights


@pytest.mark.parametrize("world_size", [1, 2])
def test_audio_encoder_is_that_of_qwen3_omni(distributed, audio, world_size):
    model, clips, mel, expected, mel_grad, weights = audio
    table, inputs = audio_map(AUDIO, tower=""), (mel, boundaries(clips), 800)
    results = distributed(world_size, run, "audio", AUDIO, model.state_dict(), table, inputs, weights)
    assert_equal(model, table, expected, mel_grad, results)


@pytest.fixture(scope="module", params=["qwen3_omni", "qwen3_5"])
def vision(request):
    """(config, table, model, patches, outputs, weights of the sum) of transformers."""
    torch.manual_seed(22)
    omni = request.param == "qwen3_omni"
    config = vision_config([0, 2] if omni else [])
    sizes = dict(
        depth=config.depth,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        patch_size=config.patch_size,
        out_hidden_size=THINKER_HIDDEN,
        num_position_embeddings=config.num_position_embeddings,
    )
    if omni:
        model = Qwen3OmniMoeVisionEncoder(Qwen3OmniMoeVisionEncoderConfig(deepstack_visual_indexes=[0, 2], **sizes))
    else:
        model = Qwen3_5MoeVisionModel(Qwen3_5MoeVisionConfig(**sizes))
    randomized(model)
    patches = torch.randint(256, (sum(t * h * w for t, h, w in GRIDS), 3 * 2 * 6 * 6), dtype=torch.uint8)
    out = model(patches / 127.5 - 1, grid_thw=torch.tensor(GRIDS))
    outputs = [out.pooler_output, *(out.deepstack_features if omni else [])]
    weights = [torch.randn(part.shape) for part in outputs]
    sum((part * weight).sum() for part, weight in zip(outputs, weights, strict=True)).backward()
    return (
        config,
        vision_map(config, OMNI if omni else QWEN3_5),
        model,
        patches,
        [part.detach() for part in outputs],
        weights,
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_vision_encoders_are_those_of_qwen3_omni_and_qwen3_5(distributed, vision, world_size):
    config, table, model, patches, expected, weights = vision
    inputs = (patches, torch.tensor(GRIDS))
    results = distributed(world_size, run, "vision", config, model.state_dict(), table, inputs, weights)
    assert_equal(model, table, expected, None, results)


def write_or_read(rank, world_size, folder, write, kind, config, theirs, table, inputs):
    """Save an encoder and its adapter, or read what was saved into others; their outputs."""
    from megatron.core import dist_checkpointing

    from omni_train import platform

    modules, _ = build(kind, config, world_size, theirs, table)
    state = {}
    for name, module in modules.items():
        state |= module.sharded_state_dict(prefix=f"{name}.")
    if write:
        dist_checkpointing.save(state, str(folder))
    else:
        for parameter in modules.parameters():
            parameter.data.zero_()
        modules.load_state_dict(dist_checkpointing.load(state, str(folder)))
    with torch.no_grad():
        outputs = forward(modules, kind, inputs)
    platform.parallel.destroy()
    return outputs


def assert_read_by_others(distributed, folder, writers, readers, expected, *args):
    folder.mkdir()
    for world_size, write in ((writers, True), (readers, False)):
        for outputs in distributed(world_size, write_or_read, folder, write, *args):
            torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2)])
def test_a_checkpoint_is_read_by_another_number_of_ranks(distributed, audio, vision, tmp_path, writers, readers):
    model, clips, mel, expected, _, _ = audio
    args = ("audio", AUDIO, model.state_dict(), audio_map(AUDIO, tower=""), (mel, boundaries(clips), 800))
    assert_read_by_others(distributed, tmp_path / "audio", writers, readers, expected, *args)
    config, table, model, patches, expected, _ = vision
    args = ("vision", config, model.state_dict(), table, (patches, torch.tensor(GRIDS)))
    assert_read_by_others(distributed, tmp_path / "vision", writers, readers, expected, *args)
