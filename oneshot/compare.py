"""`python -m oneshot.compare` is the same command as `oneshot compare`."""

import sys

from .report.compare import main

if __name__ == "__main__":
    sys.exit(main())
