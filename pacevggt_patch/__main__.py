"""`python -m pacevggt_patch` is the `pacevggt` command."""

import sys

from .cli.main import main

sys.exit(main())
