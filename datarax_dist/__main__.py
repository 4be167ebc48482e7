"""`python -m datarax_dist`: the command `datarax-dist`."""

from __future__ import annotations

import sys

from datarax_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
