"""The states that a Talker reads are the raw output of one layer of the Thinker, of the position that is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_train.data.rows.packing import pack
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech import SpeechSequence
from omni_train.data.rows.speech_packing import pack_speech
from omni_train.data.rows.speech_plans import Plan
from omni_train.recipe.schema import CheckpointConfig, ParallelConfig
from tests.support.pool import RankFailed
from tests.support.talker import small_talker, speech_batches
from tests.support.thinker import VOCAB

LAYERS = 4  # of the Thinker in tests.support.thinker


def recipe_of(folder, layer, parallel=None):
    recipe = small_talker(parallel, accept_hidden_layer=layer)
    recipe.model.vision.deepstack_visual_indexes = [0, 1]
    recipe.talker_training = replace(recipe.talker_training, thinker=str(Path(folder) / "step_00000000"))
    return recipe


def rows_of(recipe):
    """Rows with sound, with vision, and with neither; every state is read, in another order."""
    rows = [row for batch in speech_batches(2, recipe) for row in batch]
    for row in rows:
        row.context = torch.arange(len(row.tokens)).flip(0)
    return rows


def whole(recipe):
    return replace(recipe, model=replace(recipe.model, talker=None, code2wav=None))


def save(rank, world_size, folder):
    """Write a Thinker's checkpoint."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.models.thinker import build_chunks

    recipe = whole(recipe_of(folder, 1))
    platform.parallel.initialize(recipe.parallel, 31)
    store = CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False), recipe.model)
    store.save(0, build_chunks(recipe), None, {}, None)
    store.close()
    platform.parallel.destroy()


def read(rank, world_size, folder, layers, parallel, change=None):
    """States of the rows from each layer, and the names of the parameters of the last frozen Thinker on this rank."""
    from omni_train import platform
    from omni_train.networks.base import spec_of
    from omni_train.training.engines.microbatches import Microbatches

    found = []
    platform.parallel.initialize(parallel, 5)
    for layer in layers:
        recipe = recipe_of(folder, layer, parallel)
        thinker = spec_of("talker").frozen(recipe)["thinker"]
        rows = rows_of(recipe)
        if change is not None:
            for row in rows:
                low, high = row.cu_seqlens[change : change + 2].tolist()
                row.tokens[low:high] = (row.tokens[low:high] + 1) % VOCAB
        found.append([one.cpu() for one in thinker.states(Microbatches(recipe.data.row_tokens), rows)])
        names = [name for stage in thinker.stages for name, _ in stage.global_parameters()]
    platform.parallel.destroy()
    return found, names


def hooked(rank, world_size, folder):
    """Of a whole Thinker: what each layer gives for the rows' contexts, raw and with DeepStack, and after the norm."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import load_model
    from omni_train.models.thinker import build_chunks

    recipe = whole(recipe_of(folder, 1))
    platform.parallel.initialize(ParallelConfig(), 5)
    (thinker,) = chunks = build_chunks(recipe)
    load_model(chunks, Path(folder) / "step_00000000", recipe.model)
    thinker.eval()
    raw, out = {}, {}

    def keep(kept, layer, prepend):
        def hook(_module, _arguments, output):
            kept[layer] = (output[0] if isinstance(output, tuple) else output)[:, 0].clone()

        thinker.decoder.layers[2 * layer - 1].register_forward_hook(hook, prepend=prepend)

    for layer in range(1, LAYERS + 1):
        keep(raw, layer, True)  # before the hook that adds DeepStack
        keep(out, layer, False)
    found = []
    with torch.no_grad():
        for row in rows_of(recipe_of(folder, 1)):
            final = thinker(thinker.local_row(row, 0, training=False))[:, 0]
            kinds = {"raw": raw, "out": out, "normed": {layer: thinker.final_norm(raw[layer]) for layer in raw}}
            states = {(kind, layer): of[layer][row.context] for kind, of in kinds.items() for layer in of}
            found.append(states | {("final", LAYERS): final[row.context]})
    platform.parallel.destroy()
    return found


@pytest.fixture(scope="module")
def folder(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinker")
    distributed(1, save, folder)
    return folder


@pytest.fixture(scope="module")
def states(distributed, folder):
    """States of the rows from layers 1 to 4."""
    return distributed(1, read, folder, [4, 3, 2, 1], ParallelConfig())[0][0][::-1]


@pytest.fixture(scope="module")
def layers(distributed, folder):
    return distributed(1, hooked, folder)[0]


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_a_state_is_the_raw_output_of_its_layer_and_of_no_other(states, layers, layer):
    differ = set()
    for found, of in zip(states[layer - 1], layers, strict=True):
        torch.testing.assert_close(found, of["raw", layer], rtol=1e-5, atol=1e-5)
        differ |= {key for key, other in of.items() if (found - other).abs().max() > 1e-3}
    others = {(kind, n) for kind, n in layers[0] if (kind, n) != ("raw", layer)}
    # DeepStack's features are added behind the first two layers, and the state is without those of its own.
    assert differ == others - ({("out", layer)} if layer > 2 else set())


def test_layers_above_are_not_there(distributed, folder):
    ((_, names),) = distributed(1, read, folder, [2], ParallelConfig())
    layers = {int(name.split(".")[2]) for name in names if name.startswith("decoder.layers.")}
    assert layers == {0, 1, 2, 3}  # a mixer and a feed-forward each
    assert not [name for name in names if name.startswith(("final_norm", "output_layer", "mtp"))]


@pytest.mark.parametrize(
    ("parallel", "layer"),
    [
        (ParallelConfig(context=2), 2),
        (ParallelConfig(tensor=2), 3),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), 4),  # whose first stage has all that DeepStack reaches
    ],
    ids=["CP2", "TP2", "PP2-VPP2"],
)
def test_every_rank_has_every_state_wherever_it_was_computed(distributed, folder, states, parallel, layer):
    """Rows of the Thinker are cut otherwise than the Talker's: what one rank computes, another reads."""
    for (found,), _ in distributed(2, read, folder, [layer], parallel):
        for one, other in zip(found, states[layer - 1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_stages_that_leave_no_room_for_deepstack_are_refused(distributed, folder):
    message = r"accept_hidden_layer=3: its mixers and feed-forwards, 6, are too few for the 4 stages .* first takes 4"
    with pytest.raises(RankFailed, match=message):
        distributed(2, read, folder, [3], ParallelConfig(pipeline=2, virtual_pipeline=2))


def test_a_state_depends_on_its_own_sequence_alone(distributed, folder, states):
    (((after,), _),) = distributed(1, read, folder, [2], ParallelConfig(), 1)
    for row, one, other in zip(rows_of(recipe_of(folder, 2)), states[1], after, strict=True):
        inside = (row.context >= row.cu_seqlens[1]) & (row.context < row.cu_seqlens[2])
        torch.testing.assert_close(one[~inside], other[~inside], rtol=1e-5, atol=1e-6)
        assert (one[inside] - other[inside]).abs().max() > 1e-2


def spoken(length: int, read: list[int], positions: list[int]) -> SpeechSequence:
    """A sequence whose first positions read the states `read` of a Thinker's sequence of `length` tokens."""
    plan = Plan.blank(9, 5, 0)
    plan.sources[: len(read)] = read
    tokens = np.arange(length, dtype=np.int32)
    thinker = TokenSequence(tokens, np.full_like(tokens, -100))
    return SpeechSequence(plan, None, np.zeros(9, np.float32), thinker, np.array(positions))


def test_packed_positions_read_their_own_samples_states():
    sequences = [spoken(11, [0, 1, 1], [3, 10]), spoken(5, [], []), spoken(7, [2, 0], [0, 4, 6])]
    sizes = dict(row_tokens=48, speech_row_tokens=64, alignment=8, padding_token=0)
    row = pack_speech(sequences, **sizes)
    thinker = pack([one.thinker for one in sequences], row_tokens=48, alignment=8, padding_token=0)
    assert torch.equal(row.cu_seqlens, thinker.cu_seqlens)
    for index, sequence in enumerate(sequences):
        start = int(row.speech_cu_seqlens[index])
        sources = row.sources[start : start + 9]
        named = row.context[sources[sources >= 0]] - row.cu_seqlens[index]
        assert named.tolist() == [sequence.positions[one] for one in sequence.plan.sources if one >= 0]
        assert (named < len(sequence.thinker)).all()
    with pytest.raises(AssertionError, match="reads another sequence's state"):
        pack_speech([spoken(11, [0, 2], [3, 10]), *sequences], **sizes)
