"""python sample.py --config configs/sample/NAME.yaml [--out DIR] [--model.… --data.… --trainer.…]"""

import os

# Before torch is loaded: a thread that waits for another gives its core up after some 30 us, where libgomp would spin for
# milliseconds: beside a busy process that wait is what a run is made of.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from tiltlens.modules.command_line import run
from tiltlens.modules.sampling_cli import main

if __name__ == "__main__":
    run(main)
