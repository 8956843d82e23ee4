"""The recognizer's objective: metrics that add up, windows drawn by step."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from omni_train.objectives.base import GlobalBatch
from omni_train.recipe.schema import ParallelConfig, RecognitionConfig
from tests.support.recognizer import CLIPS, TAG_END, recognizer_recipe, row_of, utterances

ALIGNED = [(900, 3), (33, 1), (1200, 9), (16, 2), (300, 1)]  # the fourth has one audio token for two words


def task_of(recipe):
    from omni_train import platform
    from omni_train.models.recognizer import SpeechRecognizer
    from omni_train.objectives import recognition

    platform.parallel.initialize(ParallelConfig(), recipe.seed)
    with patch.object(recognition, "Tokenizer"), patch.object(recognition, "tag_end", return_value=TAG_END):
        return recognition.Recognition(recipe), SpeechRecognizer(recipe)


def outcomes(rank, world_size, recipe, training):
    """Of a whole row, and of its clips by themselves, with the gradients of both."""
    from omni_train import platform

    task, model = task_of(recipe)
    model.train(training)
    found = []
    for groups in ([utterances(recipe, ALIGNED)], [[one] for one in utterances(recipe, ALIGNED)]):
        rows = [row_of(group) for group in groups]
        total = sum(map(task.weight, rows))
        model.zero_grad()
        metrics, loss = {}, 0.0
        for row in rows:
            out = task.run({"model": model}, row, GlobalBatch(total, 5, training))
            out.losses["model"].backward()
            loss += float(out.losses["model"].detach())
            for name, pair in out.metrics.items():
                metrics[name] = [a + float(b) for a, b in zip(metrics.get(name, (0, 0)), pair, strict=True)]
        found.append((loss, metrics, total, {name: p.grad.clone() for name, p in model.named_parameters()}))
    platform.parallel.destroy()
    return found


def test_losses_and_figures_do_not_depend_on_how_clips_share_rows(distributed):
    recipe = recognizer_recipe(ctc=True, recognition=RecognitionConfig(ctc_weight=0.3))
    (loss, metrics, total, gradients), apart = distributed(1, outcomes, recipe, True)[0]
    assert loss == pytest.approx(apart[0], rel=1e-5)
    torch.testing.assert_close(gradients, apart[3], rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert set(metrics) == {"loss", "ctc_loss", "ctc_unaligned"} == set(apart[1])
    for name, pair in metrics.items():
        assert pair == pytest.approx(apart[1][name], rel=1e-5)
    assert metrics["loss"][1] == total == sum(words + 3 for _, words in ALIGNED)
    assert metrics["ctc_loss"][1] == sum(words for _, words in ALIGNED) - 2
    assert metrics["ctc_unaligned"] == [1, 5]
    assert loss == pytest.approx((metrics["loss"][0] + 0.3 * metrics["ctc_loss"][0]) / total, rel=1e-5)


def test_held_out_rows_tell_how_often_the_right_token_is_the_likeliest(distributed):
    metrics = distributed(1, outcomes, recognizer_recipe(), False)[0][0][1]
    assert set(metrics) == {"loss", "accuracy"}
    right, count = metrics["accuracy"]
    assert count == metrics["loss"][1] and 0 <= right < count


def windows(rank, world_size, recipe):
    from omni_train import platform

    task, _ = task_of(recipe)
    drawn = [task.window_frames(GlobalBatch(1.0, step, True)) for step in range(40)]
    fixed = {task.window_frames(GlobalBatch(1.0, step, False)) for step in range(40)}
    platform.parallel.destroy()
    return drawn, fixed


def test_windows_are_drawn_by_step_in_training_alone(distributed):
    recipe = recognizer_recipe()
    drawn, fixed = distributed(1, windows, recipe)[0]
    assert set(drawn) == {32, 100, 0} and fixed == {48}
    assert distributed(1, windows, recipe)[0][0] == drawn


def overfit(rank, world_size, recipe):
    from omni_train import platform
    from omni_train.rollout.transcribe import transcribe

    task, model = task_of(recipe)
    sequences = utterances(recipe, CLIPS[:3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        task.run({"model": model}, row_of(sequences), GlobalBatch(30.0, step, True)).losses["model"].backward()
        optimizer.step()
    written = transcribe(
        model, [one.mel[0] for one in sequences], window_frames=48, start_token=2, stop_token=3, max_new_tokens=20
    )
    platform.parallel.destroy()
    expected = [[int(label) for label in one.labels if label != -100] for one in sequences]
    return [one.tokens for one in written], expected


def test_a_few_clips_are_learned_by_heart(distributed):
    recipe = recognizer_recipe(ctc=True, recognition=RecognitionConfig(ctc_weight=0.3))
    written, expected = distributed(1, overfit, recipe)[0]
    assert written == expected
