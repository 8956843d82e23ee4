"""What adds networks, kinds of rows, kinds of media and keys: the package's own, and modules that a person names.

``OMNI_TRAIN_PLUGINS=my_rows,my_package.networks`` names them. Whoever looks something up loads them first; processes
that are started from here inherit the variable, and so have the same.
"""

from __future__ import annotations

import importlib
import os
from functools import cache

from omni_train.errors import UserError, first_line

VARIABLE = "OMNI_TRAIN_PLUGINS"


@cache
def load() -> None:
    """Import the modules that OMNI_TRAIN_PLUGINS names, once in a process.

    Raises:
        UserError: one cannot be imported; naming it and the error.
    """
    for name in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{VARIABLE}: {name} cannot be imported: {type(error).__name__}: {first_line(error)}; mend it, put its "
                "folder on PYTHONPATH, or leave it out"
            ) from error
