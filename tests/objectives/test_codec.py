"""Training the codec: every part learns from its own loss, crop by crop, whoever computes them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from omni_train.data.rows.batch import WaveRow
from omni_train.data.samples.features.mel import mel_filters
from omni_train.errors import UserError
from omni_train.frozen.wavlm import WavLM
from omni_train.models.code2wav import Code2Wav
from omni_train.models.codec import SpeechCodec
from omni_train.models.discriminators import Discriminators
from omni_train.objectives.adversarial import masked_mean
from omni_train.objectives.base import GlobalBatch
from omni_train.objectives.codec import Code2WavTraining, CodecTraining
from omni_train.objectives.semantic import cosine_distance, to_frames
from omni_train.objectives.spectral import MelDistance, mel_magnitudes, resampled
from omni_train.recipe.schema import AdversarialLoss, CodecTrainingConfig
from tests.support.codec import CODE2WAV, CODEC, FRAME, TRAINING, voice, wave_row


class AllHere:
    """What an engine does for an objective, where all is on the device."""

    def on_device(self, *modules):
        return nullcontext()


def gone_over(objective, networks, row, weight: float, step: int, training: bool):
    (row,) = objective.prepare(AllHere(), [row])
    return objective.run(networks, row, GlobalBatch(weight, step, training))


class Listener:
    """A teacher that hears how loud each 20 ms are, and how often the sign changes."""

    rate, size, modules = 50.0, 2, ()

    def __call__(self, waveforms: list[torch.Tensor]) -> torch.Tensor:
        features = torch.zeros(len(waveforms), max(-(-len(each) // 320) for each in waveforms), 2)
        for crop, waveform in enumerate(waveforms):
            for step, piece in enumerate(waveform.split(320)):
                features[crop, step, 0] = piece.square().mean().sqrt() * 10
                features[crop, step, 1] = (piece[1:] * piece[:-1] < 0).float().mean()
        return features + 0.1


def codec_training(config: CodecTrainingConfig = TRAINING, teacher: Listener | None = None, seed: int = 3):
    torch.manual_seed(seed)
    codec = SpeechCodec(CODEC, CODE2WAV, teacher.size if teacher else 0)
    task = CodecTraining(codec, Discriminators(config.discriminators), config, seed=5, teacher=teacher)
    for network in task.networks.values():
        network.train()
    return task


def with_codebooks(task: CodecTraining) -> CodecTraining:
    """After its first step, in which k-means finds the codebooks."""
    for seed in range(4):
        gone_over(task, task.networks, wave_row(seed=seed), 1.0, 0, True)
    task.after_step(0)
    return task


def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def test_every_part_has_a_gradient_of_its_own_loss_and_none_of_the_others():
    # Not the hinge: while it bends nowhere, what real and what made speech do to a last bias cancels exactly.
    config = dataclasses.replace(TRAINING, adversarial=AdversarialLoss.least_squares)
    task = with_codebooks(codec_training(config, teacher=Listener()))
    losses = gone_over(task, task.networks, wave_row(), 3.0, 1, True).losses
    assert set(losses) == {"generator", "discriminators"}

    losses["generator"].backward()
    assert [
        name for name, grad in gradients(task.networks["generator"]).items() if grad is None or not grad.any()
    ] == []
    assert all(grad is None for grad in gradients(task.networks["discriminators"]).values())

    task.networks["generator"].zero_grad()
    losses["discriminators"].backward()
    of_judges = gradients(task.networks["discriminators"])
    assert [name for name, grad in of_judges.items() if grad is None or not grad.any()] == []
    assert all(grad is None for grad in gradients(task.networks["generator"]).values())


def test_code2wav_learns_alone_on_given_codes():
    torch.manual_seed(7)
    task = Code2WavTraining(Code2Wav(CODE2WAV), Discriminators(TRAINING.discriminators), TRAINING, 24000)
    row = wave_row()
    row.codes = torch.randint(CODE2WAV.codebook_size, (3, CODE2WAV.num_quantizers, 9))
    outcome = gone_over(task, task.networks, row, 3.0, 0, True)
    assert "loss_commitment" not in outcome.metrics
    outcome.losses["generator"].backward()
    assert [
        name for name, grad in gradients(task.networks["generator"]).items() if grad is None or not grad.any()
    ] == []
    assert all(grad is None for grad in gradients(task.networks["discriminators"]).values())


@pytest.mark.parametrize("kind", list(AdversarialLoss))
def test_the_adversarys_gradient_is_that_of_its_weighted_losses(kind):
    """Against the same losses written down once more, without masks, and differentiated in one piece."""
    config = dataclasses.replace(
        TRAINING, adversarial=kind, mel_weight=0.0, commitment_weight=0.0, adversarial_weight=0.7, feature_weight=1.9
    )
    task = with_codebooks(codec_training(config))
    row = wave_row(lengths=[9 * FRAME] * 3)
    gone_over(task, task.networks, row, 3.0, 1, True).losses["generator"].backward()
    found = {name: grad.clone() for name, grad in gradients(task.networks["generator"]).items() if grad is not None}

    task.networks["generator"].zero_grad()
    drawn = torch.Generator().manual_seed(0)  # everything is quantised by all codebooks: what is drawn does not matter
    fake = task.networks["generator"](row.waveform, drawn).waveform
    judges, expected, features = task.networks["discriminators"], 0.0, []
    real = row.waveform[:, : fake.shape[1]]
    for (logits, maps), (_, real_maps) in zip(judges(fake), judges(real), strict=True):
        ours = -logits if kind is AdversarialLoss.hinge else (1 - logits) ** 2
        expected = expected + 0.7 * ours.mean((1, 2, 3)).sum() / len(judges)
        for one, other in zip(maps, real_maps, strict=True):
            relative = (one - other.detach()).abs().mean((1, 2, 3)) / other.detach().abs().mean((1, 2, 3))
            features.append(relative.sum())
    ((expected + 1.9 * sum(features) / len(features)) / 3.0).backward()
    for name, grad in gradients(task.networks["generator"]).items():
        if name in found:
            torch.testing.assert_close(found[name], grad, rtol=2e-3, atol=1e-7)


def split(row: WaveRow) -> list[WaveRow]:
    cuts = (slice(0, 1), slice(1, None))
    return [WaveRow(row.waveform[cut], row.lengths[cut], row.draws[cut]) for cut in cuts]


def test_rows_may_divide_the_crops_as_they_like():
    whole = with_codebooks(codec_training(teacher=Listener()))
    parts = copy.deepcopy(whole)
    row = wave_row(crops=5, seed=9)
    assert sum(map(parts.weight, split(row))) == whole.weight(row) == 5
    outcomes = {whole: [gone_over(whole, whole.networks, row, 5.0, 1, True)]}
    outcomes[parts] = [gone_over(parts, parts.networks, piece, 5.0, 1, True) for piece in split(row)]
    for its in outcomes.values():
        for outcome in its:
            for loss in outcome.losses.values():
                loss.backward()
    for name, (total, weight) in outcomes[whole][0].metrics.items():
        pieces = [outcome.metrics[name] for outcome in outcomes[parts]]
        torch.testing.assert_close(sum(total for total, _ in pieces), total, rtol=1e-4, atol=1e-5)
        assert sum(weight for _, weight in pieces) == weight
    for network in whole.networks:
        found = gradients(parts.networks[network])
        torch.testing.assert_close(found, gradients(whole.networks[network]), rtol=1e-3, atol=1e-6)
    assert whole.after_step(1) == parts.after_step(1)


def test_the_adversary_waits_for_its_step_and_the_figures_keep_their_names():
    task = with_codebooks(codec_training(dataclasses.replace(TRAINING, adversarial_start=7)))
    before, after = (gone_over(task, task.networks, wave_row(), 3.0, step, True) for step in (6, 7))
    assert set(before.losses) == {"generator"} and set(after.losses) == {"generator", "discriminators"}
    assert set(before.metrics) == set(after.metrics)
    assert before.metrics["loss_adversarial"] == (0.0, 0.0)
    assert after.metrics["loss_adversarial"][1] == 3.0
    torch.testing.assert_close(before.metrics["loss"], after.metrics["loss"])


def test_held_out_rows_change_nothing_and_draw_nothing():
    task = with_codebooks(codec_training(dataclasses.replace(TRAINING, quantized_fraction=0.5, quantizer_dropout=1.0)))
    state = copy.deepcopy(task.networks["generator"].state_dict())
    first, second = wave_row(seed=2), wave_row(seed=2)
    second.draws = second.draws + 1000
    outcomes = [gone_over(task, task.networks, row, 3.0, 9, False) for row in (first, second)]
    assert not outcomes[0].losses
    assert outcomes[0].metrics["loss"] == outcomes[1].metrics["loss"]
    assert not outcomes[0].metrics["loss"][0].requires_grad
    task.after_step(9)
    usage = [task.networks["generator"].state_dict()[name] for name in state if name.endswith("cluster_usage")]
    assert all(counted.sum() < state_sum for counted, state_sum in zip(usage, _usage_before(state), strict=True))


def _usage_before(state: dict) -> list[float]:
    """The moving average only decays where nothing was counted."""
    return [float(tensor.sum()) for name, tensor in state.items() if name.endswith("cluster_usage")]


def test_what_is_drawn_follows_the_row_and_nothing_else():
    config = dataclasses.replace(TRAINING, quantized_fraction=0.5, quantizer_dropout=0.7)
    task = with_codebooks(codec_training(config))
    row, other = wave_row(crops=4), wave_row(crops=4)
    other.draws = other.draws + 1000
    with torch.no_grad():
        losses = []
        for one, step in ((row, 1), (other, 1), (row, 50)):
            torch.manual_seed(step)
            losses.append(task.synthesize(task.networks["generator"], one, one.waveform, one.lengths, True)[0])
    assert torch.equal(losses[0], losses[2]) and not torch.equal(losses[0], losses[1])


def test_crops_of_the_semantic_codebook_alone_are_made_of_its_codes():
    task = with_codebooks(codec_training(dataclasses.replace(TRAINING, semantic_alone=1.0)))
    codec, row = task.networks["generator"], wave_row()
    with torch.no_grad():
        made, _ = task.synthesize(codec, row, row.waveform, row.lengths, True)
        alone = codec.quantizer.decode(codec.quantizer.encode(codec.encoder(row.waveform))[:, :1])
        torch.testing.assert_close(made, codec.decoder(codec.bridge(alone)))
        held_out, _ = task.synthesize(codec, row, row.waveform, row.lengths, False)
    assert not torch.allclose(made, held_out)


def test_what_is_said_after_the_end_of_the_speech_does_not_count():
    torch.manual_seed(7)
    task = Code2WavTraining(Code2Wav(CODE2WAV), Discriminators(TRAINING.discriminators), TRAINING, 24000)
    row = wave_row()
    row.codes = torch.zeros(3, CODE2WAV.num_quantizers, 9, dtype=torch.long)
    speech = torch.stack([voice(9 * FRAME, 40 + crop) for crop in range(3)])
    after = torch.arange(9 * FRAME) >= row.lengths[:, None]
    metrics = []
    for added in (0.0, 0.9):
        networks = task.networks | {"generator": lambda codes, clamp, added=added: speech + added * after}
        metrics.append(gone_over(task, networks, row, 3.0, 0, False).metrics)
    assert metrics[0] == metrics[1]
    networks = task.networks | {"generator": lambda codes, clamp: speech + 0.9 * ~after}
    assert gone_over(task, networks, row, 3.0, 0, False).metrics["loss"] != metrics[0]["loss"]


def test_tokens_are_the_frames_in_which_there_is_speech():
    task = codec_training()
    assert task.tokens(wave_row(lengths=[1, FRAME, 9 * FRAME])) == 1 + 1 + 9


def test_the_teacher_teaches_the_first_codebook_alone():
    config = dataclasses.replace(TRAINING, mel_weight=0.0, commitment_weight=0.0, adversarial_start=9)
    task = with_codebooks(codec_training(config, Listener()))
    gone_over(task, task.networks, wave_row(), 3.0, 1, True).losses["generator"].backward()
    taught = {
        name.split(".")[0]
        for name, grad in gradients(task.networks["generator"]).items()
        if grad is not None and grad.any()
    }
    assert taught == {"encoder", "quantizer", "teacher"}
    of_quantizer = gradients(task.networks["generator"].quantizer)
    assert all(
        (grad is not None and grad.any().item()) == name.startswith("semantic") for name, grad in of_quantizer.items()
    )


def test_the_teacher_hears_the_recording_in_what_is_made_of_it():
    """Against the same distance written down once more, crop by crop, and differentiated in one piece."""
    config = dataclasses.replace(
        TRAINING, mel_weight=0.0, commitment_weight=0.0, semantic_weight=0.0, perceptual_weight=0.7, adversarial_start=9
    )
    task, listener = with_codebooks(codec_training(config, Listener())), Listener()
    row = wave_row(frames=80)
    outcome = gone_over(task, task.networks, row, 3.0, 1, True)
    outcome.losses["generator"].backward()
    found = {name: grad.clone() for name, grad in gradients(task.networks["generator"]).items() if grad.any()}
    assert {name.split(".")[0] for name in found} == {"encoder", "quantizer", "bridge", "decoder"}

    task.networks["generator"].zero_grad()
    fake = task.networks["generator"](row.waveform, torch.Generator().manual_seed(0)).waveform
    expected = 0.0
    for made, real, length in zip(fake, row.waveform, row.lengths.tolist(), strict=True):
        whole = torch.cat([made, real[len(made) :]])
        one, other = (
            listener([resampled(sound[None], 24000, 16000)[0, : length * 2 // 3]])[0] for sound in (whole, real)
        )
        expected = expected + (1 - torch.nn.functional.cosine_similarity(one, other, dim=1)).mean()
    metric, _ = outcome.metrics["loss_perceptual"]
    torch.testing.assert_close(metric, expected.detach(), rtol=1e-4, atol=0)
    (0.7 * expected / 3.0).backward()
    expected_gradients = gradients(task.networks["generator"])
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected_gradients[name], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("teacher", [None, Listener()])
def test_the_losses_fall(teacher):
    task = codec_training(dataclasses.replace(TRAINING, adversarial_start=10**6), teacher)
    optimizer = torch.optim.Adam(task.networks["generator"].parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        outcome = gone_over(task, task.networks, wave_row(seed=1), 3.0, step, True)
        optimizer.zero_grad()
        outcome.losses["generator"].backward()
        optimizer.step()
        task.after_step(step)
        losses.append({name: float(total) / 3 for name, (total, weight) in outcome.metrics.items() if weight})
    assert losses[-1]["loss_mel"] < 0.6 * losses[0]["loss_mel"]
    if teacher:
        assert losses[-1]["loss_semantic"] < 0.6 * losses[0]["loss_semantic"]


def test_mel_filters_are_transformers_own():
    from transformers.audio_utils import mel_filter_bank

    theirs = mel_filter_bank(129, 23, 0.0, 12000.0, 24000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(23, 256, 24000).numpy(), theirs, atol=1e-7)


def test_a_mel_magnitude_is_an_amplitude():
    t = torch.arange(24000) / 24000
    sine = 0.4 * torch.sin(2 * torch.pi * 1500 * t)[None]
    loudest = mel_magnitudes(sine, 512, 400, 24000)[0, 20:-20].amax(1)  # bins narrower than the window's main lobe
    torch.testing.assert_close(loudest, torch.full_like(loudest, 0.2), rtol=0.1, atol=0)  # half of it, at 1500 Hz


def test_mel_distance_is_decades_of_loudness():
    distance = MelDistance([64, 256], [6, 20], 24000, floor=1e-9)
    loud = voice(2400, 3)[None].repeat(2, 1) * 3
    lengths = torch.tensor([2400, 1300])
    assert distance(loud, loud, lengths)[0].tolist() == [0.0, 0.0]
    log_B, linear_B = distance(loud * 0.1, loud, lengths)
    torch.testing.assert_close(log_B, torch.ones(2), rtol=0.02, atol=0)
    assert linear_B.min() > 0
    silent_B, _ = MelDistance([64], [6], 24000, floor=1e-2)(torch.zeros(2, 2400), loud * 1e-4, lengths)
    assert silent_B.max() < 0.01


def test_speech_is_resampled_for_the_teacher():
    seconds = torch.arange(2400) / 24000
    sine, wanted = (torch.sin(2 * torch.pi * 700 * t) for t in (seconds, torch.arange(1600) / 16000))
    torch.testing.assert_close(resampled(sine[None], 24000, 16000)[0], wanted, atol=1e-3, rtol=0)


def test_a_faster_teacher_is_averaged_and_a_slower_one_interpolated():
    fast = torch.arange(24.0).view(1, 12, 2)
    torch.testing.assert_close(to_frames(fast, 50.0, 3, 12.5), fast.view(1, 3, 4, 2).mean(2))
    torch.testing.assert_close(to_frames(fast[:, :10], 50.0, 3, 12.5)[0, 2], fast[0, 8:10].mean(0))  # ends early
    slow = torch.tensor([[[0.0], [1.0], [2.0]]])
    torch.testing.assert_close(to_frames(slow, 6.25, 6, 12.5)[0, :, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.0]))


def test_the_cosine_distance_is_a_mean_over_unmasked_frames():
    student = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    teacher = torch.tensor([[[3.0, 0.0], [1.0, 0.0], [-1.0, -1.0]]])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(cosine_distance(student, teacher, mask), torch.tensor([0.5]))


def test_a_masked_mean_takes_the_samples_part_of_the_time_steps():
    x_BCTX = torch.arange(10.0).view(1, 1, 10, 1).repeat(2, 3, 1, 2)
    assert masked_mean(x_BCTX, torch.tensor([1000, 390]), 1000).tolist() == [4.5, 1.5]


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory):
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(23)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8, 8),
        conv_stride=(5, 4, 4),
        conv_kernel=(10, 4, 4),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    folder = tmp_path_factory.mktemp("wavlm")
    WavLMModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    return folder


def test_a_wavlm_folder_is_a_teacher(wavlm):
    from transformers import Wav2Vec2FeatureExtractor, WavLMModel

    teacher = WavLM(str(wavlm), torch.device("cpu"))
    assert (teacher.rate, teacher.size) == (200.0, 16)
    clips = [voice(1700, 1), voice(900, 2)]
    alone = [Wav2Vec2FeatureExtractor()(clip.numpy(), sampling_rate=16000).input_values[0] for clip in clips]
    padded = torch.stack([torch.from_numpy(np.pad(clip, (0, 1700 - len(clip)))) for clip in alone])
    with torch.no_grad():
        expected = WavLMModel.from_pretrained(wavlm).eval()(padded).last_hidden_state
    torch.testing.assert_close(teacher(clips), expected, atol=1e-4, rtol=1e-3)
    task = codec_training(teacher=teacher)
    metric, _ = gone_over(task, task.networks, wave_row(), 3.0, 0, True).metrics["loss_semantic"]
    assert math.isfinite(metric) and metric > 0


def test_a_folder_without_a_wavlm_is_refused_in_one_line(tmp_path):
    for contents, message in ((None, "no WavLM model can be read here"), ({"model_type": "bert"}, "a bert model")):
        if contents:
            (tmp_path / "config.json").write_text(json.dumps(contents))
        with pytest.raises(UserError, match=message) as refused:
            WavLM(str(tmp_path), torch.device("cpu"))
        assert "\n" not in str(refused.value)


def test_codebooks_of_a_frozen_quantiser_stay_as_they_are():
    """Their codes must keep their meaning while a decoder is tuned to them; a moving average asks nobody."""
    task = with_codebooks(codec_training())
    quantizer = task.networks["generator"].quantizer
    quantizer.acoustic.requires_grad_(False)
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    gone_over(task, task.networks, wave_row(seed=9), 1.0, 1, True)
    assert task.after_step(1)["codebook_used"] > 0.0
    moved = {name for name, value in quantizer.named_buffers() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("semantic.") for name in moved)


def test_a_frozen_quantiser_without_codebooks_is_refused():
    task = codec_training()
    task.networks["generator"].quantizer.requires_grad_(False)
    gone_over(task, task.networks, wave_row(), 1.0, 0, True)
    with pytest.raises(UserError, match=r"must include generator\.quantizer until it has codebooks"):
        task.after_step(0)
