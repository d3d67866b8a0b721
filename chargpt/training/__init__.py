"""Training with Lightning.

module.py         one training step, one validation step, and their settings
optimizers.py     AdamW and Muon, and the learning rate schedules
checkpointing.py  last.ckpt and best.ckpt, stopping on a signal, resuming
display.py        what a run shows
trainer.py        make_trainer: Lightning's Trainer with all of this
"""

from chargpt.training.module import GPTModule, TrainingConfig
from chargpt.training.trainer import make_trainer

__all__ = ["GPTModule", "TrainingConfig", "make_trainer"]
