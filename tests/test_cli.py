"""The command line: dispatch, exit codes, one line for a mistake."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import omni_train
from omni_train.cli import main
from omni_train.errors import RunFailed, UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def training(monkeypatch):
    """Stands in for the training room; what the test puts in `outcome` is returned or raised."""
    module = types.SimpleNamespace(recipes=[], outcome=0)

    def run(recipe):
        module.recipes.append(recipe)
        if isinstance(module.outcome, BaseException):
            raise module.outcome
        return module.outcome

    stand_in = types.ModuleType("omni_train.training.run")
    stand_in.run = run
    monkeypatch.setitem(sys.modules, "omni_train.training.run", stand_in)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return module


def test_train_hands_a_validated_recipe_to_training_and_returns_its_code(training):
    training.outcome = 5
    assert main(["train", "schedule.steps=2", "run=mine"]) == 5
    assert [(recipe.run, recipe.schedule.steps) for recipe in training.recipes] == [("mine", 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "error: tran is not a command; choose one of train, pipeline, generate, data, convert, launch\n"),
        (["train", "nosuch=1"], "error: nosuch is not a key of the recipe; omni-train train --help lists them\n"),
        (["train", "data.alignment=0"], "error: data.alignment=0: must be at least 1\n"),
        (
            ["data", "nosuch"],
            "error: omni-train data nosuch does not exist; choose one of rehearsal, pack, codes, strata, states\n",
        ),
        (["convert"], "error: omni-train convert needs one of import, export\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_on_stderr_and_exit_2(training, capsys, arguments, message):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", message)
    assert training.recipes == []


def test_a_users_error_from_training_is_one_line_and_exit_2(training, capsys):
    training.outcome = UserError("no shards in rehearsal; run omni-train data rehearsal out=rehearsal")
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "error: no shards in rehearsal; run omni-train data rehearsal out=rehearsal\n"


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"omni_train {omni_train.__version__}\n"
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()  # so that it has one place


def test_a_defect_keeps_its_stack_trace(training):
    training.outcome = ZeroDivisionError("bug")
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def as_process(job: str, rank: str = "0") -> tuple[int, list[str]]:
    """Exit code and lines on stderr of ``omni-train train`` as a process that does a job instead."""
    code = f"""
import sys
from omni_train import cli
from omni_train.errors import RankFailed
def job(arguments):
    {job}
cli._train, sys.argv = job, ["omni-train", "train"]
sys.exit(cli.main())
"""
    environment = {**os.environ, "RANK": rank}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def test_the_last_line_of_a_defect_says_what_failed_and_where():
    code, said = as_process("1 / 0", rank="3")
    assert code == 1
    assert said[0].startswith("Traceback")
    assert said[-1].startswith("failed: ZeroDivisionError: division by zero on rank 3 at ")


def test_a_rank_that_only_lost_another_ends_like_it_and_the_first_rank_says_so():
    job = "raise RankFailed(2, 'UserError: no shards on rank 1 at node3')"
    assert as_process(job, rank="0") == (2, ["failed: UserError: no shards on rank 1 at node3"])
    assert as_process(job, rank="2") == (2, [])


def test_an_interrupt_exits_130(training):
    training.outcome = KeyboardInterrupt()
    assert main(["train"]) == 130


def test_only_the_first_rank_of_a_machine_speaks_but_all_exit_2(training, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "nosuch=1"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "nosuch=1"],
        ["train", "--cfg", "job"],
        ["pipeline", "--help"],
        ["pipeline", "name=rehearsal_codec", "--cfg", "job"],
    ],
    ids=" ".join,
)
def test_help_and_mistakes_answer_without_importing_torch(arguments):
    code = "import sys; from omni_train.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, timeout=60)
    assert result.returncode == 0


def test_the_module_is_the_command(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "omni_train", "train", "parallel.tensor=2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: parallel.tensor=2: needs 2 processes")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_failed_the_run_is_one_line_and_exits_1_as_another_try_may_help(training, capsys):
    training.outcome = RunFailed("runs/a: no space")
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "error: runs/a: no space\n"


def test_a_reader_may_close_before_a_page_is_read():
    """As `head` does; here before the first line is written, which takes the command a while."""
    command = [sys.executable, "-m", "omni_train", "train", "--cfg", "job"]
    shown = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    shown.stdout.close()
    assert shown.stderr.read() == ""
    assert shown.wait(60) == 0
