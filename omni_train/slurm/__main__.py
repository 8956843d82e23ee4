"""``python -m omni_train.slurm submit SCRIPT …`` on the login node, ``… job …`` in the batch script."""

from __future__ import annotations

import sys

from omni_train.errors import UserError, announce
from omni_train.processes import Exit


def main(arguments: list[str]) -> int:
    """Run one of the two actions.

    Args:
        arguments: the action and its arguments.

    Returns:
        the exit code.
    """
    action, *rest = arguments
    try:
        if action == "submit":
            from omni_train.slurm.submit import submit

            return submit(*rest)
        from omni_train.slurm.job import run

        return run(rest)
    except UserError as error:
        announce(error)
        return Exit.wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
