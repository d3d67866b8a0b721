"""Training with Lightning.

module.py         one training step, one validation step, and their settings
optimizers.py     Muon and AdamW, and the learning rate over a run
checkpointing.py  checkpoints that are whole or absent, and the best one
resume.py         stopping on a signal, and where a run resumes
agreement.py      what several ranks agree on: a signal, the time
trainer.py        the Trainer, with limits that keep the type they are typed in
callbacks.py      what a run shows
"""

from chargpt.training.module import GPTModule, TrainingConfig

__all__ = ["GPTModule", "TrainingConfig"]
