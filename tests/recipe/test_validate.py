"""Every refusal of the validation pass, by its message."""

import pytest

from omni_train.errors import UserError
from omni_train.recipe import validate as module
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.validate import processes, validate

VPP = "parallel.pipeline=2 parallel.virtual_pipeline=2"
FLASH = "model=flash_35b_a3b stage=s2_general"

# overrides of the default recipe (tiny, one process), world size (None: not known), message
REFUSED = [
    # values
    ("seed=-1", None, "seed=-1: must be at least 0"),
    ("seed=99999999999999999999", None, "seed=99999999999999999999: must be at most 4611686018427387904"),
    ("optimizer.lr=nan", None, "optimizer.lr=nan: must be a finite number"),
    ("optimizer.clip_grad=inf", None, "optimizer.clip_grad=inf: must be a finite number"),
    ("optimizer.betas=[0.9,nan]", None, "optimizer.betas[1]=nan: must be a finite number"),
    ("schedule.warmup_fraction=nan", None, "schedule.warmup_fraction=nan: must be a finite number"),
    ("parallel.tensor=0", None, "parallel.tensor=0: must be at least 1"),
    ("schedule.steps=-3", None, "schedule.steps=-3: must be at least 0"),
    ("schedule.tokens=0", None, "schedule.tokens=0: must be at least 1"),
    ("schedule.log_every=0", None, "schedule.log_every=0: must be at least 1"),
    ("loss_chunk_tokens=0", None, "loss_chunk_tokens=0: must be at least 1"),
    ("optimizer.lr=0", None, "optimizer.lr=0.0: must be above 0"),
    ("model.thinker.rms_norm_eps=0", None, "model.thinker.rms_norm_eps=0.0: must be above 0"),
    ("model.thinker.mtp_num_hidden_layers=2", None, "model.thinker.mtp_num_hidden_layers=2: must be at most 1"),
    ("schedule.warmup_fraction=1.5", None, "schedule.warmup_fraction=1.5: must be at most 1"),
    ("data.max_skip_fraction=2", None, "data.max_skip_fraction=2.0: must be at most 1"),
    ("trainable=[]", None, "trainable=[]: must not be empty"),
    ("data.sources=[]", None, "data.sources=[]: must not be empty"),
    ("run=", None, "run=: must not be empty"),
    # model
    (
        "model.thinker.pattern=GEME",
        None,
        "model.thinker.pattern=GEME: 'M' is no layer; use G, *, E, - and | between stages",
    ),
    (
        "model.thinker.pattern=GE|*E",
        None,
        "model.thinker.repeats=2: a pattern with | is the whole model; write the layers out and repeats=1",
    ),
    (
        "model.thinker.num_experts=0",
        None,
        "model.thinker.num_experts=0: model.thinker.pattern=GEGEGE*E has MoE layers (E); give "
        "model.thinker.num_experts",
    ),
    (
        "model.thinker.num_experts_per_tok=9",
        None,
        "model.thinker.num_experts_per_tok=9: more than model.thinker.num_experts=8",
    ),
    (
        "model.thinker.pattern=G-*-",
        None,
        "model.thinker.num_experts=8: model.thinker.pattern=G-*- has no MoE layer (E); set 0",
    ),
    (
        "model.thinker.pattern=G-*E",
        None,
        "model.thinker.intermediate_size=0: model.thinker.pattern=G-*E has dense MLPs (-); give their width",
    ),
    (
        "model.thinker.linear_num_key_heads=0",
        None,
        "model.thinker.linear_num_key_heads=0: model.thinker.pattern=GEGEGE*E has Gated DeltaNet layers (G); "
        "give model.thinker.linear_num_key_heads",
    ),
    (
        "model.thinker.num_attention_heads=5",
        None,
        "model.thinker.num_attention_heads=5: not a multiple of model.thinker.num_key_value_heads=2; "
        "change one of the two",
    ),
    (
        "model.thinker.linear_num_value_heads=6",
        None,
        "model.thinker.linear_num_value_heads=6: not a multiple of "
        "model.thinker.linear_num_key_heads=4; change one of the two",
    ),
    (
        "model.thinker.mrope_section=[4,2,1]",
        None,
        "model.thinker.mrope_section=[4, 2, 1]: must be 3 numbers (T, H, W) that sum to half the rotary dims, 8",
    ),
    (
        "model.thinker.mrope_section=[4,4]",
        None,
        "model.thinker.mrope_section=[4, 4]: must be 3 numbers (T, H, W) that sum to half the rotary dims, 8",
    ),
    (
        "model.thinker.head_dim=60",
        None,
        "model.thinker.partial_rotary_factor=0.25: rotates 15 of model.thinker.head_dim=60; must be even",
    ),
    (
        "data.chat_template=qwen3_5 data.loss_on=all",
        None,
        "data.loss_on=all: with data.chat_template=qwen3_5 a chat is learned once for each of its questions; set "
        "data.loss_on=assistant",
    ),
    # layout against the model
    (
        "model.thinker.moe_intermediate_size=62",
        None,
        "model.thinker.moe_intermediate_size=62: not a multiple of parallel.expert_tensor times what "
        "precision=fp32 needs=4; "
        "change one of the two",
    ),
    (
        "model.thinker.moe_intermediate_size=72 parallel.expert_tensor=2 precision=bf16",
        None,
        "model.thinker.moe_intermediate_size=72: not a multiple of parallel.expert_tensor times what "
        "precision=bf16 needs"
        "=16; change one of the two",
    ),
    (
        "model.thinker.hidden_size=130",
        None,
        "model.thinker.hidden_size=130: not a multiple of what precision=fp32 needs=4; change one of the two",
    ),
    ("parallel.tensor=3", None, "model.vocab_size=4096: not a multiple of parallel.tensor=3; change one of the two"),
    (
        "model.thinker.num_attention_heads=12 model.thinker.num_key_value_heads=12 parallel.tensor=8",
        None,
        "model.thinker.num_attention_heads=12: not a multiple of parallel.tensor=8; change one of the two",
    ),
    (
        "model.thinker.num_attention_heads=12 model.thinker.num_key_value_heads=3 parallel.tensor=4",
        None,
        "parallel.tensor=4: neither divides nor is a multiple of model.thinker.num_key_value_heads=3",
    ),
    (
        "model.thinker.shared_expert_intermediate_size=31 parallel.tensor=2",
        None,
        "model.thinker.shared_expert_intermediate_size=31: not a multiple of parallel.tensor=2; change one of the two",
    ),
    (
        f"{FLASH} parallel.tensor=4 parallel.context=8",
        None,
        "model.thinker.linear_num_key_heads=16: not a multiple of "
        "parallel.tensor·parallel.context=32; change one of the two",
    ),
    (
        "model.thinker.linear_num_key_heads=2 parallel.context=4",
        None,
        "model.thinker.linear_num_key_heads=2: not a multiple of parallel.tensor·parallel.context=4; "
        "change one of the two",
    ),
    (
        "parallel.expert=3",
        None,
        "model.thinker.num_experts=8: not a multiple of parallel.expert=3; change one of the two",
    ),
    (
        "parallel.expert_tensor=5",
        None,
        "model.thinker.moe_intermediate_size=64: not a multiple of parallel.expert_tensor=5; change one of the two",
    ),
    (
        "model=qwen3_5_9b parallel.expert=2",
        None,
        "parallel.expert=2: model=qwen3_5_9b has no experts; set parallel.expert=1",
    ),
    (
        "model=qwen3_5_9b parallel.expert_tensor=2",
        None,
        "parallel.expert_tensor=2: model=qwen3_5_9b has no experts; set parallel.expert_tensor=1",
    ),
    (
        "parallel.virtual_pipeline=2",
        None,
        "parallel.virtual_pipeline=2: needs parallel.pipeline of at least 2; set it to 1 or add stages",
    ),
    (
        "parallel.pipeline=3",
        None,
        "parallel.pipeline=3: 16 layers (model.thinker.pattern×repeats) are not a multiple of "
        "pipeline·virtual_pipeline=3; "
        "choose a divisor or mark the stages with | in model.thinker.pattern",
    ),
    (
        "model.thinker.pattern=GE|*E model.thinker.repeats=1",
        None,
        "model.thinker.pattern=GE|*E: marks 2 stages but parallel.pipeline·virtual_pipeline=1",
    ),
    (
        "model.thinker.pattern=GE*E| model.thinker.repeats=1 parallel.pipeline=2",
        None,
        "model.thinker.pattern=GE*E|: has a stage without layers; move the |",
    ),
    (
        "evaluation.every=5 parallel.pipeline=2",
        None,
        "parallel.pipeline=2: evaluation.every=5 generates, which needs 1; set one of the two",
    ),
    (
        "evaluation.every=5 parallel.context=2",
        None,
        "parallel.context=2: evaluation.every=5 generates, which needs 1; set one of the two",
    ),
    ("evaluation.samples=0", None, "evaluation.samples=0: must be at least 1"),
    # rows
    (
        "parallel.context=4 data.alignment=4 data.row_tokens=64",
        None,
        "data.alignment=4: not a multiple of 2·parallel.context=8; change one of the two",
    ),
    (
        "parallel.context=2 parallel.tensor=2 data.alignment=4 data.row_tokens=1020",
        None,
        "data.row_tokens=1020: not a multiple of 2·parallel.context·parallel.tensor=8; change one of the two",
    ),
    ("data.row_tokens=1000", None, "data.row_tokens=1000: not a multiple of data.alignment=16; change one of the two"),
    (
        "data.row_tokens=1023 data.alignment=1 parallel.tensor=2",
        None,
        "data.row_tokens=1023: not a multiple of parallel.tensor=2; change one of the two",
    ),
    (
        "data.row_tokens=524288",
        None,
        "data.row_tokens=524288: longer than model.thinker.max_position_embeddings=262144; shorten the rows",
    ),
    (
        "data.sources=[{path:a},{path:b,weight:0}]",
        None,
        "data.sources[1].weight=0.0: must be above 0; leave the source out instead",
    ),
    # optimization
    ("optimizer.min_lr=1", None, "optimizer.min_lr=1.0: above optimizer.lr=0.003; lower one or raise the other"),
    ("optimizer.betas=[0.9]", None, "optimizer.betas=[0.9]: must be two numbers"),
    ("optimizer.betas=[0.9,1.0]", None, "optimizer.betas[1]=1.0: must be below 1"),
    (
        "optimizer.groups=[{match:a},{match:b,lr_factor:-1}]",
        None,
        "optimizer.groups[1].lr_factor=-1.0: must be at least 0",
    ),
    (
        "schedule.decay=wsd schedule.decay_fraction=0.8 schedule.warmup_fraction=0.3",
        None,
        "schedule.decay_fraction=0.8: with schedule.warmup_fraction=0.3 more than the whole run; lower one",
    ),
    # strata
    (
        "data.strata=[{name:a},{name:b}]",
        None,
        "data.strata[0]: takes every sample, and b behind it gets none; put it last",
    ),
    (
        "data.strata=[{name:a,when:{snr_db:[9,null]}},{name:a}]",
        None,
        "data.strata[1].name=a: must be letters, digits and _, and another for each stratum",
    ),
    (
        "data.strata=[{name:a,when:{dnsmos:[3,2]}}]",
        None,
        "data.strata[0].when.dnsmos=[3.0, 2.0]: must be [least, greatest], null where there is none",
    ),
    (
        "data.strata=[{name:a,when:{dnsmos:[3]}}]",
        None,
        "data.strata[0].when.dnsmos=[3.0]: must be [least, greatest], null where there is none",
    ),
    (
        "data.strata=[{name:a,weight:0}]",
        None,
        "data.strata: all weights are 0, and nothing is left to read; raise one",
    ),
    # the world
    (
        "parallel.tensor=2 parallel.pipeline=2",
        1,
        "parallel.tensor=2 parallel.pipeline=2: needs 4 processes or a multiple, but 1 process runs; "
        "launch with: omni-train launch 4 …",
    ),
    (
        "parallel.expert=2 parallel.expert_tensor=2",
        6,
        "parallel.expert=2 parallel.expert_tensor=2: needs 4 processes or a multiple, but 6 processes run; "
        "launch with: omni-train launch 4 …",
    ),
    (
        "schedule.global_batch=5",
        3,
        "schedule.global_batch=5: not a multiple of data-parallel ranks=3; change one of the two",
    ),
    (
        "schedule.global_batch=6 schedule.eval_every=1 schedule.eval_rows=8",
        3,
        "schedule.eval_rows=8: not a multiple of data-parallel ranks=3; change one of the two",
    ),
    (
        "schedule.global_batch=6",
        3,
        "data.streams=8: not a multiple of data-parallel ranks·data.workers=6; change one of the two",
    ),
    (
        f"{VPP} schedule.global_batch=6",
        4,
        "schedule.global_batch=6: gives 3 rows to each data rank, which with parallel.virtual_pipeline=2 "
        "must be a multiple of parallel.pipeline=2",
    ),
]


@pytest.mark.parametrize(("overrides", "world_size", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(overrides, world_size, message):
    recipe = load_recipe(overrides.split(" "))
    with pytest.raises(UserError) as error:
        validate(recipe, world_size)
    assert str(error.value) == message


def test_packages_that_a_choice_needs_are_named_where_the_run_would_start(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for override, package in (
        ("optimizer=muon", "emerging-optimizers"),
        ("tracking=wandb_offline", "wandb"),
        ("evaluation.normalizer=whisper", "whisper-normalizer"),
    ):
        recipe = load_recipe([override])
        validate(recipe, world_size=None)  # a cluster may have what this machine lacks
        with pytest.raises(
            UserError,
            match=f"needs the package {package}; (pip install it|install the extra \\[(muon|whisper)\\]) or use ",
        ):
            validate(recipe, world_size=1)


def test_without_a_world_a_layout_of_any_size_is_accepted():
    recipe = load_recipe(["stage=s2_general", "model=plus_397b_a17b", "parallel=tp4_pp5_ep32"])
    validate(recipe, world_size=None)
    with pytest.raises(UserError, match=r"launch with: omni-train launch 160 …"):
        validate(recipe, world_size=8)


def test_more_tensor_ranks_than_key_value_heads_are_accepted_when_they_share_evenly():
    recipe = load_recipe(["parallel.tensor=4"])
    assert recipe.model.thinker.num_key_value_heads == 2
    validate(recipe, world_size=4)


def test_stages_marked_in_the_pattern_may_be_uneven():
    overrides = ["model.thinker.pattern=GEGEGE|*EGEGEGE|*E", "model.thinker.repeats=1", "parallel.pipeline=3"]
    validate(load_recipe(overrides), world_size=3)


def test_expert_and_dense_layouts_share_the_world():
    # Three quarters of a rank cannot exist: 2·3 ranks of the dense layout and 4 of the experts' first meet at 12.
    recipe = load_recipe(["parallel.tensor=2", "parallel.context=3", "parallel.expert=4"])
    assert processes(recipe.parallel) == 12
    recipe = load_recipe(["parallel.pipeline=2", "parallel.tensor=2", "parallel.expert=2"])
    assert processes(recipe.parallel) == 4
