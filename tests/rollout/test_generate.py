"""Generation with caches writes what the whole model, run again over everything written, would write."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from omni_train.data.rows.batch import IGNORE
from omni_train.errors import UserError
from omni_train.recipe.schema import ParallelConfig
from tests.support.thinker import VOCAB, encoders, small_recipe

STOP = 5
LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "TP2": (2, ParallelConfig(tensor=2)),
    "EP2": (2, ParallelConfig(expert=2)),
    "TP2-EP2": (2, ParallelConfig(tensor=2, expert=2)),
}


def text_prompts(lengths, seed):
    from omni_train.data.rows.sequences import TokenSequence

    draw = np.random.default_rng(seed)
    return [TokenSequence(draw.integers(VOCAB, size=n, dtype=np.int32), np.full(n, IGNORE, np.int32)) for n in lengths]


def media_prompts(seed):
    """By modality: sound, an image, a silent video, a video with sound between its frames, and all of it with text."""
    from omni_train.data.rows.sequences import TokenSequence
    from omni_train.data.samples.lengths import audio_tokens, vision_tokens

    model, draw = encoders(), np.random.default_rng(seed)

    def prompt(clips, grids, text, interleave=1):
        """Text, then sound and vision in `interleave` turns each, then text."""
        sounds = sum(audio_tokens(clip, model["audio"]) for clip in clips)
        sights = sum(vision_tokens(grid, model["vision"]) for grid in grids)
        kinds = [0] * text
        for turn in range(interleave):
            for kind, total in ((1, sights), (2, sounds)):
                kinds += [kind] * ((turn + 1) * total // interleave - turn * total // interleave)
        kinds = np.array(kinds + [0] * 5)
        # Text counts on; what stands in media has ids of its own, behind which the text after them goes on.
        ids = np.stack([np.arange(len(kinds))] * 3)
        ids[:, kinds > 0] = text + draw.integers(2 * len(kinds), size=(3, (kinds > 0).sum()))
        ids[:, -5:] = ids[:, :-5].max() + 1 + np.arange(5)
        return TokenSequence(
            draw.integers(VOCAB, size=len(kinds), dtype=np.int32),
            np.full(len(kinds), IGNORE, np.int32),
            positions=ids,
            mel=[draw.standard_normal((clip, 32), dtype=np.float32) for clip in clips],
            audio_slots=np.flatnonzero(kinds == 2),
            patches=[draw.integers(256, size=(t * h * w, 96), dtype=np.uint8) for t, h, w in grids],
            grids=grids,
            vision_slots=np.flatnonzero(kinds == 1),
        )

    return {
        "audio": prompt([130, 49], [], 7),
        "image": prompt([], [(1, 4, 6)], 3),
        "video": prompt([], [(3, 4, 2)], 11),
        "video with sound": prompt([70], [(3, 2, 4)], 4, interleave=3),
        "everything": prompt([33, 97], [(1, 2, 2), (2, 4, 4)], 9, interleave=2),
        "text": text_prompts([17], seed)[0],
    }


def small_model(parallel, seed=19, **changes):
    from omni_train import platform
    from omni_train.models.thinker import build_chunks

    recipe = small_recipe(parallel, **changes)
    platform.parallel.initialize(recipe.parallel, seed)
    return build_chunks(recipe)[0]


@torch.no_grad()
def recomputed(model, prompt, answer):
    """(likeliest token, log-probability of the given one) at each token of an answer, from one whole row."""
    from omni_train.data.rows.packing import pack
    from omni_train.models.row import LocalRow

    ids = np.stack([np.arange(len(prompt))] * 3) if prompt.positions is None else prompt.positions
    written = dataclasses.replace(
        prompt,
        tokens=np.append(prompt.tokens, answer).astype(np.int32),
        labels=np.append(prompt.labels, [IGNORE] * len(answer)).astype(np.int32),
        positions=np.append(ids, ids.max() + 1 + np.stack([np.arange(len(answer))] * 3), axis=1).astype(ids.dtype),
    )
    row = pack([written], row_tokens=-(-len(written) // 8) * 8, alignment=8, padding_token=0)
    model.eval()
    window = encoders()["audio"].eval_window_frames
    logits = model.logits(model(LocalRow.from_batch(row, media=model.encodes_media, audio_window_frames=window)))
    log_probs = logits[len(prompt) - 1 : len(written) - 1].log_softmax(-1)
    return log_probs.argmax(-1).tolist(), log_probs[torch.arange(len(answer)), answer].tolist()


def generate_and_recompute(rank, world_size, parallel, lengths, seed, options):
    from omni_train import platform
    from omni_train.rollout.generate import generate

    model = small_model(parallel)
    prompts = text_prompts(lengths, seed + (rank if parallel.tensor == 1 else 0))
    answers = generate(model, prompts, stop_tokens=[STOP], **options)
    assert model.training
    again = [recomputed(model, prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
    platform.parallel.destroy()
    return [(answer.tokens, answer.log_probs, *other) for answer, other in zip(answers, again, strict=True)]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("row_tokens", [8192, 60], ids=["one row", "rows"])
def test_greedy_answers_are_those_of_full_recomputation(distributed, name, row_tokens):
    world_size, parallel = LAYOUTS[name]
    lengths = [37, 1, 45, 8, 71]
    options = dict(max_new_tokens=24, row_tokens=row_tokens)
    results = distributed(world_size, generate_and_recompute, parallel, lengths, 3, options)
    if parallel.tensor > 1:
        assert results[0] == results[1]
    for answers in results:
        assert len(answers) == len(lengths)
        for tokens, log_probs, likeliest, expected in answers:
            assert tokens == likeliest
            assert log_probs == pytest.approx(expected, abs=1e-4)
            assert len(tokens) == 24 or tokens[-1] == STOP


def generate_from_media(rank, world_size, parallel, deepstack, floats):
    from omni_train import platform
    from omni_train.rollout.generate import generate

    model = small_model(parallel, **encoders(vision_deepstack_visual_indexes=[0, 1] if deepstack else []))
    prompts = media_prompts(seed=23)
    if floats:
        for prompt in prompts.values():
            if prompt.positions is not None:
                prompt.positions = prompt.positions * np.float32(0.52)
    answers = generate(model, list(prompts.values()), stop_tokens=[], max_new_tokens=10, row_tokens=100)
    results = {}
    for (name, prompt), answer in zip(prompts.items(), answers, strict=True):
        results[name] = (answer.tokens, answer.log_probs, *recomputed(model, prompt, answer.tokens))
    # The prompt's media matter: otherwise equality would say nothing.
    deaf = dataclasses.replace(prompts["everything"], mel=[0 * clip for clip in prompts["everything"].mel])
    blind = dataclasses.replace(prompts["everything"], patches=[0 * part for part in prompts["everything"].patches])
    changed = generate(model, [deaf, blind], stop_tokens=[], max_new_tokens=10)
    platform.parallel.destroy()
    return results, [answer.log_probs for answer in changed]


@pytest.mark.parametrize("name", ["one rank", "TP2", "TP2-EP2"])
@pytest.mark.parametrize(
    ("deepstack", "floats"), [(False, False), (True, True)], ids=["Qwen3.5-Omni", "DeepStack, float ids"]
)
def test_every_modality_is_answered_as_by_full_recomputation(distributed, name, deepstack, floats):
    world_size, parallel = LAYOUTS[name]
    results = distributed(world_size, generate_from_media, parallel, deepstack, floats)
    assert all(result == results[0] for result in results)
    answers, changed = results[0]
    for modality, (tokens, log_probs, likeliest, expected) in answers.items():
        assert len(tokens) == 10, modality
        assert tokens == likeliest, modality
        assert log_probs == pytest.approx(expected, abs=1e-4), modality
    for log_probs in changed:
        assert np.abs(np.subtract(log_probs, answers["everything"][1])).max() > 0.01


def sample(rank, world_size, parallel, options):
    from omni_train import platform
    from omni_train.rollout.generate import generate

    model = small_model(parallel)
    answers = generate(model, text_prompts([13, 40, 22], 8), stop_tokens=[], max_new_tokens=12, **options)
    platform.parallel.destroy()
    return [answer.tokens for answer in answers]


def test_samples_depend_on_the_seed_and_the_prompt_alone(distributed):
    def draw(world_size=1, **options):
        parallel = ParallelConfig(tensor=world_size)
        return distributed(world_size, sample, parallel, dict(temperature=1.0, seed=3) | options)

    (expected,) = draw()
    assert draw(row_tokens=20) == [expected]
    (other_seed,) = draw(seed=4)
    assert all(a != b for a, b in zip(expected, other_seed, strict=True))
    first, second = draw(2)
    assert first == second
    (greedy,) = draw(temperature=0.0)
    assert draw(top_k=1) == [greedy] != [expected]
    assert draw(top_p=1e-9) == [greedy]


def stop_in_the_middle(rank, world_size, parallel):
    from omni_train import platform
    from omni_train.rollout.generate import generate

    model = small_model(parallel)
    prompts = text_prompts([9, 30], 2)
    whole = generate(model, prompts, max_new_tokens=10, stop_tokens=[])
    stop = whole[0].tokens[4]
    cut = generate(model, prompts, max_new_tokens=10, stop_tokens=[stop])
    platform.parallel.destroy()
    return [answer.tokens for answer in whole], [answer.tokens for answer in cut], stop


def test_an_answer_ends_with_its_stop_token_while_others_go_on(distributed):
    ((whole, cut, stop),) = distributed(1, stop_in_the_middle, ParallelConfig())
    for long, short in zip(whole, cut, strict=True):
        assert short == (long[: long.index(stop) + 1] if stop in long else long)
    assert len(cut[0]) <= 5


def uneven_work(rank, world_size):
    """Ranks that share experts, one with nothing to answer."""
    from omni_train import platform
    from omni_train.rollout.generate import generate

    model = small_model(ParallelConfig(expert=2))
    prompts = text_prompts([20, 9, 33], 7)
    answers = generate(model, prompts if rank else [], max_new_tokens=3, stop_tokens=[], row_tokens=40)
    platform.parallel.destroy()
    return [answer.tokens for answer in answers]


def test_ranks_that_share_experts_wait_for_each_other(distributed):
    none, answers = distributed(2, uneven_work)
    assert none == []
    assert [len(answer) for answer in answers] == [3, 3, 3]


def refuse(rank, world_size, parallel):
    from omni_train import platform
    from omni_train.rollout.generate import generate

    try:
        with pytest.raises(UserError, match=r"both must be 1") as refused:
            generate(small_model(parallel), text_prompts([4], 1), max_new_tokens=2, stop_tokens=[])
        return str(refused.value)
    finally:
        platform.parallel.destroy()


@pytest.mark.parametrize("parallel", [ParallelConfig(pipeline=2), ParallelConfig(context=2)], ids=["PP2", "CP2"])
def test_pipeline_and_context_parallelism_are_refused_in_one_line(distributed, parallel):
    for message in distributed(2, refuse, parallel):
        assert "parallel.pipeline" in message and "parallel.context" in message and "\n" not in message


def stop_after(rank, world_size, parallel, tokens):
    """Answers where the last rank alone is asked to stop while it writes its second row."""
    import signal

    from omni_train import platform, stopping
    from omni_train.rollout.generate import generate

    model = small_model(parallel)
    written, logits = [], model.logits

    def counted(hidden):
        written.append(hidden)
        if rank == world_size - 1 and len(written) == tokens:
            stopping.agreed(signal.SIGTERM)
        return logits(hidden)

    model.logits = counted
    try:
        answers = generate(model, text_prompts([13, 40, 22], 8), stop_tokens=[], max_new_tokens=12, row_tokens=20)
    finally:
        stopping._asked, stopping._told = None, False
        platform.parallel.destroy()
    return [len(answer.tokens) for answer in answers]


@pytest.mark.parametrize("name", ["one rank", "TP2", "EP2"])
def test_a_signal_to_any_rank_cuts_generation_short_on_all(distributed, name):
    world_size, parallel = LAYOUTS[name]
    assert distributed(world_size, stop_after, parallel, 17) == [[12, 5]] * world_size


def keep_states(rank, world_size, parallel, blocks):
    """States kept of prompts with media, and those of a Thinker that ends behind the block, on the same row."""
    from omni_train import platform
    from omni_train.data.rows.packing import pack
    from omni_train.models.row import LocalRow
    from omni_train.models.thinker import build_chunks
    from omni_train.rollout.generate import TextStream
    from omni_train.rollout.sampling import Sampling, uniforms

    recipe = small_recipe(parallel, **encoders(vision_deepstack_visual_indexes=[0, 1]))
    platform.parallel.initialize(recipe.parallel, 19)
    model = build_chunks(recipe)[0].eval()
    prompts = list(media_prompts(seed=31).values())
    stream = TextStream(
        model,
        prompts,
        max_new_tokens=3,
        stop_tokens=[STOP],
        sampling=Sampling(),
        uniform=[uniforms(0, index, 3) for index in range(len(prompts))],
        states_after=blocks,
    )
    tokens = list(stream)
    recipe.model.thinker.pattern = recipe.model.thinker.pattern[: 2 * blocks]
    (cut,) = build_chunks(recipe, head=False)
    cut.load_state_dict({name: model.state_dict()[name] for name in cut.state_dict()})
    total = sum(map(len, prompts))
    row = pack(prompts, row_tokens=total + -total % parallel.tensor, alignment=1, padding_token=0)
    window = encoders()["audio"].eval_window_frames
    with torch.no_grad():
        hidden = cut.eval()(LocalRow.from_batch(row, media=True, audio_window_frames=window))
        if parallel.tensor > 1:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            hidden = gather_from_sequence_parallel_region(hidden)
    expected = hidden[:total, 0].split(list(map(len, prompts)))
    platform.parallel.destroy()
    return tokens, [one.tokens for one in stream.completions], stream.states, expected


@pytest.mark.parametrize(("blocks", "tensor"), [(1, 1), (2, 2), (3, 1)])
def test_states_that_are_kept_are_those_of_the_first_blocks_alone(distributed, blocks, tensor):
    """Without the features that DeepStack adds to the block that is read, with those of the blocks before it."""
    for tokens, completions, states, expected in distributed(
        tensor, keep_states, ParallelConfig(tensor=tensor), blocks
    ):
        assert [[new[index] for new in tokens if index in new] for index in range(6)] == completions
        assert len(states) == len(expected) == 6
        for mine, theirs in zip(states, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
