"""``python -m unit_fast`` is ``unit-fast``."""

import sys

from unit_fast.cli import main

sys.exit(main())
