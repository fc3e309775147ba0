"""`python -m self_judge`: the command `self-judge`, for an interpreter named by its path."""

import sys

from self_judge.cli import main

sys.exit(main())
