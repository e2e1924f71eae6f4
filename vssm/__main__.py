"""`python -m vssm` is the command `vssm`."""

import sys

from .cli import main

sys.exit(main())
