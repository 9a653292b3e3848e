"""`python -m snapshotd` is the `snapshotd` command."""

import sys

from snapshotd.cli import main

if __name__ == "__main__":
    sys.exit(main())
