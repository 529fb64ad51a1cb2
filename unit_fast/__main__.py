"""``python -m unit_fast`` is ``unit-fast``."""

import sys

from unit_fast.commands.main import main

sys.exit(main())
