"""Compiled training equals uncompiled training, and so do the keys of its checkpoints."""

import shutil

import pytest
import torch
from lightning import Callback
from tiny import MUON, assert_same, last, make_data, make_module, make_trainer

from chargpt.checkpoints import read_checkpoint

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler"
)

LAPTOP = MUON | dict(position="rotary", norm="plain", bias=False, activation="relu2")
CPU = MUON | dict(position="rotary", norm="plain", ngrams={2: 9, 4: 30})


class Losses(Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
        self.seen.append(outputs["loss"].item())


def train(folder, model, ckpt_path=None, **settings):
    torch.compiler.reset()
    losses = Losses()
    trainer = make_trainer(folder, losses, limit_val_batches=0, **settings)
    module = make_module(n_layer=1, dropout=0.0, **model)
    trainer.fit(module, make_data(folder), ckpt_path=ckpt_path, weights_only=True)
    return losses.seen, read_checkpoint(last(folder))


@pytest.mark.parametrize("model", [{}, LAPTOP, CPU], ids=["textbook", "laptop", "cpu"])
def test_compiled_training_equals_uncompiled_training(tmp_path, model):
    for name in ("plain", "compiled", "parts", "mixed"):
        (tmp_path / name).mkdir()
    plain, _ = train(tmp_path / "plain", model, max_steps=6)
    compiled = model | dict(compile=True)
    whole, end = train(tmp_path / "compiled", compiled, max_steps=6)
    assert whole == pytest.approx(plain, abs=1e-4)
    _, half = train(tmp_path / "parts", compiled, max_steps=3)
    assert not [name for name in half["state_dict"] if "_orig_mod" in name]
    rest, resumed = train(tmp_path / "parts", compiled, last(tmp_path / "parts"), max_steps=6)
    assert rest == whole[3:]
    assert_same(resumed["state_dict"], end["state_dict"])
    uncompiled, _ = train(tmp_path / "mixed", model, last(tmp_path / "compiled"), max_steps=8)
    assert len(uncompiled) == 2
