"""accelerate launch --config_file=configs/jsft_accelerate.yaml train_jsft.py --config=FILE"""

import sys

from self_judge.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main("jsft"))
