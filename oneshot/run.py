"""`python -m oneshot.run` is the same command as `oneshot prune`."""

import sys

from .pipeline.run import main

if __name__ == "__main__":
    sys.exit(main())
