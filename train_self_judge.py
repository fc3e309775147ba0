"""accelerate launch --config_file=configs/self_judge_accelerate.yaml \\
    train_self_judge.py --config=FILE"""

import sys

from self_judge.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main("self_judge"))
