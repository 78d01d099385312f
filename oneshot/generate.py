"""`python -m oneshot.generate` is the same command as `oneshot generate`."""

import sys

from .pipeline.generate import main

if __name__ == "__main__":
    sys.exit(main())
