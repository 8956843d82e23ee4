"""The scan that holds uses.txt to the truth finds what it should, however it is written, and nothing else."""

from __future__ import annotations

import pytest

from tests.canaries.scan import private_names, replaced_names
from tests.canaries.source import find


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import hydra._internal.utils", "utils"),
        ("from hydra._internal import utils", "utils"),
        ("from torch.utils._device import constructors as made", "constructors"),
        ("def f():\n    from torch import _C", "_C"),
        ("import torch\ntorch._foreach_mul_(a, b)", "_foreach_mul_"),
        ("def f(engine):\n    engine._get_ckpt_name()", "_get_ckpt_name"),
        ("def f(engine):\n    engine._copy = None", "_copy"),
        ("import deepspeed\ndeepspeed.ops.__compatible_ops__['a'] = False", "__compatible_ops__"),
        ("getattr(engine, '_tag')", "_tag"),
        ("from energon import D\nclass E(D):\n    def f(self):\n        return self._repetition", "_repetition"),
        ("from energon import D\nclass E(D):\n    _savable = ('a',)", "_savable"),
        ("from energon import D\nclass E(D):\n    def _savable(self):\n        pass", "_savable"),
        ("from energon import D\nclass E(D):\n    def f(self):\n        self._savable = 1", "_savable"),
    ],
)
def test_a_private_name_is_found(source: str, name: str):
    assert private_names(source, has=lambda base, word: (base, word) == ("energon.D", "_savable")) == {name}


@pytest.mark.parametrize(
    "source",
    [
        "from __future__ import annotations\nimport os\nos._exit(0)",
        "class A:\n    def __init__(self, a):\n        self._a = a\n    def f(self, other):\n        return other._a",
        "from omni_train.data import _ours",
        "from omni_train import x\nx._ours",
        "from omni_train.checkpoint.store import Store\nclass A(Store):\n    def f(self):\n        self._begin()",
        "from energon import D\nclass E(D):\n    def _own(self):\n        return super().__init__()",
    ],
)
def test_what_is_ours_or_pythons_is_left_alone(source: str):
    assert private_names(source, has=lambda base, word: word == "_savable") == set()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from megatron.core import one\none.checkpoint = f", {"megatron.core.one.checkpoint"}),
        ("import deepspeed\ndeepspeed.comm.comm.cdb = None", {"deepspeed.comm.comm.cdb"}),
        ("from m import a, b\nfor each in (a, b):\n    each.x = 1", {"m.a.x", "m.b.x"}),
        ("import torch\ncuda = torch.cuda\ncuda.stream = 1", {"torch.cuda.stream"}),
        ("from omni_train import stopping\nstopping.asked = 1", set()),
        ("class A:\n    def f(self):\n        self.x = 1", set()),
    ],
)
def test_a_name_that_is_replaced_is_found(source: str, names: set[str]):
    assert replaced_names(source) == names


def test_definitions_are_read_from_source():
    assert find("importlib.util.no_such_name") is None
    assert find("no_such_package.name") is None
    assert find("dataclasses.field").parameters.startswith("*, default, ")
    assert find("tests.canaries.table.Use").parameters == "user, name, parameters"  # the fields of a dataclass
    assert find("logging.Handler.lock").parameters is None  # set on self
    assert find("tests.canaries.source.Found").parameters == "parameters"
