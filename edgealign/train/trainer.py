"""The trainer: `transformers.Trainer` with our loss, our batches and exact resumption.

One item of its data set is one optimizer step: which examples, cut into forward passes by a token budget. So
accumulation is a loop in `training_step`, every pass is divided by the weight of the whole step (tokens for SFT,
pairs for preferences), and a resumed run skips whole steps. The order depends on the seed alone.

    passes = Passes.for_training(model, precision, lora=False)
    history = fit(model, task, recipe, passes=passes, work=work)   # model is trained in place

`fit` is what `sft.run` and `preference.run` call, and can be called on its own with any `Task`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from edgealign.errors import CheckFailed
from edgealign.progress import bar, is_first_process, quiet_transformers
from edgealign.train import processes, sharding
from edgealign.train.checkpoints import CheckpointCallback, newest_complete, read_state
from edgealign.train.coupled import look
from edgealign.train.history import HistoryCallback, history_steps
from edgealign.train.lanes import Gradients, Lanes, Turn, add, draws_chance
from edgealign.train.layout import Batch
from edgealign.train.log import LogCallback, step_rows
from edgealign.train.logprobs import compiled, is_sharded
from edgealign.train.optimizers import build_optimizer
from edgealign.train.recipes import TrainRecipe
from edgealign.train.schedule import Order, Step, learning_rate_share, plan_steps
from edgealign.train.scoring import Passes, evaluate
from edgealign.train.speed import Speed, wants_compiling
from edgealign.train.tasks import Attaches, Draws, Remembers, Task, coupled


@dataclass(frozen=True)
class Fit:
    """What came of a run. `rows`: the log, one per optimizer step, those before a resume included."""

    rows: tuple[dict[str, Any], ...]
    n_steps: int
    resumed_at: int
    log: LogCallback


def fit(
    model: nn.Module,
    task: Task,
    recipe: TrainRecipe,
    *,
    passes: Passes,
    work: Path,
    held_out: Task | None = None,
    order: Order | None = None,
) -> Fit:
    """Train `model` in place on all steps of `plan_steps`, from the newest whole checkpoint below `work` if any.

    The caller has fixed the number of threads (`precision.fixed_threads`). `held_out` is evaluated on the way where
    the recipe asks for it (`pretrain`). `order`: see `plan_steps`. Several processes may share the weights out
    (`sharding`); `model` is whole again afterwards, in every process.

    Raises:
        CheckFailed: the loss stopped being a number.
        UsageError: weights are to be sharded, and the recipe does not allow it.
    """
    shard = sharding.wanted(recipe)
    steps = plan_steps(task, recipe, passes, order)
    compiling = not shard and wants_compiling(recipe, task, len(steps))
    if passes.lanes > 1:
        alone = replace(passes, lanes=1)
        whole = plan_steps(task, recipe, alone, order)
        on_gpu = processes.device().type != "cpu"
        looked_at = coupled(task) is not None and all(len(step) == 1 for step in whole)  # cut, it is read twice
        if on_gpu or shard or compiling or looked_at or recipe.gradient_checkpointing or draws_chance(model):
            passes, steps = alone, whole
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)  # the trainer turns it off for good
    checkpoint = newest_complete(work)
    with bar(total=len(steps), label="training") as advance, sharding.sharded(model, shard) as trained:
        log = LogCallback(work, advance)
        state = task.state if isinstance(task, Remembers) else None
        if isinstance(task, Remembers):
            task.begin(read_state(checkpoint) if checkpoint is not None else {})
        saver = CheckpointCallback(
            work, every_s=recipe.save_every_s, every_steps=recipe.save_every_steps, state=state
        )
        callbacks: list[Any] = [log, saver] if is_first_process() else [saver]
        if held_out is not None and (every := history_steps(recipe)):
            held = held_out
            history = HistoryCallback(work, every, lambda: evaluate(trained, held, passes, label="", shared=True))
            callbacks.insert(0, history)
        try:
            with passes.side_by_side(trained) as lanes, compiled(trained, compiling), quiet_transformers():
                arguments = _arguments(recipe, work)
                trainer = AlignTrainer(trained, task, steps, passes, recipe, arguments, callbacks, lanes)
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            log.close()
            if use_cache is not None:
                config.use_cache = use_cache
    model.eval()
    resumed_at = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    return Fit(tuple(step_rows(trainer.state.log_history)), len(steps), resumed_at, log)


class AlignTrainer(Trainer):  # type: ignore[misc]
    """`Trainer` whose items are optimizer steps and whose loss is a task's."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        steps: Sequence[Step],
        passes: Passes,
        recipe: TrainRecipe,
        args: TrainingArguments,
        callbacks: Sequence[Any] = (),
        lanes: Lanes | None = None,
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=_Steps(steps), data_collator=_only_item, callbacks=list(callbacks)
        )
        self.remove_callback(PrinterCallback)
        self.task, self.passes, self.recipe = task, passes, recipe
        self.speed = Speed.of(model, passes, task)
        self.sharded = is_sharded(model)
        self.lanes = lanes or Lanes(1, passes.tokens_per_pass)
        self._sums: Counter[str] = Counter()
        self._weight = 0
        self._tokens = 0
        self._since_s = time.monotonic()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's schedule; unlike transformers' own it never spends a step at a learning rate of zero."""
        self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: learning_rate_share(step, num_training_steps, self.recipe)
        )
        return self.lr_scheduler

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW as transformers builds it, or Muon."""
        if self.recipe.optimizer == "adamw":
            return super().create_optimizer()
        self.optimizer: Any = build_optimizer(
            self.model, lr=self.recipe.peak_learning_rate, weight_decay=self.recipe.weight_decay,
            betas=(0.9, self.recipe.adam_beta2),
        )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights of a checkpoint; those of a sharded model are gathered by all processes."""
        if self.sharded:
            state_dict = sharding.whole_weights(self.model)
        if is_first_process():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.save_optimizer(self.optimizer, Path(output_dir) / OPTIMIZER_NAME)
        if is_first_process():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharding.load_optimizer(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def get_train_dataloader(self) -> Any:
        """All steps, in order, for every process: a step is shared out by its passes and not by its examples."""
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=1, collate_fn=_only_item)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of every pass of one optimizer step."""
        model.train()
        core = self.accelerator.unwrap_model(model)
        groups = self._drawn(core, inputs["groups"])
        self._weight = sum(self.task.weight(i) for group in groups for i in group)
        total = self._learn(core, groups)
        if self.sharded:  # FSDP has summed the gradients
            for _ in range(processes.idle(groups)):
                _, logps = self._forward(core, groups[-1])
                self.lanes.carry_back(core, logps, torch.zeros_like(logps))
            processes.add(total)
        else:
            processes.add_gradients(model, total)
        if not math.isfinite(float(total)):
            raise CheckFailed(
                f"loss {float(total)}", f"stopped being a number at step {self.state.global_step + 1}",
                "try a lower --learning-rate, or --precision float32",
            )
        if isinstance(self.task, Remembers):
            self.task.end_step()
        return total

    def _drawn(self, model: nn.Module, groups: Step) -> Step:
        """The passes of a step, cut anew where the task has the model answer first."""
        if not isinstance(self.task, Draws) or not self.task.draws:
            return groups
        indices = [i for group in groups for i in group]
        self.task.draw(model, indices, self.state.global_step)
        return self.passes.groups(self.task.trees, indices, parts=processes.count())

    def _learn(self, model: nn.Module, groups: Step) -> Tensor:
        """This process's passes of a step, forward and backward; () the mean loss, or this process's share in it."""
        together = coupled(self.task) if len(groups) > 1 else None
        whole = look(model, together, self.passes, groups, self.lanes) if together else None

        def learn(number: int, turn: Turn) -> tuple[Tensor, Gradients]:
            batch, logps = self._forward(model, groups[number])
            with turn:
                self._tokens += batch.n_tokens
                if whole is not None:
                    loss, gradient = torch.zeros(()), whole.gradients[number]
                else:
                    loss, gradient = self._loss(logps, batch, groups[number])
            return loss, self.lanes.carry_back(model, logps, gradient.to(logps) / self._weight)

        total = torch.zeros((), device=self.args.device)
        numbers = processes.share(range(len(groups)))
        sizes = [self.passes.n_tokens(self.task.trees, groups[number]) for number in numbers]
        for _, (loss, gradients) in self.lanes.each(learn, numbers, sizes):
            total += loss / self._weight
            add(model, gradients)
            del gradients
        if whole is not None and is_first_process():
            total += whole.loss.to(total) / self._weight
            self._sums.update(whole.metrics)
        return total

    def _forward(self, model: nn.Module, group: list[int]) -> tuple[Batch, Tensor]:
        """A pass and its log-probabilities."""
        batch = self.passes.batch(self.task.trees, group, self.args.device)
        if isinstance(self.task, Attaches):
            batch = self.task.attach(batch, group)
        return batch, self.passes.logprobs(model, batch)

    def _loss(self, logps: Tensor, batch: Batch, group: list[int]) -> tuple[Tensor, Tensor]:
        """The summed loss of a pass, and its gradient by the log-probabilities."""
        leaf = logps.detach().requires_grad_()
        loss, metrics = self.task.loss(leaf, batch, group)
        self._sums.update(metrics)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the task's metrics, averaged over the step, and the speed."""
        if "loss" in logs:
            seconds = max(time.monotonic() - self._since_s, 1e-9)
            sums, tokens = processes.add_counts(self._sums, self._tokens)
            logs.update({name: value / max(self._weight, 1) for name, value in sums.items()})
            logs.update(tokens=float(tokens), tok_per_s=tokens / seconds)
            if self.speed.peak_flops:
                logs["peak_share"] = self.speed.share(tokens / seconds)
        self._sums.clear()
        self._tokens = 0
        super().log(logs, start_time)
        self._since_s = time.monotonic()  # what callbacks did (an evaluation, say) is not training time


class _Steps(torch.utils.data.Dataset[Step]):
    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]


def _only_item(items: list[Step]) -> dict[str, Step]:
    return {"groups": items[0]}


def _arguments(recipe: TrainRecipe, work: Path) -> TrainingArguments:
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work),
        num_train_epochs=1,  # all epochs are in the plan
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        train_sampling_strategy="sequential",
        learning_rate=recipe.peak_learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=0.9,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # CheckpointCallback decides
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=recipe.seed,
        bf16=False,  # Passes.precision runs the autocast: the backbone is called without the trainer's wrapper
    )
