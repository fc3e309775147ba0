"""Lets `python -m self_judge` run the `self-judge` command if it is not on the PATH."""

import sys

from self_judge.cli import main

sys.exit(main())
