"""`python -m oneshot.generate` is `oneshot generate`."""

import sys

from .pipeline.generate import main

if __name__ == "__main__":
    sys.exit(main())
