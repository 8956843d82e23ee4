"""The GPU check finds what is wrong, and imports nothing that it does not bring along."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check.report import Report, outputs_and_gradients

ROOT = Path(__file__).parents[1]


@pytest.fixture
def report(tmp_path):
    report = Report(tmp_path / "found.json", {"gpu": None})
    report.part = "part"
    return report


def test_tensors_that_differ_are_not_a_number_or_have_another_shape_fail(report):
    want = torch.tensor([3.0, 4.0])
    report.same("near", [want], [want + 1e-6], 1e-5)
    report.same("one of two far", [want, want], [want, want * 1.01], 1e-3)
    report.same("not a number", [want * float("nan"), want * 2], [want, want], 1e9)
    report.same("another shape", [want[:1]], [want], 1e9)
    report.failed("broke", "RuntimeError")
    report.left_out("on a GPU", "there is none")
    assert [entry.name for entry in report.failures] == ["one of two far", "not a number", "another shape", "broke"]
    written = json.loads(report.path.read_text())["entries"]
    assert [entry["ok"] for entry in written] == [True, False, False, False, False, True]
    assert written[1]["note"].endswith("the 2.")


def test_outputs_come_with_the_gradient_of_every_input():
    inputs = {"x": torch.arange(3.0), "index": torch.tensor([2, 0])}
    out, gradient = outputs_and_gradients(lambda x, index, factor: x[index] * factor, inputs, factor=5.0)
    assert out.tolist() == [10.0, 0.0]
    assert gradient[1] == 0.0 and gradient[0] != 0.0 and gradient[2] != 0.0


BARE = """
import sys
from importlib.machinery import PathFinder

class OnlyWhatIsThere:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path)
        place = getattr(spec, "origin", None) or ""
        bare = "site-packages" not in place or "setuptools" in place or name.split(".")[0] in ALLOWED
        return spec if bare else None  # who only asks whether it is there is told that it is not

sys.meta_path = [finder for finder in sys.meta_path if finder is not PathFinder] + [OnlyWhatIsThere()]
from omni_train import platform
platform.init_distributed()
import benchmarks.gpu_check.kernels, benchmarks.gpu_check.slice, benchmarks.gpu_check.steps
import omni_train.objectives.codec, omni_train.objectives.recognition, omni_train.models.discriminators
import omni_train.rollout.generate, omni_train.training.engines.megatron, omni_train.training.engines.zero
from omni_train.training.engines.deepspeed import import_deepspeed
import_deepspeed()
"""

# What PyTorch brings, and what comes with the usual image of it.
WITH_PYTORCH = {
    "torch",
    "torchgen",
    "triton",
    "numpy",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "filelock",
}
WITH_PYTORCH |= {"fsspec", "typing_extensions", "packaging", "yaml", "rich", "pygments", "tqdm", "psutil", "regex"}
WITH_PYTORCH |= {
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "msgpack",
    "PIL",
    "setuptools",
    "_distutils_hack",
    "more_itertools",
}
WITH_PYTORCH |= {"ninja", "cuda", "absl", "attr", "attrs", "dateutil", "six", "markdown_it", "mdurl", "google", "click"}
MODULES = {"antlr4_python3_runtime": "antlr4", "hydra_core": "hydra", "megatron_core": "megatron", "fla_core": "fla"}
MODULES |= {"py_cpuinfo": "cpuinfo"}


def test_the_check_imports_nothing_that_its_wheels_do_not_bring():
    recipe = (ROOT / "Makefile").read_text().partition("-w $@.partial")[2].partition("@mv")[0]
    carried = {name.replace("-", "_") for name in re.findall(r"[\w-]+", recipe)}
    allowed = WITH_PYTORCH | {MODULES.get(name, name) for name in carried}
    allowed |= {"_soundfile", "_soundfile_data", "_cffi_backend", "distutils", "omni_train", "benchmarks"}
    code = f"ALLOWED = {sorted(allowed)!r}\n" + BARE
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
