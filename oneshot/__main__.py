"""`python -m oneshot` is `python -m oneshot.run`."""

import sys

from .pipeline.run import main

sys.exit(main())
