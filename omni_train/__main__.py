"""``python -m omni_train`` is ``omni-train``."""

import sys

from omni_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
