"""`python -m oneshot.run` is the same command as `oneshot prune`."""

import sys

from .__main__ import imported

main = imported("oneshot.pipeline.run").main

if __name__ == "__main__":
    sys.exit(main())
