"""The loss and its mean, learning rates, time limits, precision, the contents of checkpoints."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from tiny import MUON, assert_same, last, make_data, make_module, make_trainer, write_text

from chargpt.checkpoints import build_network, read_checkpoint
from chargpt.model import UserError
from chargpt.training import display
from chargpt.training.module import GPTModule
from chargpt.vocabulary import Vocabulary


class Watch(Callback):
    """Records the context, the loss and the learning rates of each step."""

    def __init__(self) -> None:
        self.lrs, self.losses, self.contexts = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
        self.contexts.append(module.context)
        self.losses.append(outputs["loss"].item())
        self.lrs.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def train(folder, *callbacks, model=None, data=None, ckpt_path=None, **settings):
    watch = Watch()
    trainer = make_trainer(folder, watch, *callbacks, **settings)
    module = make_module(**model or {})
    trainer.fit(module, make_data(folder, **data or {}), ckpt_path=ckpt_path)
    return watch, module, trainer


# ---- the mean over a split ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    _, module, _ = train(folder)
    return folder, module


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_validation_loss_is_the_mean_over_all_characters_but_the_first(trained, batch_size):
    """Compared with a loop that predicts each character from those before it in its sequence."""
    folder, module = trained
    data = make_data(folder, batch_size=batch_size, val_fraction=0.0765)  # 153 is no multiple of 8
    scores = make_trainer(folder).validate(module, data, ckpt_path=last(folder), verbose=False)[0]
    tokens = torch.from_numpy(data.val_tokens.astype("int64"))
    losses = []
    module.eval()
    with torch.no_grad():
        for i in range(1, len(tokens)):
            start = (i - 1) // 8 * 8
            logits = module.gpt(tokens[None, start:i])[0, -1]
            losses.append(F.cross_entropy(logits.double(), tokens[i]).item())
    assert len(losses) == 152
    assert scores["val_loss"] == pytest.approx(sum(losses) / 152, abs=1e-6)
    assert scores["val_bpc"] == pytest.approx(sum(losses) / 152 / math.log(2), abs=1e-6)


def test_mean_loss_weighs_by_characters_and_sees_nan():
    mean = make_module().mean_loss
    mean.update(torch.tensor(2.0), 30)
    mean.update(torch.tensor(5.0), 10)
    assert mean.compute() == 2.75
    mean.update(torch.tensor(math.nan), 1)
    assert mean.compute().isnan()


def test_a_validation_loss_that_is_not_a_number_is_reported(trained, monkeypatch):
    folder, module = trained
    monkeypatch.setattr(GPTModule, "loss", lambda *_: torch.tensor(math.nan))
    with pytest.raises(UserError, match="val_loss is nan"):
        make_trainer(folder).validate(module, make_data(folder), verbose=False)


SHORT = [dict(position="rotary"), dict(position="learned")]


@pytest.mark.parametrize("model", SHORT, ids=str)
def test_validation_in_a_run_uses_the_context_in_use_and_validate_the_whole(tmp_path, model):
    """Against a loop over the characters. 153 of them: no multiple of 8, nor the rest of 4."""
    model = model | dict(short_contexts={4: 1.0})
    data = make_data(tmp_path, val_fraction=0.0765)
    trainer, module = make_trainer(tmp_path), make_module(**model)
    trainer.fit(module, data)
    in_fit = trainer.callback_metrics["val_loss"].item()
    (scores,) = make_trainer(tmp_path).validate(
        module, data, ckpt_path=last(tmp_path), verbose=False
    )
    tokens = torch.from_numpy(data.val_tokens.astype("int64"))
    module.eval()
    for loss, context in ((in_fit, 4), (scores["val_loss"], 8)):
        losses = []
        with torch.no_grad():
            for i in range(1, len(tokens)):
                start = (i - 1) // context * context
                logits = module.gpt(tokens[None, start:i])[0, -1]
                losses.append(F.cross_entropy(logits.double(), tokens[i]).item())
        assert loss == pytest.approx(sum(losses) / 152, abs=1e-6)
    assert in_fit != pytest.approx(scores["val_loss"], abs=1e-5)


@pytest.mark.parametrize("model", SHORT, ids=str)
def test_a_run_that_ended_on_short_contexts_generates_with_no_more(tmp_path, model):
    _, module, _ = train(tmp_path, model=model | dict(short_contexts={4: 0.9}), max_steps=8)
    checkpoint = read_checkpoint(last(tmp_path))
    assert checkpoint["chargpt"]["context"] == 4
    gpt, _ = build_network(checkpoint, "last")
    assert gpt.config.block_size == 4
    ids = torch.arange(4)[None]
    assert torch.equal(gpt.eval()(ids), module.gpt.eval()(ids))
    with pytest.raises(UserError, match="block_size is 4"):
        gpt(torch.arange(5)[None])
    assert checkpoint["hyper_parameters"]["block_size"] == 8  # resuming trains on whole ones
    watch, _, _ = train(
        tmp_path,
        model=model | dict(short_contexts={4: 0.5}),
        max_steps=10,
        ckpt_path=last(tmp_path),
    )
    assert watch.contexts == [8, 8]
    assert build_network(read_checkpoint(last(tmp_path)), "last")[0].config.block_size == 8


class Losses(GPTModule):
    """Its validation losses are given."""

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", torch.tensor(self.losses.pop(0), dtype=torch.float64))


@pytest.mark.parametrize("killed_at", [None, 6, 10])
def test_the_best_score_is_that_of_the_longest_context(tmp_path, killed_at):
    """Also in a run that is killed and resumed: it is read from best.ckpt."""
    losses = [1.0, 3.0, 2.5, 2.75]  # after step 4 of context 4, after 8, 12 and 16 of context 8
    best = tmp_path / "checkpoints" / "best.ckpt"

    class Killed(Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if trainer.global_step == killed_at:
                raise RuntimeError("killed")

    def fit(*callbacks, **arguments):
        module = Losses(**make_module(short_contexts={4: 0.3}).hparams)
        module.losses = losses
        make_trainer(tmp_path, *callbacks, max_steps=16).fit(
            module, make_data(tmp_path), **arguments
        )

    if killed_at:
        with pytest.raises(RuntimeError, match="killed"):
            fit(Killed())
        step, loss = {6: (4, 1.0), 10: (8, 3.0)}[killed_at]
        assert read_checkpoint(best)["chargpt"]["val_loss"] == loss
        assert read_checkpoint(best)["global_step"] == step
    fit(**dict(ckpt_path=last(tmp_path)) if killed_at else {})
    found = read_checkpoint(best)
    assert (found["global_step"], found["chargpt"]["val_loss"]) == (12, 2.5)
    assert found["chargpt"]["context"] == 8


def test_the_test_split_is_scored_like_the_validation_split(trained):
    folder, module = trained
    as_test = make_data(folder, val_fraction=0.1, test_fraction=0.1)
    as_val = make_data(folder, val_fraction=0.1)
    (tested,) = make_trainer(folder).test(module, as_test, verbose=False)
    (validated,) = make_trainer(folder).validate(module, as_val, verbose=False)
    assert tested["test_loss"] == validated["val_loss"]


# ---- learning ----


def test_one_batch_is_memorized(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on a mat" + "\n" * 3)
    data = dict(block_size=19, batch_size=4, val_fraction=0.1)
    watch, _, _ = train(
        tmp_path,
        model=dict(block_size=19, dropout=0.0, n_embd=32),
        data=data,
        max_steps=150,
        val_check_interval=150,
    )
    assert watch.losses[0] > 2 and watch.losses[-1] < 0.05


def test_the_seed_decides_weights_batches_and_masks(tmp_path):
    def losses(**seeds):
        torch.rand(1)  # the state of torch's generator has no effect
        return train(
            tmp_path, data=dict(seed=seeds["data"]), model=dict(seed=seeds["model"]), max_steps=3
        )[0].losses

    same = losses(model=1, data=1)
    assert same == losses(model=1, data=1)
    assert same != losses(model=2, data=1)
    assert same != losses(model=1, data=2)


@pytest.mark.parametrize(
    "model", [dict(dropout=0.5, attention_dropout=0.0), dict(dropout=0.0, attention_dropout=0.5)]
)
def test_each_micro_batch_has_masks_of_its_own(tmp_path, model):
    """All sequences are the same and the weights constant: only the masks differ, and they repeat."""
    (tmp_path / "text.txt").write_text("ab" * 900 + "c" * 200)
    model |= dict(lr=1e-12, position="rotary")
    data = dict(batch_size=1)
    watch, _, _ = train(tmp_path, model=model, data=data, max_steps=4, accumulate_grad_batches=2)
    assert len(watch.losses) == len(set(watch.losses)) == 8
    again, _, _ = train(tmp_path, model=model, data=data, max_steps=4, accumulate_grad_batches=2)
    assert again.losses == watch.losses


def test_masks_are_new_in_each_epoch_too(tmp_path):
    """All sequences are the same, as above: without masks of their own, losses would be equal."""
    (tmp_path / "text.txt").write_text("ab" * 900 + "c" * 200)
    limits = dict(max_steps=4, limit_train_batches=1, val_check_interval=1)
    model = dict(dropout=0.5, lr=1e-12, position="rotary")
    watch, _, _ = train(tmp_path, model=model, data=dict(batch_size=1), **limits)
    assert len(watch.losses) == len(set(watch.losses)) == 4


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 1, 1, 1]),
        ("linear", [0.5, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5)]),
    ],
)
def test_schedules(tmp_path, schedule, expected):
    """4 steps, 2 of them warm-up, with a final learning rate of a fifth."""
    model = MUON | dict(schedule=schedule, warmup_steps=2, min_lr_ratio=0.2)
    watch, _, _ = train(tmp_path, model=model, max_steps=4, limit_val_batches=0)
    assert [lrs[0] / 0.01 for lrs in watch.lrs] == pytest.approx(expected)
    assert [lrs[-1] / MUON["muon_lr"] for lrs in watch.lrs] == pytest.approx(expected)


def test_contexts_grow(tmp_path):
    model = dict(short_contexts={2: 0.25, 4: 0.5})
    watch, _, _ = train(tmp_path, model=model, max_steps=8)
    assert watch.contexts == [2, 2, 4, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("model", [{}, MUON])
def test_precisions_with_accumulation_and_clipping(tmp_path, model):
    """The losses of ten steps are close to those in float32, from the same weights."""

    class StartAlike(Callback):  # some versions of torch generate different numbers in bfloat16
        def on_fit_start(self, trainer, module):
            start.build(module.vocabulary)
            module.load_state_dict(start.state_dict())

    model = model | dict(dropout=0.0)
    start = make_module(**model)
    trainer = dict(
        max_steps=10, limit_val_batches=2, accumulate_grad_batches=2, gradient_clip_val=0.1
    )
    _, full, _ = train(tmp_path, StartAlike(), model=model, **trainer)
    for precision in ("bf16-mixed", "bf16-true"):  # the first replaces 16-mixed on a CPU
        _, low, _ = train(tmp_path, StartAlike(), model=model, precision=precision, **trainer)
        begin, a, b = (
            torch.nn.utils.parameters_to_vector(m.parameters()).float() for m in (start, low, full)
        )
        assert torch.cosine_similarity(a - begin, b - begin, dim=0) > 0.9, precision


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    model = dict(dropout=0.0)
    gradients = []

    class Keep(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            gradients.append([p.grad.clone() for p in module.parameters()])

    train(
        tmp_path,
        Keep(),
        model=model,
        max_steps=1,
        accumulate_grad_batches=4,
        data=dict(batch_size=2),
    )
    data = make_data(tmp_path, batch_size=2)
    data.setup()
    blocks = torch.cat([batch for _, batch in zip(range(4), data.train_dataloader())]).long()
    fresh = make_module(**model)
    fresh.build(data.vocabulary)
    fresh.loss(fresh.gpt.hidden_states(blocks[:, :-1]), blocks[:, 1:]).backward()
    for accumulated, p in zip(gradients[0], fresh.parameters()):
        torch.testing.assert_close(accumulated, p.grad, rtol=1e-4, atol=1e-7)


# ---- the second target ----


def test_the_second_target_is_the_character_after_the_next():
    module = make_module(second_target=0.5, dropout=0.0)
    module.build(Vocabulary("abcdef"))
    torch.nn.init.normal_(module.second_head.weight)
    ids = torch.randint(6, (3, 9), generator=torch.Generator().manual_seed(0))
    module.progress = 0.25  # half of its weight is left
    features = module.gpt.hidden_states(ids[:, :-1])
    log_p = (features @ module.second_head.weight.T).log_softmax(-1)
    expected = -torch.stack([log_p[b, t, ids[b, t + 2]] for b in range(3) for t in range(7)]).mean()
    assert module.second_loss(features, ids[:, 1:]).item() == pytest.approx(0.25 * expected.item())
    module.progress = 0.5
    assert module.second_loss(features, ids[:, 1:]).item() == 0


def test_the_second_target_fades_and_is_no_part_of_the_network(tmp_path):
    model = dict(second_target=0.5, dropout=0.0)
    watch, module, _ = train(tmp_path, model=model, max_steps=8)
    assert module.second_head.weight.abs().max() > 0
    gpt, _ = build_network(read_checkpoint(last(tmp_path)), "last")
    assert_same(dict(gpt.state_dict()), dict(module.gpt.state_dict()))


# ---- time ----


class Clock(Callback):
    """A clock that advances by one second per step."""

    now = 100.0

    def on_train_batch_end(self, *_) -> None:
        self.now += 1.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: clock.now)
    return clock


def test_the_learning_rate_reaches_zero_when_time_is_up(tmp_path, clock):
    watch, _, trainer = train(
        tmp_path, clock, model=dict(schedule="linear"), max_steps=-1, max_time=dict(seconds=5)
    )
    assert [lrs[0] / 0.01 for lrs in watch.lrs] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert trainer.global_step == read_checkpoint(last(tmp_path))["global_step"] == 5
    assert "val_loss" in trainer.callback_metrics


def test_a_resumed_run_counts_the_time_already_spent(tmp_path, clock):
    model, limits = dict(schedule="linear"), dict(max_time=dict(seconds=5))
    train(tmp_path, clock, model=model, max_steps=3, **limits)
    clock.now += 1000  # between the two
    watch, _, trainer = train(
        tmp_path, clock, model=model, max_steps=-1, ckpt_path=last(tmp_path), **limits
    )
    assert [lrs[0] / 0.01 for lrs in watch.lrs] == pytest.approx([0.4, 0.2])
    assert trainer.global_step == 5


def test_throughput_counts_neither_the_first_step_nor_validation_and_what_follows(
    tmp_path, monkeypatch
):
    """A batch of 4 sequences of 8 characters takes a second, all else much longer."""
    now, seen = [0.0], []

    class Slow(Callback):
        def on_train_batch_start(self, trainer, *_):
            now[0] += 1 if trainer.global_step else 50
            seen.append(trainer.callback_metrics.get("chars_per_second"))

        def on_validation_end(self, *_):
            now[0] += 100

    monkeypatch.setattr(display, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    train(tmp_path, Slow())
    assert seen == [None, None] + [32] * 10


# ---- the contents of a checkpoint ----


def test_a_learning_rate_flag_takes_effect_when_a_run_is_resumed(tmp_path):
    train(tmp_path, model=MUON, max_steps=4)
    model = MUON | dict(lr=0.5, muon_lr=0.25, muon_weight_decay=0.0)
    watch, _, trainer = train(tmp_path, model=model, max_steps=5, ckpt_path=last(tmp_path))
    assert watch.lrs == [[0.5, 0.5, 0.25, 0.25]]
    assert trainer.optimizers[0].param_groups[-1]["weight_decay"] == 0.0


def test_a_checkpoint_alone_gives_network_and_vocabulary(trained):
    folder, module = trained
    checkpoint = read_checkpoint(last(folder))
    assert checkpoint["vocabulary"] == module.vocabulary.characters
    alone = GPTModule.load_from_checkpoint(last(folder), weights_only=True)
    assert alone.vocabulary == module.vocabulary
    assert_same(alone.state_dict(), module.state_dict())
    assert list(checkpoint["state_dict"]) == [f"gpt.{name}" for name in module.gpt.state_dict()]


def test_another_vocabulary_is_refused(trained, tmp_path):
    folder, _ = trained
    write_text(tmp_path, alphabet="abcdefghz\n")
    with pytest.raises(UserError, match=r"does not know: \['z'\]"):
        train(tmp_path, ckpt_path=last(folder))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(lr=0.0), "lr is 0.0"),
        (dict(n_embd=10, n_head=3), "not divisible"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(block_size=8, short_contexts={3: 0.5}), "3: 0.5; lengths must divide block_size 8"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_module(**settings)


def test_scores_are_in_full_precision_whatever_the_network_computes_in(tmp_path):
    _, _, trainer = train(tmp_path, max_steps=4, precision="bf16-true")
    loss = trainer.callback_metrics["val_loss"]
    assert loss.dtype == torch.float64 or loss.dtype == torch.float32
    assert loss.item() != loss.bfloat16().item()


def test_module_and_data_must_agree_on_the_block_size(tmp_path):
    with pytest.raises(UserError, match="block_size is 16 in the GPTModule, but 8"):
        train(tmp_path, model=dict(block_size=16))
    tmp_path.mkdir(exist_ok=True)  # removed with the run that failed
    with pytest.raises(UserError, match="needs a CharDataModule"):
        make_trainer(tmp_path).fit(make_module(), train_dataloaders=[])


@pytest.mark.parametrize(
    "setting",
    [
        dict(activation="gelu"),
        dict(n_head=4),
        dict(dropout=0.3, bias=False),
        dict(second_target=0.5),
        MUON,
    ],
    ids=str,
)
def test_a_checkpoint_of_a_different_network_or_optimizer_is_refused(trained, tmp_path, setting):
    """In Python too, and where its weights would fit."""
    name = next(name for name in setting if name != "dropout")
    refused = f"^{name} is .* in the checkpoint and cannot be changed to {setting[name]}:"
    with pytest.raises(UserError, match=refused):
        train(tmp_path, model=setting, ckpt_path=last(trained[0]))


def test_dropout_may_change_when_a_run_resumes(trained, tmp_path):
    train(tmp_path, model=dict(dropout=0.3), ckpt_path=last(trained[0]), max_steps=13)
