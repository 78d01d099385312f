"""`python -m oneshot.verify` is the same command as `oneshot verify`."""

import sys

from .checkpoint.verify import main

if __name__ == "__main__":
    sys.exit(main())
