"""The code predictor is transformers', its parallel pass is its stepwise one, and all of it learns."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerCodePredictorConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration,
)

from omni_train.data.rows.batch import IGNORE
from omni_train.models.talker import code_predictor
from omni_train.models.talker.code_predictor import CodePredictor
from omni_train.nn.matrices import matrices
from omni_train.recipe.schema.talker import CodePredictorConfig, TalkerConfig

FRAMES, GROUPS, WORDS, WIDTH = 7, 16, 37, 20
SIZES = dict(
    hidden_size=WIDTH,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=33,
    rms_norm_eps=1e-5,
)


def build(talker_width=WIDTH, *, sequence_parallel=False, recompute=None, seed=41):
    """A predictor with random norms, as a trained one has."""
    talker = TalkerConfig(
        hidden_size=talker_width,
        repeats=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        thinker_hidden_size=8,
        accept_hidden_layer=1,
        num_code_groups=GROUPS,
        codebook_size=WORDS,
        code_predictor=CodePredictorConfig(rope_theta=1e4, **SIZES),
    )
    config = SimpleNamespace(
        params_dtype=torch.float32,
        sequence_parallel=sequence_parallel,
        init_method=lambda weight: torch.nn.init.normal_(weight, std=0.3),
        perform_initialization=True,
        recompute_granularity=recompute,
    )
    torch.manual_seed(seed)
    predictor = CodePredictor(talker, config)
    for name, parameter in predictor.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return predictor


def problem(predictor, frames=FRAMES, seed=43):
    """Hidden states, embeddings of codebook 0 and residual codes of frames."""
    torch.manual_seed(seed)
    width = predictor.embeddings.shape[2]
    h, first = torch.randn(frames, width, requires_grad=True), torch.randn(frames, width, requires_grad=True)
    return h, first, torch.randint(WORDS, (frames, GROUPS - 1))


def reference_of(predictor):
    """The predictor of transformers with the same weights."""
    config = Qwen3OmniMoeTalkerCodePredictorConfig(
        **SIZES,
        vocab_size=WORDS,
        num_code_groups=GROUPS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    reference = Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration(config).eval()
    state = {}
    for index in range(GROUPS - 1):
        state[f"model.codec_embedding.{index}.weight"] = predictor.embeddings[index]
        state[f"lm_head.{index}.weight"] = predictor.heads[index]
    for index, layer in enumerate(predictor.layers):
        attention, prefix = f"model.layers.{index}.self_attn.", f"model.layers.{index}."
        query, key, value = layer.qkv.weight.split([60, 20, 20])
        state |= {f"{attention}q_proj.weight": query, f"{attention}k_proj.weight": key}
        state |= {f"{attention}v_proj.weight": value, f"{attention}o_proj.weight": layer.output.weight}
        state |= {f"{attention}q_norm.weight": layer.query_norm.weight}
        state |= {f"{attention}k_norm.weight": layer.key_norm.weight}
        gate, up = layer.gate_up.weight.chunk(2)
        state |= {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
        state |= {f"{prefix}mlp.down_proj.weight": layer.down.weight}
        state |= {f"{prefix}input_layernorm.weight": layer.input_norm.weight}
        state |= {f"{prefix}post_attention_layernorm.weight": layer.mlp_norm.weight}
    state["model.norm.weight"] = predictor.norm.weight
    reference.load_state_dict({name: value.detach() for name, value in state.items()})
    return reference


@torch.no_grad()
def stepwise(reference, h, first, choose):
    """Logits (F, 15, K) and codes (F, 15) of transformers, one codebook after the other without a cache."""
    inputs, logits, codes = torch.stack([h, first], dim=1), [], []
    for index in range(GROUPS - 1):
        logits.append(reference(inputs_embeds=inputs).logits[:, -1])
        codes.append(choose(logits[-1], index))
        embedded = reference.get_input_embeddings()[index](codes[-1])
        inputs = torch.cat([inputs, embedded[:, None]], dim=1)
    return torch.stack(logits, dim=1), torch.stack(codes, dim=1)


def greedy(logits, index):
    return logits.argmax(1)


def logits_of(predictor, h, first, codes):
    return torch.einsum("fgp,gkp->fgk", predictor.hidden(h, first, codes), predictor.heads)


def test_logits_of_every_head_and_greedy_codes_are_those_of_transformers():
    predictor = build()
    h, first, codes = problem(predictor)
    reference = reference_of(predictor)
    theirs, _ = stepwise(reference, h, first, lambda logits, index: codes[:, index])
    torch.testing.assert_close(logits_of(predictor, h, first, codes), theirs, rtol=1e-4, atol=1e-4)
    _, written = stepwise(reference, h, first, greedy)
    assert predictor.generate(h, first, greedy).equal(written) and written.unique().numel() > 10


@pytest.mark.parametrize("talker_width", [WIDTH, 13])
def test_losses_of_the_parallel_pass_are_those_of_generation(talker_width):
    predictor = build(talker_width)
    h, first, codes = problem(predictor)
    losses = torch.empty(FRAMES, GROUPS - 1)

    def follow(logits, index):
        losses[:, index] = torch.nn.functional.cross_entropy(logits, codes[:, index], reduction="none")
        return codes[:, index]

    assert predictor.generate(h, first, follow).equal(codes)
    torch.testing.assert_close(predictor.losses(h, first, codes, chunk_tokens=31), losses, rtol=1e-4, atol=1e-5)


def test_a_state_depends_on_the_codes_before_its_own_and_on_no_other_frame():
    predictor = build()
    h, first, codes = problem(predictor)
    changed = codes.clone()
    changed[2, 5] = (changed[2, 5] + 1) % WORDS
    differs = (predictor.hidden(h, first, codes) != predictor.hidden(h, first, changed)).any(2)
    assert differs.nonzero().tolist() == [[2, group] for group in range(6, GROUPS - 1)]


def gradients(predictor, h, first, codes, chunk_tokens):
    """Losses and gradients of a loss that weighs every code otherwise, with the embeddings of the last code in it."""
    predictor.zero_grad()
    h.grad = first.grad = None
    losses = predictor.losses(h, first, codes, chunk_tokens=chunk_tokens)
    entering = predictor.embed(torch.cat([codes[:, :1], codes], dim=1), first)
    ((losses * torch.linspace(0.5, 2, losses.numel()).view_as(losses)).sum() + entering.square().sum()).backward()
    found = {name: parameter.grad for name, parameter in predictor.named_parameters()}
    return losses.detach(), found | {"h": h.grad, "first": first.grad}


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("chunk_tokens", [1, 47])
def test_neither_chunks_of_frames_nor_recomputation_change_losses_and_gradients(monkeypatch, recompute, chunk_tokens):
    inputs = problem(build(13))
    whole = gradients(build(13), *inputs, chunk_tokens=10_000)
    if recompute:
        monkeypatch.setattr(code_predictor, "FRAMES_AT_ONCE", 3)
    parts = gradients(build(13, recompute=recompute), *inputs, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_every_head_embedding_and_layer_learns():
    predictor = build(13)
    h, first, codes = problem(predictor)
    predictor.losses(h, first, codes, chunk_tokens=100).sum().backward()
    learned = {name: parameter.grad for name, parameter in predictor.named_parameters()}
    read = learned.pop("embeddings").abs().sum((1, 2))
    assert (read[:-1] > 0).all() and read[-1] == 0  # the last residual code enters the Talker alone
    assert (learned.pop("heads").abs().sum((1, 2)) > 0).all()
    assert all(gradient.abs().sum() > 0 for gradient in (*learned.values(), h.grad, first.grad))
    predictor.zero_grad()
    predictor.embed(torch.cat([codes[:, :1], codes], dim=1), first).square().sum().backward()
    assert (predictor.embeddings.grad.abs().sum((1, 2)) > 0).all()


def test_frames_enter_as_the_sum_of_their_embeddings_and_control_codes_as_themselves():
    predictor = build(13)
    _, first, codes = problem(predictor)
    frames = torch.cat([torch.full((FRAMES, 1), WORDS + 5), codes], dim=1)
    frames[3, 1:] = -1
    frames[4, 9] = -1
    expected = first.clone()
    for index in range(1, GROUPS):
        present = frames[:, index] >= 0
        expected[present] += predictor.embeddings[index - 1][frames[present, index]]
    torch.testing.assert_close(predictor.embed(frames, first), expected)
    assert predictor.embed(frames, first)[3].equal(first[3])


def test_a_frame_without_labels_has_no_loss_and_no_gradient():
    predictor = build()
    h, first, codes = problem(predictor)
    labels = codes.clone()
    labels[3] = IGNORE
    losses = predictor.losses(h, first, labels, chunk_tokens=100)
    losses.sum().backward()
    assert not losses[3].any() and not h.grad[3].any() and not first.grad[3].any()
    kept = [frame for frame in range(FRAMES) if frame != 3]
    alone = predictor.losses(h[kept], first[kept], codes[kept], chunk_tokens=100)
    torch.testing.assert_close(losses[kept], alone)


def test_without_frames_every_parameter_has_a_gradient_of_zeros():
    predictor = build(13)
    h, first, codes = problem(predictor, frames=0)
    losses = predictor.losses(h, first, codes, chunk_tokens=100)
    entering = predictor.embed(codes.new_empty(0, GROUPS), first)
    assert losses.shape == (0, GROUPS - 1) and entering.shape == first.shape
    (losses.sum() + entering.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in predictor.parameters())
    assert predictor.generate(h, first, greedy).shape == codes.shape


def test_gradients_are_summed_over_the_ranks_that_divide_the_frames():
    assert all(parameter.sequence_parallel for parameter in build(13, sequence_parallel=True).parameters())
    assert not any(parameter.sequence_parallel for parameter in build(13).parameters())


def test_an_optimizer_of_matrices_is_told_which_maps_are_fused():
    predictor = build(13)
    found = {name: matrices(predictor).get(parameter) for name, parameter in predictor.named_parameters()}
    assert found["layers.1.qkv.weight"] == (60, 20, 20) and found["layers.1.gate_up.weight"] == (33, 33)
    assert found["layers.0.output.weight"] == found["input_projection.weight"] == (WIDTH,)
    assert found["embeddings"] is found["heads"] is found["norm.weight"] is None


def sharded(rank, world_size):
    """Names and whole shapes of the predictor's tensors in a checkpoint."""
    from omni_train import platform
    from omni_train.recipe.schema import ParallelConfig

    platform.init_distributed()
    platform.parallel.initialize(ParallelConfig(tensor=2), 5)
    predictor = build(13)
    tensors = predictor.sharded_state_dict("talker.code_predictor.")
    found = {tensor.key: tuple(tensor.global_shape) for tensor in tensors.values()}
    platform.parallel.destroy()
    return found, {name: tuple(parameter.shape) for name, parameter in predictor.named_parameters()}


def test_a_checkpoint_holds_each_parameter_whole_by_its_own_name(distributed):
    for found, shapes in distributed(2, sharded):
        assert found == {f"talker.code_predictor.{name}": shape for name, shape in shapes.items()}
