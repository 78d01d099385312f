"""`python -m oneshot` is `python -m oneshot.run`."""

import sys

from .run import main

sys.exit(main())
