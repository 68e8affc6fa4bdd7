"""Train a prior or an encoder.

python train.py fit --config configs/train/NAME.yaml [--out DIR] [--KEY VALUE ...]
"""

from tiltlens.modules.command_line import run
from tiltlens.modules.training_cli import TrainingCLI

if __name__ == "__main__":
    run(TrainingCLI)
