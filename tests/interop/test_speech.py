"""Codec and Code2Wav go out as folders of transformers and come back, bit for bit; wrong folders are refused."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MimiConfig, MimiModel
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeCode2Wav

from omni_train.checkpoint.plain import write_networks
from omni_train.errors import UserError
from omni_train.frozen.codec import open_codec
from omni_train.interop.convert import export_checkpoint, import_checkpoint
from omni_train.interop.speech import read_code2wav, read_mimi, write_code2wav, write_mimi
from omni_train.models.code2wav import Code2Wav
from omni_train.models.codec import SpeechCodec
from tests.support.speech import CODE2WAV, CODEC, random_codes, randomized, sound


@pytest.fixture
def mimi_folder(tmp_path):
    config = MimiConfig(
        num_filters=2,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=14,
        codebook_size=32,
        codebook_dim=5,
        vector_quantization_hidden_dimension=5,
        num_quantizers=6,
        upsample_groups=12,
    )
    randomized(MimiModel(config)).save_pretrained(tmp_path / "mimi")
    return tmp_path / "mimi"


@pytest.fixture
def code2wav_folder(tmp_path):
    write_code2wav(tmp_path / "code2wav", CODE2WAV, randomized(Code2Wav(CODE2WAV)).state_dict())
    return tmp_path / "code2wav"


def change(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def same(have, want):
    return have.keys() == want.keys() and all(
        have[name].dtype == want[name].dtype and torch.equal(have[name], want[name]) for name in want
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mimi_in_and_out_is_the_same(mimi_folder, tmp_path, dtype):
    original = {name: tensor.to(dtype) for name, tensor in tensors_of(mimi_folder).items()}
    save_file(original, mimi_folder / "model.safetensors", metadata={"format": "pt"})
    config, state = read_mimi(mimi_folder)
    write_mimi(tmp_path / "out", config, state)
    kept = {name: tensor for name, tensor in original.items() if not name.startswith(("decoder", "upsample"))}
    assert same(tensors_of(tmp_path / "out"), kept)
    assert read_mimi(tmp_path / "out")[0] == config


def test_transformers_reads_what_was_trained_here(tmp_path):
    codec = randomized(SpeechCodec(CODEC, CODE2WAV, teacher_size=3))
    codec.quantizer.acoustic.codebooks.cluster_usage[1, 2] = 0.0
    write_mimi(tmp_path / "mimi", CODEC, codec.state_dict())
    mimi, report = MimiModel.from_pretrained(tmp_path / "mimi", output_loading_info=True)
    assert not any(report.values())
    clip = sound(2, 9001)
    codes = codec.encode(clip)
    with torch.no_grad():
        assert torch.equal(mimi.encode(clip[:, None]).audio_codes, codes)
    write_code2wav(tmp_path / "code2wav", CODE2WAV, codec.to_code2wav().state_dict())
    code2wav, report = Qwen3OmniMoeCode2Wav.from_pretrained(tmp_path / "code2wav", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(code2wav(codes).squeeze(1), codec.decode(codes), rtol=0, atol=1e-5)


def test_codebooks_that_mimi_cannot_have_are_refused(tmp_path):
    config = dataclasses.replace(CODEC, codebook_size=40)
    with pytest.raises(UserError, match="codebook_size=40: must be a power of 2 with format=mimi"):
        write_mimi(tmp_path, config, SpeechCodec(config, None).state_dict())


def test_the_first_codebooks_of_mimi(mimi_folder):
    config, state = read_mimi(mimi_folder, num_quantizers=4)
    some = SpeechCodec(config, None).eval()
    some.load_state_dict(state)
    config, state = read_mimi(mimi_folder)
    all_ = SpeechCodec(config, None).eval()
    all_.load_state_dict(state)
    clip = sound(1, 7000)
    assert some.config.num_quantizers == 4
    assert torch.equal(some.encode(clip), all_.encode(clip)[:, :4])
    for count in (1, 7):
        with pytest.raises(UserError, match=f"has 6 codebooks, of which {count} were asked for"):
            read_mimi(mimi_folder, num_quantizers=count)


@pytest.mark.parametrize("whole", [False, True])
def test_code2wav_in_and_out_is_the_same(code2wav_folder, tmp_path, whole):
    original = tensors_of(code2wav_folder)
    if whole:  # as in a Qwen3-Omni
        inside = {f"code2wav.{name}": tensor for name, tensor in original.items()}
        save_file({**inside, "talker.other": torch.ones(3)}, code2wav_folder / "model.safetensors")
        config = json.loads((code2wav_folder / "config.json").read_text())
        (code2wav_folder / "config.json").write_text(json.dumps({"code2wav_config": config}))
    config, state = read_code2wav(code2wav_folder)
    assert config == CODE2WAV
    network = Code2Wav(config)
    network.load_state_dict(state)
    write_code2wav(tmp_path / "out", config, network.state_dict())
    assert same(tensors_of(tmp_path / "out"), original)


def test_keys_that_change_nothing_here_are_kept(code2wav_folder, tmp_path):
    change(code2wav_folder, max_position_embeddings=1234)
    config, state = read_code2wav(code2wav_folder)
    original = json.loads((code2wav_folder / "config.json").read_text())
    write_code2wav(tmp_path / "out", config, state, original)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == original


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(model_type="encodec"), "model_type=encodec: must be mimi with format=mimi"),
        (dict(use_conv_shortcut=True), "use_conv_shortcut=True: must be False"),
        (dict(vector_quantization_hidden_dimension=7), "vector_quantization_hidden_dimension=7: must be 5"),
        (dict(frame_rate=25.0), "frame_rate=25.0: must be 12.5"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}), "rope_type=yarn: must be default"),
        (dict(num_filters=None), "num_filters is missing"),
        (dict(codebook_size=17), r"cluster_usage has shape \(32,\), but config.json makes it \(17,\)"),
        (dict(num_quantizers=5), "layers.4.codebook.cluster_usage: nothing in this model corresponds to it"),
        (dict(num_hidden_layers=2), "the model needs it, and the folder does not have it"),
    ],
)
def test_another_mimi_is_refused(mimi_folder, keys, message):
    change(mimi_folder, **keys)
    with pytest.raises(UserError, match=message):
        read_mimi(mimi_folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(hidden_act="gelu"), "hidden_act=gelu: must be silu"),
        (dict(attention_bias=True), "attention_bias=True: must be False"),
        (dict(decoder_dim=None), "decoder_dim is missing"),
        (dict(decoder_dim=96), "but config.json makes it"),
    ],
)
def test_another_code2wav_is_refused(code2wav_folder, keys, message):
    change(code2wav_folder, **keys)
    with pytest.raises(UserError, match=message):
        read_code2wav(code2wav_folder)


def test_a_code2wav_that_lacks_a_tensor_is_refused(code2wav_folder):
    tensors = tensors_of(code2wav_folder)
    del tensors["decoder.2.block.0.alpha"]
    save_file(tensors, code2wav_folder / "model.safetensors")
    with pytest.raises(UserError, match=r"decoder\.2\.block\.0\.alpha: the model needs it"):
        read_code2wav(code2wav_folder)


def test_codes_of_a_whole_model_are_heard(code2wav_folder):
    config, state = read_code2wav(code2wav_folder)
    network = Code2Wav(config)
    network.load_state_dict(state)
    assert network(random_codes(1, 3)).std() > 0.01


def test_mimi_is_converted_and_makes_its_codes(mimi_folder, tmp_path):
    import_checkpoint("mimi", mimi_folder, tmp_path / "checkpoint", num_quantizers=4)
    clip = sound(7001)
    with torch.no_grad():
        want = MimiModel.from_pretrained(mimi_folder).encode(clip[None, None], num_quantizers=4).audio_codes[0]
    assert open_codec(str(tmp_path / "checkpoint")).encode(clip.numpy()).tolist() == want.tolist()
    export_checkpoint("mimi", tmp_path / "out", tmp_path / "checkpoint")
    original = tensors_of(mimi_folder)
    out = tensors_of(tmp_path / "out")
    assert same(out, {name: original[name] for name in out})
    assert sum(name.endswith("embed_sum") for name in out) == 4
    assert MimiModel.from_pretrained(tmp_path / "out").config.num_quantizers == 4


def test_code2wav_is_converted_there_and_back(code2wav_folder, tmp_path):
    import_checkpoint("qwen3_omni_code2wav", code2wav_folder, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "latest").unlink()  # as in a copy without links
    export_checkpoint("qwen3_omni_code2wav", tmp_path / "out", tmp_path / "checkpoint")
    assert same(tensors_of(tmp_path / "out"), tensors_of(code2wav_folder))
    for format in ("qwen3_omni_code2wav", "mimi"):
        with pytest.raises(UserError, match="there is a checkpoint already"):
            import_checkpoint(format, code2wav_folder, tmp_path / "checkpoint")


def test_a_trained_codec_is_converted_to_both(tmp_path):
    codec = randomized(SpeechCodec(CODEC, CODE2WAV, teacher_size=3))
    trained = tmp_path / "step_00000007"
    trained.mkdir()
    write_networks(trained, {"generator": codec.state_dict()})
    sizes = {"codec": dataclasses.asdict(CODEC), "code2wav": dataclasses.asdict(CODE2WAV)}
    torch.save({"name": "small", **sizes}, trained / "model.pt")
    (trained / "metadata.json").write_text("{}")
    for format in ("mimi", "qwen3_omni_code2wav"):
        export_checkpoint(format, tmp_path / format, trained)
    clip = sound(1, 9001)
    with torch.no_grad():
        codes = MimiModel.from_pretrained(tmp_path / "mimi").encode(clip[:, None]).audio_codes
        wave = Qwen3OmniMoeCode2Wav.from_pretrained(tmp_path / "qwen3_omni_code2wav")(codes)[:, 0]
    torch.testing.assert_close(wave, codec.decode(codec.encode(clip)), rtol=0, atol=1e-5)


def test_what_a_checkpoint_does_not_have_is_refused(mimi_folder, code2wav_folder, tmp_path):
    import_checkpoint("mimi", mimi_folder, tmp_path / "mimi_checkpoint")
    import_checkpoint("qwen3_omni_code2wav", code2wav_folder, tmp_path / "wave_checkpoint")
    with pytest.raises(UserError, match="has no encoder; format=mimi needs one of network=codec"):
        export_checkpoint("mimi", tmp_path / "out", tmp_path / "wave_checkpoint")
    with pytest.raises(UserError, match="has no decoder; format=qwen3_omni_code2wav needs one"):
        export_checkpoint("qwen3_omni_code2wav", tmp_path / "out", tmp_path / "mimi_checkpoint")
    for format, folder in (("qwen3_omni_code2wav", code2wav_folder), ("qwen3_5", mimi_folder)):
        with pytest.raises(UserError, match="num_quantizers=3: must be left out unless format=mimi"):
            import_checkpoint(format, folder, tmp_path / "other", num_quantizers=3)
