"""`python -m oneshot.run` is `oneshot prune`."""

import sys

from .pipeline.run import main

if __name__ == "__main__":
    sys.exit(main())
