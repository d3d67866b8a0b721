"""GPTModule: one training step, one validation step, the optimizer; and their settings."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor, nn
from torchmetrics import MeanMetric

from chargpt.checkpoints import CheckpointError, config_of, rename_ngrams, upgrade
from chargpt.model.gpt import GPT, SHARE, GPTConfig, check
from chargpt.training.agreement import Agreement, elapsed_share
from chargpt.training.optimizers import POLAR_EXPRESS, SCHEDULES, make_optimizer
from chargpt.vocabulary import Vocabulary


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to do."""


@dataclass(frozen=True)
class TrainingConfig(GPTConfig):
    """The settings of a GPTModule: those of its network, and how it is trained."""

    lr: float = 3e-4
    """Highest learning rate of AdamW."""
    beta1: float = 0.9
    """AdamW's decay of the running mean of gradients."""
    beta2: float = 0.999
    """AdamW's decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """AdamW's: weights with smaller gradients move less, rows of seldom seen n-grams for one."""
    weight_decay: float = 0.01
    """AdamW's, on embeddings and matrices only."""
    muon_lr: float | None = None
    """Highest learning rate of Muon, which then moves the matrices of the blocks; null leaves
    everything to AdamW."""
    muon_weight_decay: float = 0.0
    """Muon's weight decay."""
    muon_momentum: float = 0.95
    """Muon's decay of the running mean of gradients."""
    muon_iterations: int = 4
    """Newton-Schulz iterations of each Muon step, 1 to 5."""
    warmup_steps: int = 0
    """Learning rate warm-up: steps over which it rises from zero."""
    schedule: Literal[tuple(SCHEDULES)] = "constant"  # type: ignore[valid-type]
    """Learning rate schedule: constant, or cosine or linear down to min_lr_ratio as
    trainer.max_steps or trainer.max_time runs out, whichever is nearer."""
    min_lr_ratio: float = 0.0
    """Where the schedule ends, as a share of the highest learning rate."""
    short_contexts: dict[int, float] | None = None
    """Sequence length warm-up: lengths of context and the share of the run until which each is
    used. With {64: 0.4, 128: 0.75} sequences are cut into pieces of 64 characters at first, then of
    128; afterwards they are whole."""
    second_target: float = 0.0
    """Weight of a second loss: of the character after the next, predicted by a head of its own
    (Gloeckle et al. 2024, arXiv:2404.19737). It falls to 0 at half of the run."""
    compile: bool = False
    """Compile the network but for its head (torch.compile); pays off on a GPU after a minute."""
    seed: int = 1337
    """Of the weights and of dropout; the command line fills in seed_everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative = "eps warmup_steps weight_decay muon_weight_decay min_lr_ratio second_target"
        most = len(POLAR_EXPRESS)
        check(self, "lr muon_lr", "positive", lambda rate: 0 < rate < math.inf)
        check(self, "beta1 beta2 muon_momentum", *SHARE)
        check(self, not_negative, "at least 0", lambda value: 0 <= value < math.inf)
        check(self, "muon_iterations", f"1 to {most}", lambda n: 1 <= n <= most)
        for length, until in (self.short_contexts or {}).items():
            if length < 1 or self.block_size % length:
                raise ValueError(
                    f"short_contexts: {length} does not divide block_size {self.block_size}"
                )
            if not 0 < until <= 1:
                raise ValueError(
                    f"short_contexts: {until} is no share of the run; it must lie between 0 and 1"
                )

    def context_at(self, progress: float) -> int:
        """Characters of context when `progress`, 0 to 1, of the run is over."""
        for length, until in sorted((self.short_contexts or {}).items()):
            if progress < until:
                return length
        return self.block_size

    def second_target_at(self, progress: float) -> float:
        """Weight of the second target when `progress`, 0 to 1, of the run is over."""
        return self.second_target * max(0.0, 1 - 2 * progress)

    def lr_factor_at(self, step: int, progress: float) -> float:
        """Share of the highest learning rate: a function of the progress, not a state."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay = SCHEDULES[self.schedule](progress)
        return warmup * (self.min_lr_ratio + (1 - self.min_lr_ratio) * decay)


class GPTModule(LightningModule):
    """A GPT that learns to predict the next character.

    Args:
        settings: the fields of `TrainingConfig`.

    Raises:
        ValueError: a setting that cannot be; the message names it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        rename_ngrams(settings)
        self.config = TrainingConfig(**settings)
        self.save_hyperparameters(asdict(self.config))
        self.gpt: GPT | None = None  # made when the vocabulary is known
        self.second_head: nn.Linear | None = None
        self.vocabulary: Vocabulary | None = None
        # NaN counts: a loss that is no number must not vanish from the mean.
        self.mean_loss = MeanMetric(nan_strategy=math.nan)
        self.progress = 0.0  # share of the run that is over
        self.time_agreement = Agreement()
        self.time_share = 0.0  # share of max_time that is over, the same on all ranks

    # ---- the network ----

    def build(self, vocabulary: Vocabulary) -> None:
        """Make the network for this vocabulary; its first weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.gpt = GPT(config_of(dict(self.hparams)), len(vocabulary))
            if self.config.second_target:  # of use in training alone, so it is no part of the GPT
                self.second_head = nn.Linear(self.config.n_embd, len(vocabulary), bias=False)
                nn.init.zeros_(self.second_head.weight)
        self.vocabulary = vocabulary
        self.features = torch.compile(GPT.features) if self.config.compile else GPT.features

    def configure_model(self) -> None:
        try:
            trainer = self.trainer
        except RuntimeError:  # load_from_checkpoint has none, and on_load_checkpoint builds
            return
        refuse_tuners(trainer)
        data = trainer.datamodule
        if data is None:
            raise ValueError("a GPTModule learns from a CharDataModule: give it as `datamodule`")
        if data.hparams.block_size != self.config.block_size:
            raise ValueError(
                f"block_size is {self.config.block_size} in the GPTModule, "
                f"but {data.hparams.block_size} in the CharDataModule"
            )
        if self.gpt is None:
            self.build(data.vocabulary)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Asked on all ranks, so that all stop; what was saved before is left alone.
        if not all(p.isfinite().all() for p in self.gpt.parameters()):
            raise diverged("a weight", math.nan, self.global_step)
        checkpoint["vocabulary"] = self.vocabulary.characters

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        upgrade(checkpoint)
        vocabulary = Vocabulary(checkpoint["vocabulary"])
        if self.gpt is None:  # load_from_checkpoint, outside of a Trainer
            self.build(vocabulary)
        elif vocabulary != self.vocabulary:
            raise CheckpointError(vocabulary_difference(vocabulary, self.vocabulary))

    # ---- learning ----

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy: the mean loss in nats per character, from features (B, T, C)."""
        return cross_entropy(self.gpt.head(features), targets)

    def second_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """The weighted cross-entropy of the character after the next; zero once it has no weight.

        Position t predicts what position t + 1 has for its target; the last one has none.
        """
        weight = self.config.second_target_at(self.progress)
        if weight == 0:  # but DDP waits for a gradient of all weights
            return 0.0 * self.second_head.weight.sum()
        return weight * cross_entropy(self.second_head(features[:, :-1]), targets[:, 1:])

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        steps, limit = self.global_step, self.trainer.max_steps
        self.time_share = self.time_agreement.largest(self.trainer, elapsed_share(self.trainer))
        self.progress = min(1.0, max(steps / limit if limit > 0 else 0.0, self.time_share))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = batch.long()  # (B, T + 1), narrow integers until here
        context = self.config.context_at(self.progress)
        # A sequence of T characters is T / context sequences of fewer.
        ids, targets = batch[:, :-1].reshape(-1, context), batch[:, 1:].reshape(-1, context)
        self.seed_dropout(batch_idx)
        features = self.features(self.gpt, ids)
        loss = self.loss(features, targets)
        every = self.trainer.log_every_n_steps  # 0 in a barebones trainer: nothing is logged
        if every and (self.global_step + 1) % every == 0:
            self.log_progress(loss.detach(), context)
        return loss if self.second_head is None else loss + self.second_loss(features, targets)

    def seed_dropout(self, batch_idx: int) -> None:
        """Make the masks a function of (seed, micro-batch, rank): resuming needs no saved state."""
        # Not batch_idx itself, which begins anew where a limit makes epochs of the endless one.
        accumulate = self.trainer.accumulate_grad_batches
        micro_batch = self.global_step * accumulate + batch_idx % accumulate
        sequence = np.random.SeedSequence((self.config.seed, micro_batch, self.global_rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def log_progress(self, loss: Tensor, context: int) -> None:
        # The mean of all ranks, which then stop together; reduced in place, so a copy.
        loss = self.trainer.strategy.reduce(loss.clone(), reduce_op="mean")
        if not math.isfinite(loss.item()):
            raise diverged("training loss", loss.item(), self.global_step + 1)
        self.log("train_loss", loss, prog_bar=True)
        self.log("lr", self.config.lr * self.lr_factor)
        if self.config.short_contexts:
            self.log("context", float(context))

    def on_validation_epoch_start(self) -> None:
        # In full precision, whatever the network computes in; MPS has no float64.
        self.mean_loss.set_dtype(torch.float32 if self.device.type == "mps" else torch.float64)
        self.mean_loss.reset()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if len(batch) == 0:  # a rank for which no sequence was left
            return
        batch = batch.long()
        ids, targets = batch[:, :-1], batch[:, 1:]
        self.mean_loss.update(self.loss(self.features(self.gpt, ids), targets), targets.numel())

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self.log_means("val")

    def on_test_epoch_end(self) -> None:
        self.log_means("test")

    def log_means(self, split: str) -> None:
        """Log the mean loss over all characters of a split, in nats and in bits (bpc)."""
        loss = self.mean_loss.compute()  # of all ranks together
        if not torch.isfinite(loss):
            raise diverged(f"{split}_loss", loss.item(), self.global_step)
        self.log(f"{split}_loss", loss, prog_bar=True)
        self.log(f"{split}_bpc", loss / math.log(2))

    # ---- the optimizer and its learning rate ----

    def configure_optimizers(self) -> torch.optim.Optimizer:
        c = self.config
        muon = dict(
            lr=c.muon_lr,
            weight_decay=c.muon_weight_decay,
            momentum=c.muon_momentum,
            iterations=c.muon_iterations,
        )
        adamw = dict(lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
        optimizer = make_optimizer(
            list(self.parameters()),
            self.gpt.blocks,
            adamw,
            c.weight_decay,
            muon if c.muon_lr is not None else None,
            self.may_fuse(),
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
        factor = self.lr_factor
        for group, peak in zip(optimizer.param_groups, self.peak_lrs):
            group["lr"] = peak * factor

    @property
    def lr_factor(self) -> float:
        """Share of the highest learning rate at this step."""
        return self.config.lr_factor_at(self.global_step, self.progress)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln of the probability that logits (B, T, V) give to targets (B, T), its mean."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def refuse_tuners(trainer: Trainer) -> None:
    """Lightning's tuners would find a number that means nothing here."""
    for callback in trainer.callbacks:
        if isinstance(callback, LearningRateFinder):
            raise ValueError(
                "the learning rate finder cannot sweep: the rate is a function of the step here\n"
                "try a few, each in a short run: --model.lr 1e-3, --model.lr 3e-3, --model.lr 1e-2"
            )
        if isinstance(callback, BatchSizeFinder):
            raise ValueError(
                "the batch size finder cannot choose: which sequences a step reads follows from "
                "the batch size, and its trials are steps\n"
                "try a larger --data.batch_size; where the memory is too small, it ends at once"
            )


def diverged(what: str, value: float, step: int) -> TrainingError:
    return TrainingError(
        f"{what} is {value} at step {step}: training has diverged and stops\n"
        "earlier checkpoints are kept; try a lower --model.lr, a warm-up, "
        "or --trainer.gradient_clip_val 1"
    )


def vocabulary_difference(trained: Vocabulary, offered: Vocabulary) -> str:
    missing = sorted(set(trained.characters) - set(offered.characters))
    new = sorted(set(offered.characters) - set(trained.characters))
    parts = [
        f"{len(chars)} {kind} ({', '.join(map(repr, chars[:5]))}{', ...' if chars[5:] else ''})"
        for kind, chars in (("new", new), ("missing", missing))
        if chars
    ]
    return (
        f"the checkpoint's {len(trained)} characters are not those of this text: "
        f"{' and '.join(parts)}\n"
        "go on with the text it was trained on, or train anew"
    )
