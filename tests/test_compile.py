"""Compiled training equals uncompiled training, and so do the keys of its checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning import Callback
from tiny import MUON, assert_same, last, make_data, make_module, make_trainer

from chargpt.checkpoints import read_checkpoint

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler"
)

MODERN = MUON | dict(  # all that laptop.yaml and cpu.yaml change
    position="rotary", norm="plain", bias=False, activation="relu2", ngrams={2: 9, 4: 30}
)


class Losses(Callback):
    """Records the losses, and copies the checkpoint of step 3."""

    def __init__(self, copy: Path) -> None:
        self.seen, self.copy = [], copy

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == 3 and not self.copy.exists():
            shutil.copy(self.copy.with_name("last.ckpt"), self.copy)

    def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
        self.seen.append(outputs["loss"].item())


def train(folder, model, ckpt_path=None, **settings):
    torch.compiler.reset()
    losses = Losses(last(folder).with_name("half.ckpt"))
    trainer = make_trainer(folder, losses, limit_val_batches=0, val_check_interval=3, **settings)
    module = make_module(n_layer=1, dropout=0.0, **model)
    trainer.fit(module, make_data(folder), ckpt_path=ckpt_path, weights_only=True)
    return losses.seen, read_checkpoint(last(folder))


@pytest.mark.parametrize(
    "model, resumes", [({}, False), (MODERN, True)], ids=["textbook", "modern"]
)
def test_compiled_training_equals_uncompiled_training(tmp_path, model, resumes):
    """And so does a run that resumes, which does not depend on the network."""
    for name in ("plain", "compiled", "mixed"):
        (tmp_path / name).mkdir()
    plain, _ = train(tmp_path / "plain", model, max_steps=6)
    compiled = model | dict(compile=True)
    whole, end = train(tmp_path / "compiled", compiled, max_steps=6)
    assert whole == pytest.approx(plain, abs=1e-4)
    assert not [name for name in end["state_dict"] if "_orig_mod" in name]
    if not resumes:
        return
    half = last(tmp_path / "compiled").with_name("half.ckpt")
    assert read_checkpoint(half)["global_step"] == 3
    rest, resumed = train(tmp_path / "compiled", compiled, half, max_steps=6)
    assert rest == whole[3:]
    assert_same(resumed["state_dict"], end["state_dict"])
    uncompiled, _ = train(tmp_path / "mixed", model, last(tmp_path / "compiled"), max_steps=8)
    assert len(uncompiled) == 2
