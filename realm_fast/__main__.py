"""`python -m realm_fast` is the command `realm-fast`."""

import sys

from realm_fast.cli import main

sys.exit(main())
