"""What adds to omni_train when it starts: its own networks, and the modules that a person names.

``OMNI_TRAIN_PLUGINS=my_package.networks,…`` names them; they are imported in every process of a run.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module

from omni_train.errors import UserError

VARIABLE = "OMNI_TRAIN_PLUGINS"
_OUR_OWN = ("omni_train.networks",)


@cache
def load() -> None:
    """Import them, once.

    Raises:
        UserError: one that the variable names cannot be imported.
    """
    for name in _OUR_OWN:
        import_module(name)
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        try:
            import_module(name)
        except Exception as error:
            raise UserError(f"{VARIABLE}: {name} cannot be imported: {type(error).__name__}: {error}") from error
