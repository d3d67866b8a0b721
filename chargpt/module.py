"""One training step, one evaluation step, the optimizer; what a checkpoint needs to be read alone."""

import inspect
import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torchmetrics import Metric

from chargpt.model import GPT, check_arguments
from chargpt.optim import POLAR_EXPRESS, MuonAdamW, decay
from chargpt.runs import CheckpointError
from chargpt.vocabulary import Vocabulary


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to do."""


class MeanLoss(Metric):
    """Mean over characters, of losses that are means over some characters each.

    torchmetrics' own MeanMetric leaves out either NaN or, with nan_strategy="disable", the weights.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("characters", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, characters: int) -> None:
        self.total += loss.to(self.total.dtype) * characters
        self.characters += characters

    def compute(self) -> Tensor:
        return self.total / self.characters


class GPTModule(LightningModule):
    """A GPT that learns to predict the next character.

    Args:
        block_size: characters that the model looks at, at most; set by data.block_size.
        n_embd: channels of the residual stream.
        n_head: attention heads; they divide n_embd among themselves.
        n_layer: transformer blocks, one after the other.
        dropout: share of activations set to zero while training, in [0, 1).
        attention_dropout: the same for attention weights, where it is slow on a CPU; null
            takes dropout's.
        position: learned embeddings of positions, or rotary: queries and keys turned by them.
        norm: layer (LayerNorm), or plain: without gain and bias, and on the embeddings as well.
        bias: whether linear layers add a bias.
        activation: of the feed-forward layers; relu2 is ReLU squared.
        zero_init: start each residual branch and the head at zero.
        trigram_rows: add an embedding of the last three characters, out of a hashed table with this
            many rows; 0 for none.
        lr: highest learning rate of AdamW.
        beta1: AdamW's decay of the running mean of gradients.
        beta2: AdamW's decay of the running mean of squared gradients.
        weight_decay: AdamW's, on matrices only.
        muon_lr: highest learning rate of Muon, which then moves the matrices of the blocks;
            null leaves everything to AdamW.
        muon_weight_decay: Muon's weight decay.
        muon_momentum: Muon's decay of the running mean of gradients.
        muon_iterations: Newton-Schulz iterations of each Muon step, 1 to 5.
        warmup_steps: steps over which the learning rate rises from zero.
        schedule: constant, or cosine or linear down to min_lr_ratio as trainer.max_steps or
            trainer.max_time runs out, whichever is nearer.
        min_lr_ratio: where the schedule ends, as a share of the highest learning rate.
        short_contexts: lengths of context and the share of the run until which each is used,
            e.g. {64: 0.4, 128: 0.75}: blocks are cut into pieces of 64 characters at first, then
            of 128; afterwards they are whole.
        compile: compile the network with torch.compile; pays off on a GPU after a minute.
        seed: of the weights and of dropout; the command line fills in seed_everything.

    Raises:
        ValueError: a setting that cannot be; the message names it.
    """

    def __init__(
        self,
        block_size: int = 256,
        n_embd: int = 384,
        n_head: int = 6,
        n_layer: int = 6,
        dropout: float = 0.2,
        attention_dropout: float | None = None,
        position: Literal["learned", "rotary"] = "learned",
        norm: Literal["layer", "plain"] = "layer",
        bias: bool = True,
        activation: Literal["relu", "gelu", "relu2"] = "relu",
        zero_init: bool = False,
        trigram_rows: int = 0,
        lr: float = 3e-4,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.01,
        muon_lr: float | None = None,
        muon_weight_decay: float = 0.0,
        muon_momentum: float = 0.95,
        muon_iterations: int = 4,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine", "linear"] = "constant",
        min_lr_ratio: float = 0.0,
        short_contexts: dict[int, float] | None = None,
        compile: bool = False,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        check_arguments(
            block_size=block_size,
            n_embd=n_embd,
            n_head=n_head,
            n_layer=n_layer,
            dropout=dropout,
            attention_dropout=attention_dropout or 0.0,
            position=position,
            norm=norm,
            activation=activation,
            trigram_rows=trigram_rows,
        )
        for name, rate in (("lr", lr), ("muon_lr", muon_lr)):
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} is {rate}; it must be positive")
        for name, share in (("beta1", beta1), ("beta2", beta2), ("muon_momentum", muon_momentum)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}; it must be at least 0 and less than 1")
        if not 1 <= muon_iterations <= len(POLAR_EXPRESS):
            raise ValueError(f"muon_iterations is {muon_iterations}; it must be 1 to {len(POLAR_EXPRESS)}")
        for name, least in (
            ("warmup_steps", warmup_steps),
            ("weight_decay", weight_decay),
            ("muon_weight_decay", muon_weight_decay),
            ("min_lr_ratio", min_lr_ratio),
        ):
            if not 0 <= least < math.inf:
                raise ValueError(f"{name} is {least}; it must be at least 0")
        for length, until in (short_contexts or {}).items():
            if length < 1 or block_size % length:
                raise ValueError(f"short_contexts: {length} does not divide block_size {block_size}")
            if not 0 < until <= 1:
                raise ValueError(f"short_contexts: {until} is no share of the run; it must lie between 0 and 1")
        self.save_hyperparameters()
        self.gpt: GPT | None = None  # made when the vocabulary is known
        self.vocabulary: Vocabulary | None = None
        self.mean_loss = MeanLoss()
        self.validated_step = 0  # the last one after which the whole split was scored

    # ---- the network ----

    def build(self, vocabulary: Vocabulary) -> None:
        """Make the network for this vocabulary; its first weights depend on the seed alone."""
        sizes = {k: v for k, v in self.hparams.items() if k in inspect.signature(GPT).parameters}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.hparams.seed)
            self.gpt = GPT(len(vocabulary), **sizes)
        self.vocabulary = vocabulary
        if self.hparams.compile:
            self.gpt.compile()  # in place: the names of the weights stay as they are

    def configure_model(self) -> None:
        if self._trainer is None:  # load_from_checkpoint, where on_load_checkpoint builds
            return
        if self.gpt is None:
            self.build(self.trainer.datamodule.vocabulary)
        if self.trainer.strategy.root_device.type != "mps":  # which has no float64
            self.mean_loss.set_dtype(torch.float64)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Asked on all ranks, so that all stop; what was saved before is left alone.
        if not all(p.isfinite().all() for p in self.gpt.parameters()):
            raise diverged("a weight", math.nan, self.global_step)
        checkpoint["vocabulary"] = self.vocabulary.characters
        checkpoint["validated_step"] = self.validated_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        vocabulary = Vocabulary(checkpoint["vocabulary"])
        if self.gpt is None:
            self.build(vocabulary)
        elif vocabulary != self.vocabulary:
            raise CheckpointError(vocabulary_difference(vocabulary, self.vocabulary))
        if self._trainer is not None and self.trainer.state.fn == "fit":
            restart_after_last_step(checkpoint, self.trainer)
            self.validated_step = checkpoint["validated_step"]

    # ---- learning ----

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per character, of ids and targets (B, T)."""
        logits = self.gpt(ids)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = batch.long()  # (B, T + 1), narrow integers until here
        context = self.context()
        # A block of T characters is T / context blocks of fewer.
        ids, targets = batch[:, :-1].reshape(-1, context), batch[:, 1:].reshape(-1, context)
        if self.hparams.dropout or self.hparams.attention_dropout:
            self.seed_dropout()
        loss = self.loss(ids, targets)
        every = self.trainer.log_every_n_steps  # 0 in a barebones trainer: nothing is logged
        if every and (self.global_step + 1) % every == 0:
            self.log_progress(loss.detach(), context)
        return loss

    def seed_dropout(self) -> None:
        """Make the masks a function of (seed, micro-batch, rank): going on needs no saved state."""
        k = self.trainer.fit_loop.epoch_loop.total_batch_idx
        words = np.random.SeedSequence((self.hparams.seed, k, self.global_rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))

    def log_progress(self, loss: Tensor, context: int) -> None:
        # The mean of all ranks, which then stop together; reduced in place, so a copy.
        loss = self.trainer.strategy.reduce(loss.clone(), reduce_op="mean")
        if not math.isfinite(loss.item()):
            raise diverged("training loss", loss.item(), self.global_step + 1)
        self.log("train_loss", loss, prog_bar=True)
        self.log("lr", self.hparams.lr * self.lr_factor())
        if self.hparams.short_contexts:
            self.log("context", float(context))

    def on_validation_epoch_start(self) -> None:
        self.mean_loss.reset()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if len(batch) == 0:  # a rank for which no block was left
            return
        batch = batch.long()
        ids, targets = batch[:, :-1], batch[:, 1:]
        self.mean_loss.update(self.loss(ids, targets), targets.numel())

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self.log_means("val")
        self.validated_step = self.global_step

    def on_test_epoch_end(self) -> None:
        self.log_means("test")

    def log_means(self, split: str) -> None:
        loss = self.mean_loss.compute()  # of all ranks together
        if not torch.isfinite(loss):
            raise diverged(f"{split}_loss", loss.item(), self.global_step)
        self.log(f"{split}_loss", loss, prog_bar=True)
        self.log(f"{split}_bpc", loss / math.log(2))

    # ---- the optimizer, and how its learning rate and the context go over a run ----

    def configure_optimizers(self) -> torch.optim.Optimizer:
        h = self.hparams
        matrices = [p for p in self.gpt.parameters() if p.dim() >= 2]
        vectors = [p for p in self.gpt.parameters() if p.dim() < 2]  # biases, gains of norms
        adamw = dict(lr=h.lr, betas=(h.beta1, h.beta2))
        if h.muon_lr is None:
            optimizer = torch.optim.AdamW(
                [dict(params=matrices, weight_decay=h.weight_decay), dict(params=vectors, weight_decay=0.0)],
                **adamw,
                fused=self.may_fuse(),
            )
        else:
            hidden = [p for p in self.gpt.blocks.parameters() if p.dim() == 2]
            qkv = [block.attention.qkv.weight for block in self.gpt.blocks]
            muon = dict(
                muon=True,
                lr=h.muon_lr,
                weight_decay=h.muon_weight_decay,
                momentum=h.muon_momentum,
                iterations=h.muon_iterations,
            )
            optimizer = MuonAdamW(
                [
                    dict(params=without(matrices, hidden), weight_decay=h.weight_decay, **adamw),
                    dict(params=vectors, weight_decay=0.0, **adamw),
                    dict(params=without(hidden, qkv), **muon),
                    dict(params=qkv, parts=3, **muon),  # query, key and value are three matrices
                ]
            )
        self.keep_settings(optimizer)
        return optimizer

    def may_fuse(self) -> bool:
        """Lightning clips gradients of mixed precision only with an optimizer that is not fused."""
        clips_mixed = self.trainer.gradient_clip_val and "mixed" in str(self.trainer.precision)
        return self.device.type in ("cpu", "cuda") and not clips_mixed

    def keep_settings(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a checkpoint restore the optimizer's state, but not the settings it ran with.

        They are hyperparameters: the checkpoint's own, unless the user has typed others.
        """
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self.peak_lrs = [group["lr"] for group in settings]

        def restore(optimizer: torch.optim.Optimizer) -> None:
            for group, own in zip(optimizer.param_groups, settings):
                group.update(own)

        optimizer.register_load_state_dict_post_hook(restore)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        factor = self.lr_factor()
        for group, peak in zip(optimizer.param_groups, self.peak_lrs):
            group["lr"] = peak * factor

    def lr_factor(self) -> float:
        """Share of the highest learning rate at this step: a function of the progress, not a state."""
        h = self.hparams
        warmup = min(1.0, (self.global_step + 1) / max(1, h.warmup_steps))
        return warmup * (h.min_lr_ratio + (1 - h.min_lr_ratio) * decay(h.schedule, self.progress()))

    def context(self) -> int:
        """Characters of context at this step."""
        for length, until in sorted((self.hparams.short_contexts or {}).items()):
            if self.progress() < until:
                return length
        return self.hparams.block_size

    def progress(self) -> float:
        """Share of the run that is over, by steps or by time, whichever is further; 0 to 1."""
        trainer = self.trainer
        share = self.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
        for timer in trainer.callbacks:
            if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None:
                elapsed = timer.time_elapsed()
                share = max(share, elapsed / (elapsed + max(left, 0.0)))
                if trainer.world_size > 1:  # clocks differ, and all ranks must do the same
                    share = trainer.strategy.broadcast(share)
        return min(share, 1.0)


def without(parameters: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    ids = {id(p) for p in others}
    return [p for p in parameters if id(p) not in ids]


def diverged(what: str, value: float, step: int) -> TrainingError:
    return TrainingError(
        f"{what} is {value} at step {step}: training has diverged and stops\n"
        "earlier checkpoints are kept; try a lower --model.lr, a warm-up, or --trainer.gradient_clip_val 1"
    )


def vocabulary_difference(trained: Vocabulary, offered: Vocabulary) -> str:
    missing = sorted(set(trained.characters) - set(offered.characters))
    new = sorted(set(offered.characters) - set(trained.characters))
    parts = [
        f"{len(chars)} {kind} ({', '.join(map(repr, chars[:5]))}{', ...' if len(chars) > 5 else ''})"
        for kind, chars in (("new", new), ("missing", missing))
        if chars
    ]
    return (
        f"the checkpoint's {len(trained)} characters are not those of this text: {' and '.join(parts)}\n"
        "go on with the text it was trained on, or train anew"
    )


def restart_after_last_step(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Set Lightning's counters to where the last optimizer step ended.

    A checkpoint may stem from the middle of an accumulation, whose gradients it does not hold, from
    before or within a validation, or from the end of a run that now gets more steps. In every case
    training goes on with the micro-batch after the last step, in the one endless epoch; before it
    comes the validation of that step, where one is due and has not been done.
    """
    if "loops" not in checkpoint:
        raise CheckpointError("this checkpoint holds weights alone: it can write, but not go on training")
    loops = checkpoint["loops"]["fit_loop"]
    step = checkpoint["global_step"]
    batches = step * trainer.accumulate_grad_batches
    interval = trainer.val_check_interval
    due = trainer.enable_validation and isinstance(interval, int) and batches % interval == 0
    pending = due and checkpoint["validated_step"] != step

    loops["epoch_progress"].update(total=counts(1, done=0), current=counts(1, done=0))
    loops["epoch_loop.batch_progress"].update(
        total=counts(batches), current=counts(batches), is_last_batch=False
    )
    # One started and none done is how Lightning knows a validation that was interrupted.
    loops["epoch_loop.val_loop.batch_progress"].update(
        total=counts(1, done=0) if pending else counts(0), current=counts(0), is_last_batch=False
    )
    # The logger's step. Where a validation is due Lightning counts on after it, done or skipped.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - due


def counts(started: int, done: int | None = None) -> dict[str, int]:
    done = started if done is None else done
    return dict(ready=started, started=started, processed=done, completed=done)
