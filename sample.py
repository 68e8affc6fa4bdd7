"""python sample.py --config configs/sample/NAME.yaml [--out DIR] [--model.… --data.… --trainer.…]"""

from tiltlens.modules.command_line import run
from tiltlens.modules.sampling_cli import main

if __name__ == "__main__":
    run(main)
