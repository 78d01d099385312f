"""`python -m oneshot.compare` is the same command as `oneshot compare`."""

import sys
from importlib import import_module

from .__main__ import imported

# a program that only imports this keeps its environment and its garbage collector as they are
main = (imported if __name__ == "__main__" else import_module)("oneshot.report.compare").main

if __name__ == "__main__":
    sys.exit(main())
