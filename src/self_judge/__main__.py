"""Runs the `self-judge` command as `python -m self_judge`, even if it is not on the PATH."""

import sys

from self_judge.cli import main

sys.exit(main())
