"""`python -m oneshot.verify` is the same command as `oneshot verify`."""

import sys

from .__main__ import imported

main = imported("oneshot.checkpoint.verify").main

if __name__ == "__main__":
    sys.exit(main())
