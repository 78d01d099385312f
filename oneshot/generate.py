"""`python -m oneshot.generate` is the same command as `oneshot generate`."""

import sys

from .__main__ import imported

main = imported("oneshot.pipeline.generate").main

if __name__ == "__main__":
    sys.exit(main())
