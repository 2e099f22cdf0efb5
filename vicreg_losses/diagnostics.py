"""Is my loss healthy? Measures of collapse, of one batch of embeddings or of a running training.

Nothing here is differentiable, and results come back to the host. What each number means, from
where on it is called a problem, and why: ``docs/diagnostics.md``.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import _checks
from ._monitor import EmbeddingMonitor
from ._report import EmbeddingReport, effective_rank, embedding_report

__all__ = [
    "EmbeddingMonitor",
    "EmbeddingReport",
    "TermGradient",
    "effective_rank",
    "embedding_report",
    "term_gradients",
]


class TermGradient(NamedTuple):
    """A term of an objective, weighted: its value, and the length of its gradient."""

    value: float
    gradient_norm: float


class _Objective(Protocol):
    def modules(self) -> Iterable[nn.Module]: ...

    def train(self, mode: bool = True) -> Any: ...

    def terms(self, *views: Any) -> Any: ...

    def total(self, terms: Any) -> Tensor: ...


def term_gradients(
    objective: _Objective, *views: Tensor | Sequence[Tensor]
) -> dict[str, TermGradient]:
    """Which term is winning: each weighted term, and how hard it pulls at the embeddings.

    Values add up to the loss but do not say what moves the network: a term may be large and flat.
    ``|dL_t / dz|``, the Euclidean length over all samples and views, says how hard it pulls. One
    backward pass for each term, through the loss alone. Slices are those of the next step, which
    the module's counter does not notice.

    In a process group call it on all ranks alike: values are of the global batch, gradients of this
    rank's samples (times the number of ranks under ``reduction="mean"``).

    Args:
        objective: :class:`VICRegLoss`, :class:`VISRegLoss`, :class:`LeJEPALoss`, or a module with
            ``terms(*views)``, a named tuple of tensors, and ``total(terms)``, linear in them.
        *views: embeddings as the objective takes them.

    Returns:
        dict: :class:`TermGradient` of each term, by its name; of length 0 for a constant.

    Raises:
        TypeError, ValueError: for anything but embeddings.
    """
    given: Any = views[0] if len(views) == 1 else views
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_leaf(z) for z in _checks.embeddings(given, min_samples=0)]
        terms = _terms(objective, leaves)
        values = terms._make(term.detach().requires_grad_() for term in terms)
        weights = torch.autograd.grad(objective.total(values), values, materialize_grads=True)
        return {
            name: TermGradient(float(term.detach() * weight), _length(term, leaves, weight))
            for name, term, weight in zip(terms._fields, terms, weights, strict=True)
        }


def _terms(objective: _Objective, leaves: list[Tensor]) -> Any:
    """The terms in evaluation; each module is left in the mode that it was in."""
    modes = [(module, module.training) for module in objective.modules()]
    objective.train(False)
    try:
        return objective.terms(*leaves)
    finally:
        for module, mode in modes:
            module.training = mode


def _length(term: Tensor, leaves: list[Tensor], weight: Tensor) -> float:
    if not term.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(term, leaves, weight, retain_graph=True, materialize_grads=True)
    lengths = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
    return float(torch.linalg.vector_norm(lengths))


def _leaf(z: Tensor) -> Tensor:
    """A copy with a gradient of its own, which in 16 bits might be rounded to nothing."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    return z.detach().to(dtype, copy=True).requires_grad_()
