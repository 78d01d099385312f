"""`python -m oneshot.compare` is the same command as `oneshot compare`."""

import sys

from .__main__ import imported

main = imported("oneshot.report.compare").main

if __name__ == "__main__":
    sys.exit(main())
