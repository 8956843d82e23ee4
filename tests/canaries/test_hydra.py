"""What omni_train relies on of Hydra's insides."""

from __future__ import annotations

import pytest
from omegaconf import DictConfig

from omni_train.recipe import compose, hydra_app
from tests.canaries.table import relied_on

APP, COMPOSE = "omni_train/recipe/hydra_app.py", "omni_train/recipe/compose.py"


@relied_on("hydra", "its parser has the flags that we know, no others, and reports mistakes through .error", APP)
def test_flags():
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    known = {*hydra_app._REFUSED, *hydra_app._ALONE, "help", "hydra_help", "resolve", "package", "config_dir"}
    assert {*vars(parser.parse_intermixed_args([]))} == {*known, "overrides"}
    assert parser.parse_intermixed_args(["a=1", "--multirun", "b=2"]).overrides == ["a=1", "b=2"]

    class Reported(Exception):
        pass

    def report(message):
        raise Reported

    parser.error = report
    with pytest.raises(Reported):
        parser.parse_intermixed_args(["--no-such-flag"])


@relied_on("hydra", "its sweeper makes one batch of all jobs, the last word's values changing fastest", APP)
def test_sweep():
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = OverridesParser.create().parse_overrides(["a=1,2", "b=x", "c=range(3)"])
    [jobs] = BasicSweeper.split_arguments(words, None)
    assert jobs == [[f"a={a}", "b=x", f"c={c}"] for a in (1, 2) for c in range(3)]


@relied_on("hydra", "what it composes says under .hydra what it was told, and nothing that differs by itself", COMPOSE)
def test_compose_config():
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with compose.opened_tree():
        opened = GlobalHydra.instance().hydra
        assert type(opened).__module__ == "hydra._internal.hydra"
        plain = opened.compose_config(compose.CONFIG_NAME, [], RunMode.RUN)
        other = opened.compose_config(compose.CONFIG_NAME, ["seed=1,2"], RunMode.MULTIRUN)
    assert isinstance(plain, DictConfig)
    assert plain.hydra.keys() >= compose._HYDRAS_NOTES
    assert [*other.hydra.overrides.task] == ["seed=1,2"]
    for key in plain.hydra.keys() - compose._HYDRAS_NOTES - {"run", "sweep"}:  # which have the time in them
        assert plain.hydra._get_node(key) == other.hydra._get_node(key), key


@relied_on(
    "hydra", "a folder that is prepended to the provider 'schema' comes after recipes, before the schema", COMPOSE
)
def test_search_path(tmp_path):
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    with compose.opened_tree():
        path = GlobalHydra.instance().config_loader().get_search_path()
        path.prepend("--config-dir", f"file://{tmp_path}", anchor=SearchPathQuery(provider="schema"))
    providers = [element.provider for element in path.get_path()]
    assert providers[-2:] == ["--config-dir", "schema"]
    assert providers.count("main") == 1
