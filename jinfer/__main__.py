"""`python -m jinfer`: the `jinfer` command, where its script is not on the path."""

import sys

from jinfer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
