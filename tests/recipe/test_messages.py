"""Whatever Hydra and OmegaConf refuse becomes one line that names the key and what would be right."""

import pytest

from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.extensions import recipe_type
from omni_train.recipe.keys import described
from omni_train.recipe.messages import one_line

REFUSED = [
    ("parallel.tensr=2", "parallel.tensr is not a key of the recipe; did you mean parallel.tensor?"),
    ("zzz=1", "zzz is not a key of the recipe; omni-train train --help lists them"),
    (
        "hydra.foo=1",
        "hydra.foo=1: Hydra composes recipes here and does nothing else, so it has no settings; leave it out",
    ),
    ("+zzz.key=1", "zzz is not a key of the recipe; omni-train train --help lists them"),
    ("+parallel.tensors=1", "parallel.tensors is not a key of the recipe; did you mean parallel.tensor?"),
    ("++schedule.step=1", "schedule.step is not a key of the recipe; did you mean schedule.steps?"),
    (
        "data.sources=[{path:x,wieght:1}]",
        "data.sources.wieght is not a key of the recipe; did you mean data.sources.weight?",
    ),
    ("lr=1", "lr is not a key of the recipe; did you mean optimizer.lr?"),
    (
        "num_experts=4",
        "num_experts is not a key of the recipe; did you mean model.thinker.num_experts or model.talker.num_experts?",
    ),
    (
        "thinker.num_experts=4",
        "thinker.num_experts is not a key of the recipe; did you mean model.thinker.num_experts?",
    ),
    ("model.num_experts=4", "model.num_experts is not a key of the recipe; it is model.thinker.num_experts now"),
    (
        "head_dim=64",
        "head_dim is not a key of the recipe; did you mean model.thinker.head_dim or model.talker.head_dim or "
        "model.talker.code_predictor.head_dim or model.codec.head_dim?",
    ),
    ("schedule.steps=abc", "schedule.steps: Value 'abc' of type 'str' could not be converted to Integer"),
    ("schedule.tokens=abc", "schedule.tokens: Value 'abc' of type 'str' could not be converted to Integer"),
    ("schedule.steps=null", "schedule.steps: field 'schedule.steps' is not Optional"),
    ("seed=1.5", "seed: Value '1.5' of type 'float' could not be converted to Integer"),
    ("parallel.tensor=true", "parallel.tensor: Value 'True' of type 'bool' could not be converted to Integer"),
    ("precision=fp64", "precision: Invalid value 'fp64', expected one of [fp32, bf16]"),
    ("tracking.mode=Online", "tracking.mode: Invalid value 'Online', expected one of [online, offline, disabled]"),
    ("optimizer.betas=[a]", "optimizer.betas: Value 'a' of type 'str' could not be converted to Float"),
    (
        "data.sources=[{path:x,weight:a}]",
        "data.sources.weight: Value 'a' of type 'str' could not be converted to Float",
    ),
    ("data.sources=[{weight:1}]", "data.sources[0].path has no value; give it: data.sources[0].path=…"),
    ("trainable=abc", "trainable: Invalid value assigned: str is not a ListConfig, list or tuple"),
    ("model.name={a:1}", "model.name: Cannot convert 'dict' to string: '{'a': 1}'"),
    ("tracking=nosuch", "tracking=nosuch: no such recipe; choose one of none, wandb, wandb_offline"),
    ("parallel=3", "a group takes the name of a recipe, not int; omni-train train --help lists them"),
    ("~model", "model.name has no value; give it: model.name=…"),
    ("run=???", "run has no value; give it: run=…"),
    ("run=a,b", "run=a,b: several values; write [a,b] for a list, or add --multirun"),
    *(
        (word, f"{word}: data.augmentation is null; choose a recipe that has it, or write one (--config-dir)")
        for word in ("data.augmentation={time_masks:3}", "data.augmentation.time_masks=3")
    ),
    ("+stage=s2_general", "stage is already chosen; write stage=s2_general without +"),
    ("+data.path=x", "data.path is a key of the recipe; write it without +"),
    ("steps", "'steps' is not an override; write key=value, group=option or key=[a,b]"),
    ("a=[1", "'a=[1' is not an override; write key=value, group=option or key=[a,b]"),
    ("run=übung", """'run=übung' is not an override; put its value in quotes: 'run="übung"'"""),
    ("data.path=/a#b", """'data.path=/a#b' is not an override; put its value in quotes: 'data.path="/a#b"'"""),
    ("model.name=${nosuch}", "run: Interpolation key 'nosuch' not found"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[override for override, _ in REFUSED])
def test_a_wrong_override_is_refused_in_one_line(override, message):
    with pytest.raises(UserError) as error:
        load_recipe([override])
    assert str(error.value) == message


def test_what_goes_into_quotes_is_taken():
    assert load_recipe(['run="übung"']).run == "übung"


def test_an_unset_variable_of_the_environment_names_the_key(monkeypatch):
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    with pytest.raises(UserError, match=r"^runs_dir: .*'NO_SUCH_VARIABLE' not found"):
        load_recipe(["runs_dir=${oc.env:NO_SUCH_VARIABLE}"])


def test_keys_of_list_entries_are_keys_of_the_recipe():
    keys = set(described(recipe_type()))
    assert {"seed", "model", "model.thinker.pattern", "data.sources.weight", "optimizer.groups.match"} <= keys


def test_a_defect_of_ours_is_not_dressed_up_as_the_users_mistake():
    with pytest.raises(ZeroDivisionError):
        one_line(ZeroDivisionError("bug"))
