"""The tree composes, types hold, and what is written is read back."""

from pathlib import Path

import pytest

from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe, read_recipe, recipes_dir, write_recipe
from omni_train.recipe.schema import (
    Decay,
    LossOn,
    OptimizerName,
    ParamGroupConfig,
    Precision,
    Recipe,
    Recompute,
    SourceConfig,
    WandbMode,
)
from omni_train.recipe.validate import processes, validate

TREE = sorted(
    path.relative_to(recipes_dir()) for path in recipes_dir().glob("*/*.yaml") if path.parent.name != "pipeline"
)
# How the released Qwen3-Omni counts time.
RELEASED = [
    "data.media.positions=qwen3_omni",
    "data.media.video_timestamps=false",
    "data.media.audio_timestamp_seconds=[]",
]
# A recipe that only works beside another.
TALKER = ["network=talker", f"data.codec={'a' * 64}", "talker_training.thinker=runs/thinker"]
PARTNERS = {
    **{f"parallel/{path.stem}": ["model=plus_397b_a17b"] for path in TREE if "_ep" in path.stem},
    "stage/s3_long_context": ["model=flash_35b_a3b"],
    "data/aut_shards": ["network=recognizer", "engine=deepspeed"],
    "data/rehearsal_crops": ["network=codec", "engine=deepspeed"],
    "data/speech_shards": ["network=codec", "engine=deepspeed"],
    "stage/code2wav": [f"data.codec={'a' * 64}"],
    "data/rehearsal_transcripts": ["network=recognizer", "engine=deepspeed"],
    "model/qwen3_omni_30b_a3b": RELEASED,
    **{f"stage/{name}": TALKER for name in ("talker_general", "talker_long_context")},
    **{f"data/{name}": TALKER for name in ("rehearsal_spoken", "rehearsal_spoken_long")},
    **{f"data/{name}": TALKER for name in ("spoken_shards", "spoken_long_shards")},
    "data/spoken_dual_track_shards": [*TALKER, "model=qwen3_omni_30b_a3b"],
}
MODELS = [path.stem for path in TREE if path.parent == Path("model")]


@pytest.mark.parametrize("path", TREE, ids=str)
def test_every_recipe_composes_and_validates(path):
    group, option = path.parent.name, path.stem
    recipe = load_recipe([f"{group}={option}", *PARTNERS.get(f"{group}/{option}", [])])
    validate(recipe, world_size=None)


@pytest.mark.parametrize("stage", ["s2_general", "s3_long_context"])
@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("tiny", "qwen3_omni_30b_a3b")])
def test_every_published_size_fits_every_large_stage(stage, model):
    recipe = load_recipe([f"stage={stage}", f"model={model}"])
    validate(recipe, world_size=None)
    assert recipe.precision is Precision.bf16
    assert recipe.data.row_tokens == {"s2_general": 32768, "s3_long_context": 262144}[stage]
    assert recipe.trainable == ["*"]


@pytest.mark.parametrize("stage", ["talker_general", "talker_long_context"])
@pytest.mark.parametrize("model", [name for name in MODELS if name.startswith(("flash", "plus", "qwen3_omni"))])
def test_every_talker_fits_its_stages(stage, model):
    dual = ["data=spoken_dual_track_shards"] if model.startswith("qwen3_omni") else []
    recipe = load_recipe([f"stage={stage}", f"model={model}", *dual, *TALKER])
    validate(recipe, world_size=None)
    rows = {"talker_general": 16384, "talker_long_context": 16384 if dual else 65536}
    assert recipe.data.speech.row_tokens == rows[stage]


def test_qwen3_omni_is_as_long_as_it_was_released():
    validate(load_recipe(["stage=s2_general", "model=qwen3_omni_30b_a3b", *RELEASED]), world_size=None)
    with pytest.raises(UserError, match=r"longer than model\.thinker\.max_position_embeddings=65536"):
        validate(load_recipe(["stage=s3_long_context", "model=qwen3_omni_30b_a3b", *RELEASED]), world_size=None)


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2", "parallel.context=2"],
        ["parallel.tensor=4"],
        ["parallel.context=4"],
        ["parallel.expert=2", "parallel.expert_tensor=2"],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"],
    ],
    ids=" ".join,
)
def test_tiny_allows_every_kind_of_layout(layout):
    recipe = load_recipe(layout)
    validate(recipe, world_size=processes(recipe.parallel))


def test_values_are_dataclasses_and_enums():
    recipe = load_recipe(
        [
            "tracking=wandb_offline",
            "optimizer=muon",
            "precision=bf16",
            "recompute=full",
            "schedule.decay=wsd",
            "schedule.tokens=12345",
            "data.loss_on=all",
            "optimizer.groups=[{match:'*.norm*',lr_factor:0.5}]",
            "data.sources.1.weight=0.7",
        ]
    )
    assert type(recipe) is Recipe
    assert recipe.tracking.mode is WandbMode.offline
    assert recipe.optimizer.name is OptimizerName.muon
    assert recipe.precision is Precision.bf16
    assert recipe.recompute is Recompute.full
    assert recipe.schedule.decay is Decay.wsd
    assert recipe.schedule.tokens == 12345
    assert recipe.data.loss_on is LossOn.all
    assert recipe.optimizer.groups == [ParamGroupConfig(match=r"*.norm*", lr_factor=0.5)]
    assert recipe.data.sources == [SourceConfig("rehearsal/text", 0.4), SourceConfig("rehearsal/chat", 0.7)]


def test_the_command_line_wins_over_the_stage_and_the_stage_over_the_groups():
    assert load_recipe().optimizer.lr == 3e-3  # the stage; the group says 3e-4
    assert load_recipe(["optimizer=muon"]).optimizer.lr == 3e-3
    assert load_recipe(["optimizer.lr=0.5"]).optimizer.lr == 0.5
    assert load_recipe(["stage=s2_general"]).data.name == "omni_shards"
    assert load_recipe(["stage=s2_general", "data=rehearsal"]).data.name == "rehearsal"


def test_the_patterns_of_parts_are_the_users_own_keys():
    parts = {"audio_*": "random", "vision_encoder.*": "runs/x"}
    assert load_recipe(["init_parts={audio_*:random,vision_encoder.*:runs/x}"]).init_parts == parts


def test_data_path_moves_sources_and_tokenizer():
    data = load_recipe(["data.path=/corpus"]).data
    assert [source.path for source in data.sources] == ["/corpus/text", "/corpus/chat"]
    assert data.tokenizer == "/corpus/tokenizer"


def test_the_run_is_named_after_stage_and_model_unless_said():
    assert load_recipe().run == "text_pretrain-tiny"
    assert load_recipe(["run=mine"]).run == "mine"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["stage=s2_general", "model=plus_397b_a17b", "schedule.stop_after=7", "tracking=wandb", "tracking.tags=[a,b]"],
    ],
    ids=["rehearsal", "large"],
)
def test_a_written_recipe_reads_back_equal(tmp_path, overrides):
    recipe = load_recipe(overrides)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    again = read_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.precision is recipe.precision
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_written_recipe_has_nothing_left_to_resolve(tmp_path):
    write_recipe(load_recipe(), tmp_path / "recipe.yaml")
    assert "${" not in (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory; expected the recipe.yaml of a run"),
        ("seed: [1", "not YAML; expected the recipe.yaml of a run"),
        ("sede: 1", "sede is not a key of the recipe; did you mean seed?"),
        ("seed: x", "seed: Value 'x' of type 'str' could not be converted to Integer"),
        ("seed: 1", "stage has no value; give it: stage=…"),
        ("- 1", "not a mapping of keys; expected the recipe.yaml of a run"),
        ("", "stage has no value; give it: stage=…"),
        ("runs_dir: ${oc.env:HOME}", "runs_dir=${oc.env:HOME}: a run's recipe holds values alone"),
        ("data: {sources: [{path: '${oc.decode:1}'}]}", "data.sources.0.path=${oc.decode:1}: a run's recipe"),
        ("model: ${oc.create:{}}", "model=${oc.create:{}}: a run's recipe holds values alone"),
        ("init_parts: {'${seed}': x}", "=${seed}: a run's recipe holds values alone"),
        ("seed: !!python/object/apply:os.system ['exit']", "not YAML; expected the recipe.yaml of a run"),
    ],
)
def test_a_broken_recipe_file_is_refused_in_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        read_recipe(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistyped_key_in_a_recipe_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    text = (recipes_dir() / "model" / "tiny.yaml").read_text()
    (tmp_path / "model" / "mistyped.yaml").write_text(text + "num_expert: 4\n")
    with pytest.raises(
        UserError, match=r"model.num_expert is not a key of the recipe; did you mean model.talker.num_experts"
    ):
        load_recipe(["model=mistyped"], config_dir=tmp_path)


def test_installed_recipes_are_found_before_those_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr("omni_train.recipe.compose.PACKAGE", tmp_path / "omni_train")
    with pytest.raises(UserError, match=r"no recipes in .*omni_train/recipes or .*; install omni_train again"):
        recipes_dir()
    for place in (tmp_path / "recipes", tmp_path / "omni_train" / "recipes"):
        place.mkdir(parents=True)
        (place / "config.yaml").touch()
        assert recipes_dir() == place


@pytest.mark.parametrize("stage", ["audio_encoder", "codec", "s1_vision_encoder", "s2_general", "s3_long_context"])
def test_what_is_typed_for_a_group_is_not_changed_by_the_stage(stage):
    own = load_recipe([f"stage={stage}"])
    typed = load_recipe([f"stage={stage}", "schedule=smoke", "data=rehearsal"])
    assert typed.schedule == load_recipe(["schedule=smoke"]).schedule != own.schedule
    assert (own.data.streams, typed.data.streams) == (256, 8)
