"""Stages of a pipeline that make data: how they compose among those that train."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from omni_train.commands import DATA
from omni_train.errors import UserError
from omni_train.options import call
from omni_train.recipe.data_stage import DataStage
from omni_train.recipe.pipeline import load_pipeline, run


def speak(data: Path, codec: str, out: Path | None = None, workers: int = 0, seconds: float = 3.5) -> None:
    """A command like `data codes`."""


COMMANDS = {"speak": lambda: speak, "rehearsal": lambda: lambda out, samples=1.0: None}
STAGES = {
    "world": ["command=data rehearsal", "samples=0.5"],
    "codec": ["data=rehearsal_crops", "data.path=world"],
    "codes": ["command=data speak", "data=world/speech", "codec=codec", "workers=3"],
    "code2wav": [
        "data=rehearsal_crops",
        "data.path=codes",
        "data.sources=[{path: codes},{path: mine}]",
        "data.codec=codec",
    ],
}


def write(folder: Path, stages: dict[str, list[str]]) -> list[str]:
    path = folder / "speech.yaml"
    path.write_text(yaml.safe_dump({"all": ["model=tiny", "seed=5"], "stages": stages}, sort_keys=False))
    return [f"name={path}", "runs_dir=/r"]


@pytest.fixture
def words(tmp_path) -> list[str]:
    return write(tmp_path, STAGES)


def test_a_name_of_an_earlier_stage_is_its_directory_wherever_data_or_a_checkpoint_is_named(words):
    pipeline = load_pipeline([*words, "run=mine"], 2, commands=COMMANDS)
    assert [*pipeline.stages] == [*STAGES]
    assert [*pipeline.recipes] == ["codec", "code2wav"]
    codes = pipeline.stages["codes"]
    assert isinstance(codes, DataStage)
    assert codes.arguments() == {
        "data": Path("/r/mine/world/speech"),
        "codec": "/r/mine/codec",
        "workers": 3,
        "out": Path("/r/mine/codes"),
    }
    codec, code2wav = pipeline.recipes.values()
    assert codec.data.path == "/r/mine/world"
    assert [source.path for source in codec.data.sources] == ["/r/mine/world/speech"]
    assert codec.data.tokenizer == "/r/mine/world/tokenizer"
    assert [source.path for source in code2wav.data.sources] == ["/r/mine/codes", "mine"]
    assert code2wav.data.codec == "/r/mine/codec"
    assert (code2wav.init_from, code2wav.seed) == (None, 5)


def test_a_stage_does_not_know_those_behind_it(tmp_path):
    stages = {"early": ["command=data speak", "data=early/x", "codec=codec"], **STAGES}
    early = load_pipeline(write(tmp_path, stages), 2, commands=COMMANDS).stages["early"]
    assert early.arguments() == {"data": Path("early/x"), "codec": "codec", "out": Path("/r/speech/early")}


def test_typed_words_of_one_stage_reach_a_command_and_those_of_all_do_not(words):
    typed = [*words, "codes.workers=7", "schedule.steps=3", "codes.seconds=0.25", "codes.data=elsewhere"]
    codes = load_pipeline(typed, 2, commands=COMMANDS).stages["codes"].arguments()
    assert (codes["workers"], codes["seconds"], codes["data"]) == (7, 0.25, Path("elsewhere"))


def test_cfg_job_shows_the_command_and_its_arguments(words, capsys):
    assert run([*words, "--cfg", "job", "codes.workers=7"], pytest.fail, COMMANDS) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert [*shown] == [*STAGES]
    assert shown["codes"] == {
        "command": "data speak",
        "data": "/r/speech/world/speech",
        "codec": "/r/speech/codec",
        "workers": "7",
        "out": "/r/speech/codes",
    }


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("codes.worker=2", r"codes: worker is not an argument; did you mean workers=\?"),
        ("codes.workers=two", "codes: workers=two: expected int"),
        ("codes.workers=", "codes: workers has no value"),
        ("codes.out=mine", "codes: out=mine: a stage of a pipeline writes to /r/speech/codes; leave out= away"),
        ("codes.seed=3", "codes: seed is not an argument; usage: omni-train data speak data=… codec=…"),
        (
            "code.workers=2",
            "code.workers=2: code is neither a stage nor a key of the recipe; stages: world, codec, codes",
        ),
    ],
)
def test_a_word_that_its_command_does_not_take_is_refused_before_anything_runs(words, typed, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        load_pipeline([*words, typed], 2, commands=COMMANDS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (["command=data speak", "codec=codec"], "late: data= is missing; usage: omni-train data speak data="),
        (
            ["command=data nosuch"],
            "late: command=data nosuch: no such command of a pipeline; choose one of `data speak`",
        ),
        (["command=convert export"], "late: command=convert export: no such command of a pipeline"),
        (["data=world", "command=data speak"], "late: "),
    ],
)
def test_a_stage_that_is_no_command_is_refused(tmp_path, stage, message):
    with pytest.raises(UserError, match=f"^{message}"):
        load_pipeline(write(tmp_path, {**STAGES, "late": stage}), 2, commands=COMMANDS)


def test_a_stage_writes_nowhere_else_whatever_it_is_called(tmp_path):
    stages = load_pipeline(write(tmp_path, {"/etc/x": STAGES["world"], **STAGES}), 2, commands=COMMANDS).stages
    assert stages["/etc/x"].out == "/r/speech/etc/x"


def test_a_pipeline_trains_something(tmp_path):
    with pytest.raises(UserError, match=r"speech\.yaml: no stage trains"):
        load_pipeline(write(tmp_path, {"world": STAGES["world"]}), 2, commands=COMMANDS)


def test_every_data_command_can_be_a_stage():
    """Its function is found by name in another process, and takes the folder that it writes."""
    for name, load in DATA.items():
        function = load()
        assert getattr(__import__(function.__module__, fromlist=["_"]), function.__name__) is function
        with pytest.raises(UserError, match="out has no value"):
            call("omni-train data", {name: load}, [name, "out="])
