"""`python -m self_judge` runs the command `self-judge`, for when it is not on the PATH."""

import sys

from self_judge.cli import main

sys.exit(main())
