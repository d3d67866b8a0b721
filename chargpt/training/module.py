"""GPTModule: the training step, the validation step, the optimizer, and their settings."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch import callbacks
from torch import Tensor, nn
from torchmetrics import MeanMetric

from chargpt.checkpoints import NETWORK_SETTINGS, OURS, WEIGHT_SETTINGS, check_optimizer_state
from chargpt.data import CharDataModule
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.model.config import FRACTION, check
from chargpt.text_generator import load
from chargpt.training.optimizers import OPTIMIZERS, POLAR_EXPRESS, SCHEDULES
from chargpt.vocabulary import Vocabulary


@dataclass(frozen=True)
class TrainingConfig(GPTConfig):
    """The settings of a GPTModule: those of its network, and how it is trained."""

    optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"  # type: ignore[valid-type]
    """adamw: AdamW for all weights; muon: Muon for the blocks' matrices, AdamW for the others."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    beta1: float = 0.9
    """AdamW's decay rate for the running mean of gradients."""
    beta2: float = 0.999
    """AdamW's decay rate for the running mean of squared gradients."""
    eps: float = 1e-8
    """AdamW's epsilon; a larger one shrinks updates with small gradients, as for rare n-grams."""
    weight_decay: float = 0.01
    """AdamW's weight decay, applied to embeddings and matrices, never to biases or gains."""
    muon_lr: float | None = None
    """Peak learning rate of Muon; required with optimizer muon."""
    muon_weight_decay: float = 0.0
    """Muon's weight decay."""
    muon_momentum: float = 0.95
    """Muon's decay rate for the running mean of gradients."""
    muon_iterations: int = 4
    """Newton-Schulz iterations per Muon step, 1 to 5."""
    warmup_steps: int = 0
    """Learning rate warm-up: steps over which it rises from zero."""
    schedule: Literal[tuple(SCHEDULES)] = "constant"  # type: ignore[valid-type]
    """Learning rate schedule; cosine and linear fall to min_lr_ratio of the peak."""
    min_lr_ratio: float = 0.0
    """Final learning rate, as a fraction of the peak."""
    short_contexts: dict[int, float] | None = None
    """Sequence length warm-up, {context length: fraction of the run at which its use ends}."""
    second_target: float = 0.0
    """Weight of an auxiliary loss for predicting the character after the next (multi-token
    prediction); it falls to 0 halfway through the run."""
    compile: bool = False
    """Compile the network (torch.compile): a minute at the start, then faster steps on a GPU."""
    seed: int = 1337
    """Seed of the weights and of dropout; the command line sets it from seed_everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative = "eps warmup_steps weight_decay muon_weight_decay min_lr_ratio second_target"
        check(self, "lr muon_lr", "positive", lambda rate: 0 < rate < math.inf)
        check(self, "beta1 beta2 muon_momentum", *FRACTION)
        check(self, not_negative, "at least 0", lambda value: 0 <= value < math.inf)
        most = len(POLAR_EXPRESS)
        check(self, "muon_iterations", f"1 to {most}", lambda n: 1 <= n <= most)
        if self.optimizer == "muon" and self.muon_lr is None:
            raise UserError("optimizer muon requires muon_lr, such as 0.02")
        if self.optimizer == "adamw" and self.muon_lr is not None:
            raise UserError("optimizer adamw takes no muon_lr; set muon_lr to null")
        for length, until in (self.short_contexts or {}).items():
            if length < 1 or self.block_size % length or not 0 < until <= 1:
                rule = f"lengths must divide block_size {self.block_size}; fractions are in (0, 1]"
                raise UserError(f"short_contexts has {length}: {until}; {rule}")


class GPTModule(LightningModule):
    """A GPT that learns to predict the next character, configured by `TrainingConfig` fields."""

    gpt: GPT  # this and the next two are set by `build`, when the vocabulary is known
    second_head: nn.Linear | None
    vocabulary: Vocabulary

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.config = TrainingConfig(**settings)
        self.save_hyperparameters(asdict(self.config))
        # One NaN makes the mean NaN: a loss that is not a number must not be silently dropped.
        self.mean_loss = MeanMetric(nan_strategy=math.nan)
        self.progress = 1.0  # fraction of the run completed; set by each training batch
        self.initial: tuple[GPT, Vocabulary] | None = None  # what the network starts with

    @classmethod
    def init_from(cls, path: str | Path | None = None, **settings: Any) -> "GPTModule":
        """A module that starts with the weights of a checkpoint, for a new run on any text.

        `path` is a file, or "best" (the default) or "last" for that checkpoint of the newest run.
        `settings` are training settings and dropout rates, by default those of `TrainingConfig`;
        the other settings of the network come from the checkpoint. Characters that only the new
        text has are appended to the vocabulary.
        """
        start = load(path)
        network = {name: getattr(start.gpt.config, name) for name in WEIGHT_SETTINGS}
        module = cls(**settings, **network)
        module.initial = start.gpt, start.vocabulary
        return module

    def build(self, vocabulary: Vocabulary) -> None:
        """Create the network: random weights by the seed, then those of `initial`, if given."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            network = {name: getattr(self.config, name) for name in NETWORK_SETTINGS}
            self.gpt = GPT(GPTConfig(**network), len(vocabulary))
            if self.initial:  # the rows of additional characters keep their initial values
                weights = self.gpt.state_dict()
                for name, weight in self.initial[0].state_dict().items():
                    weights[name][tuple(map(slice, weight.shape))] = weight
            self.second_head = None
            if self.config.second_target:  # used in training only, so it is not part of the GPT
                self.second_head = nn.Linear(self.config.n_embd, len(vocabulary), bias=False)
                nn.init.zeros_(self.second_head.weight)
        self.vocabulary = vocabulary
        hidden_states = GPT.hidden_states  # a function, so that no module is registered twice
        self.hidden_states = torch.compile(hidden_states) if self.config.compile else hidden_states

    @property
    def context(self) -> int:
        """The context length that the run currently trains on."""
        for length, until in sorted((self.config.short_contexts or {}).items()):
            if self.progress < until:
                return length
        return self.config.block_size

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next character at every position, (B, T) -> (B, T, V)."""
        return self.gpt(ids)

    def configure_model(self) -> None:
        try:
            trainer = self.trainer
        except RuntimeError:  # in load_from_checkpoint, where on_load_checkpoint builds
            return
        check_trainer(trainer, self.config)
        if not hasattr(self, "gpt"):
            known = self.initial[1] if self.initial else Vocabulary("")
            self.build(known.extended(datamodule_of(trainer).corpus.vocabulary))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # All ranks check, so that all stop; earlier checkpoints are kept.
        if not all(p.isfinite().all() for p in self.gpt.parameters()):
            raise diverged("a weight", "not finite", self.global_step)
        checkpoint["vocabulary"] = self.vocabulary.characters
        checkpoint.setdefault("chargpt", {}).update(OURS, context=self.context)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_model(checkpoint["hyper_parameters"], self.config)
        vocabulary = Vocabulary(checkpoint["vocabulary"])
        if not hasattr(self, "gpt") or vocabulary != self.vocabulary:
            self.build(vocabulary)

    def loss(self, hidden: Tensor, targets: Tensor, head: nn.Module | None = None) -> Tensor:
        """Mean cross-entropy in nats per character, from hidden states (B, T, C)."""
        logits = (head or self.gpt.head)(hidden)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def second_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Weighted cross-entropy of the character after the next (Gloeckle et al. 2024)."""
        assert self.second_head is not None
        weight = self.config.second_target * max(0.0, 1 - 2 * self.progress)
        if weight == 0:  # but DistributedDataParallel waits for the gradients of all weights
            return 0.0 * self.second_head.weight.sum()
        # The second target of position t is the target of t + 1; the last position has none.
        return weight * self.loss(hidden[:, :-1], targets[:, 1:], self.second_head)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Update `progress`: in steps or in time, whichever is closer to its limit."""
        trainer = self.trainer
        progress = self.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
        timers = callbacks_of(trainer, callbacks.Timer)
        for timer in timers:
            if (remaining := timer.time_remaining()) is not None:
                elapsed = timer.time_elapsed()
                progress = max(progress, elapsed / (elapsed + max(remaining, 0.0)))
        if timers and trainer.world_size > 1:  # with different clocks
            agreed = torch.tensor(progress, device=self.device)
            progress = float(trainer.strategy.reduce(agreed, reduce_op="max"))
        self.progress = min(1.0, progress)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch, context = batch.long(), self.context  # (B, T + 1), narrow integers until here
        # A sequence of T characters becomes T / context shorter ones.
        ids, targets = batch[:, :-1].reshape(-1, context), batch[:, 1:].reshape(-1, context)
        self.seed_dropout(batch_idx)
        hidden = self.hidden_states(self.gpt, ids)
        loss = self.loss(hidden, targets)
        if self.logs_this_step:  # the mean over ranks, so that all raise together
            copy = loss.detach().clone()  # it is reduced in place
            mean = self.trainer.strategy.reduce(copy, reduce_op="mean")
            if not math.isfinite(mean.item()):
                raise diverged("training loss", mean.item(), self.global_step + 1)
            self.log("train_loss", mean, prog_bar=True)
        return loss if self.second_head is None else loss + self.second_loss(hidden, targets)

    def seed_dropout(self, batch_idx: int) -> None:
        """Make the masks a function of (seed, micro-batch, rank): resuming needs no saved state."""
        # Not batch_idx itself, which restarts where limit_train_batches ends an epoch.
        accumulate = self.trainer.accumulate_grad_batches
        micro_batch = self.global_step * accumulate + batch_idx % accumulate
        sequence = np.random.SeedSequence((self.config.seed, micro_batch, self.global_rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    @property
    def logs_this_step(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 if barebones
        return every > 0 and (self.global_step == 0 or (self.global_step + 1) % every == 0)

    def on_validation_epoch_start(self) -> None:
        # In float64, whatever the network computes in, except on MPS, which lacks it.
        self.mean_loss.set_dtype(torch.float32 if self.device.type == "mps" else torch.float64)
        self.mean_loss.reset()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if len(batch) == 0:  # a rank with no sequence left
            return
        batch = batch.long()
        T = batch.size(1) - 1
        # A run that trains on short contexts has not learned to use longer ones yet.
        context = min(T, self.context) if self.trainer.state.fn == "fit" else T
        size = T // context * context  # the last sequence of a split may leave a remainder
        for ids, targets in zip(batch[:, :-1].split(size, 1), batch[:, 1:].split(size, 1)):
            length = min(context, ids.size(1))
            ids, targets = ids.reshape(-1, length), targets.reshape(-1, length)
            loss = self.loss(self.hidden_states(self.gpt, ids), targets)
            self.mean_loss.update(loss, targets.numel())

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over all characters of the split, in nats and in bits (bpc)."""
        split = "test" if self.trainer.testing else "val"
        loss = self.mean_loss.compute()  # of all ranks together
        if not torch.isfinite(loss):
            raise diverged(f"{split}_loss", loss.item(), self.global_step)
        self.log_dict({f"{split}_loss": loss, f"{split}_bpc": loss / math.log(2)})
        characters = self.mean_loss.weight.clone()  # reduced in place
        self.scored = int(self.trainer.strategy.reduce(characters, reduce_op="sum"))

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        """The optimizer; a subclass may return any that Lightning accepts, with its schedulers."""
        # With mixed precision, Lightning refuses to clip gradients if the optimizer is fused.
        clips_mixed = self.trainer.gradient_clip_val and "mixed" in str(self.trainer.precision)
        fused = self.device.type in ("cpu", "cuda") and not clips_mixed
        optimizer = OPTIMIZERS[self.config.optimizer](self, self.gpt.blocks, self.config, fused)
        optimizer.register_load_state_dict_pre_hook(keep_settings)
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        config, step, total = self.config, self.global_step, self.trainer.max_steps
        decay = SCHEDULES[config.schedule](step, self.progress, total if total > 0 else None)
        warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
        factor = warmup * (config.min_lr_ratio + (1 - config.min_lr_ratio) * decay)
        for group in optimizer.param_groups:
            # A subclass's optimizer may have no peak rate, or a scheduler of its own.
            if "initial_lr" in group and not self.trainer.lr_scheduler_configs:
                group["lr"] = group["initial_lr"] * factor
        if self.logs_this_step:
            self.log("lr", optimizer.param_groups[0]["lr"])


def keep_settings(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state to load: checked, and with the settings that the optimizer has now."""
    own = optimizer.param_groups
    check_optimizer_state(saved, [group["params"] for group in own])
    groups = [group | {"params": old["params"]} for group, old in zip(own, saved["param_groups"])]
    return saved | {"param_groups": groups}


def check_trainer(trainer: Trainer, config: TrainingConfig) -> None:
    """Refuse a Trainer that would never end, never validate, or not do what it was asked to."""
    if (data := datamodule_of(trainer)) is None:
        raise UserError("a GPTModule needs a CharDataModule: pass it as `datamodule`")
    if config.block_size != (size := data.hparams["block_size"]):
        raise UserError(f"block_size is {config.block_size} in the GPTModule, but {size} in data")
    if trainer.state.fn != "fit":
        return
    if callbacks_of(trainer, callbacks.StochasticWeightAveraging):
        raise UserError("StochasticWeightAveraging needs epochs; use EMAWeightAveraging")
    if callbacks_of(trainer, callbacks.GradientAccumulationScheduler):
        raise UserError("GradientAccumulationScheduler needs epochs; set accumulate_grad_batches")
    if type(trainer.limit_train_batches) is not int:  # the training data is endless
        if trainer.max_epochs not in (None, -1):
            raise UserError(
                "training data is endless: set max_steps without max_epochs, or limit_train_batches"
            )
        if trainer.enable_validation and type(trainer.val_check_interval) is not int:
            raise UserError("training data is endless: val_check_interval must be a whole number")
    scheduled = config.schedule != "constant" or config.short_contexts or config.second_target
    if scheduled and trainer.max_steps == -1 and not callbacks_of(trainer, callbacks.Timer):
        raise UserError("schedule, short_contexts and second_target need max_steps or max_time")


def check_same_model(saved: dict[str, Any], config: TrainingConfig) -> None:
    """Refuse a checkpoint of a different network or optimizer, even if its weights would fit."""
    for name in (*WEIGHT_SETTINGS, "optimizer", "second_target"):
        before, now = saved.get(name), getattr(config, name)
        longer = name == "block_size" and config.position == "rotary"  # no weight depends on it
        has_head = name == "second_target" and before and now
        if name in saved and before != now and not (longer or has_head):
            raise UserError(
                f"{name} is {before} in the checkpoint and cannot be changed to {now}: the network "
                "or its optimizer would be a different one\ntrain a new model to change it"
            )


def callbacks_of(trainer: Trainer, kind: type) -> list[Any]:
    return [c for c in trainer.callbacks if isinstance(c, kind)]  # type: ignore[attr-defined]


def datamodule_of(trainer: Trainer) -> CharDataModule:
    return trainer.datamodule  # type: ignore[attr-defined]


def diverged(what: str, value: float | str, step: int) -> UserError:
    return UserError(
        f"{what} is {value} at step {step}: training has diverged\nearlier checkpoints are kept; "
        "try a lower --model.lr, warm-up, or --trainer.gradient_clip_val 1"
    )
