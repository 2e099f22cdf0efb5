"""The training itself: one step, the loop around it, and what is saved of it.

All randomness of a step follows from the seed and the number of the step, so a run that is killed
at any step and resumed takes the same steps as one that is not; on a CPU, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import checkpoint
import networks
import ranks
import torch
from data import Images, shuffled_batches
from devices import precision_of, workers
from evaluation import OnlineProbe
from lightning_fabric import Fabric
from networks import Network
from objectives import Objective
from rich.progress import Progress, TaskID
from settings import Settings, SettingsError
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from vicreg_losses import diagnostics, distributed

SEED_STRIDE = 1_000_003  # keeps the generators of different seeds apart
LOOKED_AT = 512  # embeddings whose rank and std are logged
OPTIMIZERS = {"lars": "lars", "sgd": "momentum", "adamw": "adamw"}  # timm's "sgd" is Nesterov's
ADVICE = ": a lower --lr, a longer --warmup-epochs or --clip 1 may help"
Batch = tuple[Tensor, Tensor]


class TrainingError(Exception):
    """The training cannot go on; the message is one line."""


@dataclass
class Run:
    """All that a training has, and in ``state`` all that it changes. It is the same on all ranks.

    Attributes:
        network: What is trained.
        model: What to call to train it: ``network`` over all ranks, compiled if asked.
        teacher: The averaged network, or None.
        step: Optimiser steps done.
        seconds: Spent on them, over all sittings.
        history: What was logged.
        evaluations: What was found between epochs, on rank 0.
    """

    settings: Settings
    images: Images
    fabric: Fabric
    network: Network
    model: torch.nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    probe: OnlineProbe
    teacher: ModelEmaV3 | None
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    PLAIN = ("step", "seconds", "history", "evaluations")

    def __post_init__(self) -> None:
        self.out = Path(self.settings.out)
        self.batch = batch_size(self.images, self.settings)
        self.per_epoch = len(self.images.train) // self.batch // self.settings.accumulate
        self.total = self.per_epoch * self.settings.epochs

    @property
    def evaluated(self) -> Network:
        """The network that is judged and exported: the average, except where it is a target."""
        averaged = self.teacher is not None and self.settings.loss != "byol"
        return self.teacher.module if averaged else self.network

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "network": self.network,
            "objective": self.objective,
            "optimizer": self.optimizer,
            "probe": self.probe,
            "precision": precision_of(self.fabric),
        }
        return parts if self.teacher is None else parts | {"teacher": self.teacher}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        saved = {name: part.state_dict() for name, part in self._stateful().items()}
        saved |= {name: getattr(self, name) for name in self.PLAIN}
        return saved | {"settings": asdict(self.settings)}

    def restore(self, saved: Mapping[str, Any], path: object) -> None:
        """Continue where ``saved`` was."""
        checkpoint.restore(path, saved, self._stateful())
        for name in self.PLAIN:
            setattr(self, name, saved[name])
        if self.step > self.total:
            done = self.step / self.per_epoch
            raise SettingsError(f"--epochs: expected the {done:g} already done or more, of {path}")

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            TrainingError: The weights are not finite, on any rank, as gradients are averaged.
        """
        values = [
            value for value in self.network.state_dict().values() if value.is_floating_point()
        ]
        if not torch.stack([value.isfinite().all() for value in values]).all():
            raise TrainingError(f"the weights of step {self.step} are not finite{ADVICE}")
        if ranks.rank() == 0:
            checkpoint.write(self.out / checkpoint.NAME, self.state())


def new_run(settings: Settings, images: Images, fabric: Fabric) -> Run:
    """Everything at step 0, with weights that the seed alone decides."""
    network = networks.build(settings)
    ranks.synchronise_batch_norm(network, fabric.device)
    network = network.to(fabric.device)
    scale = batch_size(images, settings) * settings.accumulate / 256
    optimizer = create_optimizer_v2(
        network,
        OPTIMIZERS[settings.optimizer],
        lr=settings.lr * scale,
        weight_decay=settings.weight_decay,
        filter_bias_and_bn=True,  # LARS then takes plain steps for them, as in its papers
    )
    teacher = ModelEmaV3(network, settings.ema) if settings.ema else None
    objective = Objective(settings).to(fabric.device)
    callable_ = torch.compile(network) if settings.compile else network
    model, optimizer = fabric.setup(callable_, optimizer)
    per_epoch = len(images.train) // batch_size(images, settings) // settings.accumulate
    probe = OnlineProbe(fabric, network.width, len(images.classes))
    return Run(
        settings, images, fabric, network, model, objective, optimizer,
        new_schedule(settings, optimizer, per_epoch), probe, teacher,
    )  # fmt: skip


def new_schedule(
    settings: Settings, optimizer: torch.optim.Optimizer, per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up from 0, then a cosine to a thousandth."""
    warmup = round(settings.warmup_epochs * per_epoch)
    peak = max(group["lr"] for group in optimizer.param_groups)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, settings.epochs * per_epoch - warmup),
        lr_min=peak / 1000,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def batch_size(images: Images, settings: Settings) -> int:
    """Images in one pass through the network, on all ranks together."""
    batch = min(settings.batch_size, len(images.train))
    if len(images.train) < batch * settings.accumulate:
        raise SettingsError(
            f"--accumulate: expected no more than the {len(images.train)} images for training, "
            f"got {settings.accumulate} times {batch}"
        )
    return batch


def train_step(run: Run, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Take one optimiser step on ``batches``; give back the last one's loss, terms, embeddings."""
    settings, last = run.settings, run.settings.accumulate - 1
    run.schedule.step_update(run.step + 1)
    for index, (pixels, labels) in enumerate(batches):
        pixels = pixels.to(run.fabric.device, non_blocking=True)
        labels = labels.to(run.fabric.device, non_blocking=True)
        generator = seeded(run, run.step * settings.accumulate + index)
        views = run.images.views(pixels, generator, settings.global_views, settings.local_views)
        with run.fabric.no_backward_sync(run.model, enabled=index < last):
            outputs = run.model(views)
            targets = targets_of(run, outputs, views)
            loss, terms = run.objective(outputs, targets)
            run.fabric.backward(loss / settings.accumulate)
        run.probe.step(outputs.features, labels)
    if settings.clip:
        largest = {"max_norm": settings.clip, "error_if_nonfinite": False}
        run.fabric.clip_gradients(run.model, run.optimizer, **largest)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.teacher:
        run.teacher.decay = ema_decay(run)
        run.teacher.update(run.network)
    return {"loss": loss.detach(), **terms, "embeddings": outputs.embeddings[0].detach()}


def seeded(run: Run, batch: int) -> torch.Generator:
    """The generator of a batch's views; the global one, for layers that drop, is set by it too."""
    seed = run.settings.seed * SEED_STRIDE + batch
    torch.manual_seed(seed)
    return torch.Generator(run.fabric.device).manual_seed(seed)


@torch.no_grad()
def targets_of(run: Run, outputs: networks.Outputs, views: list[Tensor]) -> tuple[Tensor, ...]:
    """Embeddings of the global views, without gradient: the teacher's for BYOL, else its own."""
    count = run.settings.global_views
    if run.settings.loss == "byol" and run.teacher:
        with run.fabric.autocast():
            embeddings = run.teacher.module.train()(views[:count]).embeddings
        return tuple(z.float() for z in embeddings)
    return tuple(z.detach() for z in outputs.embeddings[:count])


def ema_decay(run: Run) -> float:
    """From ``ema`` to 1 along a cosine: BYOL, arXiv:2006.07733, section 3.3."""
    done = run.step / max(1, run.total)
    return 1 - (1 - run.settings.ema) * (math.cos(math.pi * done) + 1) / 2


def train(run: Run, bar: Progress, task: TaskID, after_epoch: Callable[[int], bool]) -> int:
    """Train from ``run.step`` to the last, saving after each epoch and upon Ctrl-C and SIGTERM.

    Returns:
        0, or the number of the signal that came; the checkpoint then holds the last whole step.

    Raises:
        TrainingError: The loss is not finite.
        DataError: More than 1 % of the images cannot be read.
    """
    settings = run.settings
    log_every = settings.log_every or max(1, run.total // 64)
    with deferred_signals() as asked:
        while run.step < run.total:
            epoch, first = divmod(run.step, run.per_epoch)
            run.model.train()
            started = time.perf_counter()
            for batches in epoch_batches(run, epoch, first):
                logged = train_step(run, batches)
                run.step += 1
                run.seconds += time.perf_counter() - started
                if run.step % log_every == 0 or run.step in (1, run.total):
                    record(run, logged)
                stop, unreadable = ranks.largest(asked(), run.images.unreadable.count())
                run.images.unreadable.check(unreadable)
                loss = f"{run.history[-1]['loss']:.4g}" if run.history else ""
                bar.update(task, completed=run.step, loss=loss)
                if stop or (settings.save_every and run.step % settings.save_every == 0):
                    run.save()
                if stop:
                    return stop
                started = time.perf_counter()  # neither records nor checkpoints count
            ranks.merge(run.images.unreadable.found)  # each rank has read other images
            run.images.unreadable.check()
            run.save()
            if after_epoch(epoch + 1):
                run.save()
    return 0


def epoch_batches(run: Run, epoch: int, first: int) -> Iterator[list[Batch]]:
    """This rank's batches of each step of an epoch, from step ``first`` on."""
    settings, passes = run.settings, run.settings.accumulate
    batches = iter(
        shuffled_batches(
            run.images.train,
            run.batch,
            settings.seed * SEED_STRIDE + epoch,
            first * passes,
            workers(settings, run.images),
            ranks.part(run.batch),
        )
    )
    for _ in range(first, run.per_epoch):
        yield list(islice(batches, passes))


def record(run: Run, logged: Mapping[str, Tensor]) -> None:
    """Add one point to every curve, of the batch of all ranks.

    Raises:
        TrainingError: The loss is not finite.
    """
    scalars = {key: value for key, value in logged.items() if key != "embeddings"}
    stacked = torch.stack([value.float() for value in scalars.values()])
    means = run.fabric.all_reduce(stacked, reduce_op="mean")
    point = dict(zip(scalars, means.tolist(), strict=True))
    report = diagnostics.embedding_report(distributed.all_gather(logged["embeddings"])[:LOOKED_AT])
    point |= {"smallest_std": report.std_min, "effective_rank": report.effective_rank}
    point |= {"probe_accuracy": run.probe.top1(), "lr": run.optimizer.param_groups[0]["lr"]}
    run.fabric.log_dict(point, run.step)
    if not math.isfinite(point["loss"]):
        raise TrainingError(f"the loss of step {run.step} is {point['loss']}{ADVICE}")
    run.history.append({"epoch": run.step / run.per_epoch, **point})


@contextlib.contextmanager
def deferred_signals() -> Iterator[Callable[[], int]]:
    """Make Ctrl-C and SIGTERM a number to read between two steps; a second Ctrl-C stops at once."""
    came = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
