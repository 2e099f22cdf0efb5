"""The embeddings' report in Lightning: one line in the Trainer, ``callbacks=[...]``.

Importing this needs ``lightning`` or ``pytorch-lightning``; the callback serves the Trainers of
both.
"""

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .diagnostics import EmbeddingMonitor

__all__ = ["EmbeddingMonitorCallback"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_MOST_NAMES = 20


def _base() -> Any:
    """A callback of each package that is installed, as their Trainers ask for their own."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):
                raise
    if not found:
        raise ImportError(
            "vicreg_losses.lightning: expected the package lightning or pytorch-lightning, got "
            "neither; pip install lightning, or use vicreg_losses.diagnostics.EmbeddingMonitor."
        )
    return type("Callback", tuple(found), {})


class EmbeddingMonitorCallback(_base()):  # type: ignore[misc]
    """Watch what a submodule returns in training, log its report, and warn of collapse in words.

    A forward hook on the submodule copies its results of a training batch; at the end of the batch
    an :class:`EmbeddingMonitor` is given them as views. Views of another shape than the batch's
    first are left out: with multi-crop the small crops, if a call takes all crops of a size
    together. If each crop is a call of its own, all of them count.

    Every ``every`` batches all scalars of :meth:`EmbeddingReport.as_dict` go to the Trainer's
    loggers as ``"{prefix}/..."``, whatever ``log_every_n_steps`` is. The logged step is
    ``trainer.global_step``, which counts the steps of all optimizers; Lightning's own rows count
    batches that stepped, and may be one off. In one process they also go to
    ``trainer.callback_metrics``, for ``EarlyStopping``, checkpoints and schedulers; over several
    they do not, as each rank would decide by its own. Rank zero warns of each kind of problem once
    in a run.

    The hook is there during ``fit`` alone, and in what is compiled in it, submodules or whole
    steps. A function that was compiled and run before, around the submodule, does not have it: the
    callback warns of a submodule that the first training step did not call. Steps and warnings
    resume from a checkpoint. Over ranks each one watches its own samples, and the loggers have
    those of rank zero.

    Args:
        module: the submodule's name in the LightningModule, such as ``"projector"`` or
            ``"heads.0"``. It must return embeddings, (N, D), or (V, N, D) for V views.
        every: batches from one report to the next.
        samples: rows of the report; see :class:`EmbeddingMonitor`.
        prefix: of the logged names.

    Raises:
        ValueError: where ``fit`` begins, if there is no such submodule; lists those there are.
        TypeError: where the submodule returns something else.
    """

    def __init__(
        self, module: str, every: int = 50, samples: int = 512, prefix: str = "embeddings"
    ) -> None:
        super().__init__()
        self.module, self.prefix = module, prefix
        self.monitor = EmbeddingMonitor(every, samples)
        self._told: set[str] = set()
        self._seen: list[Tensor] | None = None  # None outside of a training batch
        self._handle: Any = None

    @property
    def state_key(self) -> str:
        """A key of its own for the callback of each submodule."""
        return f"EmbeddingMonitorCallback({self.module!r}, {self.prefix!r})"

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state, and which problems were warned of."""
        return {"monitor": self.monitor.state_dict(), "told": sorted(self._told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict["monitor"])
        self._told = set(state_dict["told"])

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._remove()
        self._handle = _submodule(pl_module, self.module).register_forward_hook(self._hook)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._seen = []

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        seen, self._seen = self._seen, None
        if not seen:
            self._warn(trainer, "not called", "the training step did not call it")
            return
        views = [view for z in seen for view in (z.unbind() if z.dim() == 3 else [z])]
        scalars = self.monitor.update([z for z in views if z.shape == views[0].shape])
        if scalars is None or self.monitor.report is None:
            return
        named = {f"{self.prefix}/{name}": value for name, value in scalars.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)
        if trainer.world_size == 1:
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in named.items()})
        report = self.monitor.report
        for kind, words in zip(report.problem_kinds, report.problems, strict=True):
            self._warn(trainer, kind, words)

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        self._remove()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._remove()

    def _hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._seen is None:
            return
        if not isinstance(output, Tensor):
            raise TypeError(
                f"module {self.module!r}: expected its forward to return a tensor of embeddings, "
                f"got {type(output).__name__}."
            )
        # What follows may write in place, as nn.ReLU(inplace=True).
        self._seen.append(output.detach().clone())

    def _warn(self, trainer: Any, kind: str, words: str) -> None:
        if kind in self._told:
            return
        self._told.add(kind)
        if trainer.is_global_zero:
            where = f"{self.prefix} of {self.module!r} at step {trainer.global_step}"
            warnings.warn(f"{where}: {words}", UserWarning, stacklevel=2)

    def _remove(self) -> None:
        self._seen = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _submodule(model: nn.Module, name: str) -> nn.Module:
    found = dict(model.named_modules())
    if name and name in found:
        return found[name]
    names = sorted(filter(None, found), key=lambda other: other.count("."))
    listed = ", ".join(map(repr, names[:_MOST_NAMES]))
    more = f" and {len(names) - _MOST_NAMES} more below them" if len(names) > _MOST_NAMES else ""
    raise ValueError(f"module: expected one of {listed}{more}, got {name!r}.")
