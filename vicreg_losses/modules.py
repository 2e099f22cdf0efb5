"""The terms as modules: what to add to a trainer's loss.

Each holds its options and is the function of its name in :mod:`vicreg_losses.functional`, which
documents the formula, the source and the conventions.
``forward`` takes what a trainer has at hand: one (N, D) tensor, several, a list of them, or one
(V, N, D) tensor of V views.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, _opaque, _ops, _options, functional
from ._collectives import Group, group_name, rank_in
from ._options import Embeddings
from ._request import Request, computing_dtype, is_narrow

__all__ = ["CovarianceLoss", "InvarianceLoss", "SlicedSketchLoss", "VarianceLoss"]


class Loss(nn.Module):
    """What all losses share: the common options, and how they are shown."""

    def __init__(
        self,
        *,
        gather_distributed: bool = True,
        process_group: Group = None,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        _checks.one_of("reduction", reduction, ("mean", "sum"))
        self.gather_distributed = gather_distributed
        # By its name, as a group can be neither copied nor pickled; resolved at every call.
        self.process_group = group_name(process_group)
        self.reduction = reduction
        self.impl = impl
        self._called = False

    def options(self) -> dict[str, Any]:
        """The options of this loss alone, as keywords of its constructor."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        common = {"gather_distributed": True, "process_group": None, "reduction": "mean"}
        changed = {k: getattr(self, k) for k, v in common.items() if getattr(self, k) != v}
        shown = {**self.options(), **changed, "impl": self.impl}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items() if not isinstance(v, Tensor))

    def _sharing(self) -> dict[str, Any]:
        return {
            "gather_distributed": self.gather_distributed,
            "process_group": self.process_group,
            "reduction": self.reduction,
        }

    def _common(self) -> dict[str, Any]:
        return {**self._sharing(), "impl": self.impl}

    def _float_views(
        self, views: Sequence[Embeddings], warning: str, request: Request
    ) -> tuple[Sequence[Tensor], Request]:
        """Checked views for several terms, in the computing dtype, and the request for them.

        One cast for all terms: its backward rounds the sum of their gradients once. What came in 16
        bits needs no more than those in a kernel.
        """
        tensors, request = _options.shared(request, self._views(views, warning), **self._sharing())
        dtype, parts = computing_dtype(tensors), int(is_narrow(tensors))
        return tuple(t.to(dtype) for t in tensors), request.but(parts=parts)

    def _views(self, views: Sequence[Embeddings], warning: str = "") -> Embeddings:
        """The arguments of ``forward`` as one argument of a function.

        The first call of each module may repeat the warning of that name.
        """
        if not torch.compiler.is_compiling() and not self._called:
            self._called = True
            _checks.forget_warning(warning)
        return views[0] if len(views) == 1 else views  # type: ignore[return-value]


class VarianceLoss(Loss):
    """Keep the standard deviation of every dimension up; see :func:`functional.variance_loss`.

    Args:
        gamma: target standard deviation.
        eps: added to the variance under the root.
        form: "hinge" (VICReg, 2022) or "squared" (VISReg's scale term, 2026).
        **common: ``gather_distributed``, ``process_group``, ``reduction``, ``impl``.

    Examples:
        >>> regularizer = VarianceLoss()
        >>> regularizer(torch.zeros(8, 4), torch.zeros(8, 4))
        tensor(0.9900)
    """

    def __init__(
        self, gamma: float = 1.0, eps: float = 1e-4, form: str = "hinge", **common: Any
    ) -> None:
        super().__init__(**common)
        _options.variance_request(gamma, eps, form, self.impl)
        self.gamma, self.eps, self.form = gamma, eps, form

    def options(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "eps": self.eps, "form": self.form}

    def forward(self, *views: Embeddings) -> Tensor:
        z = self._views(views, "variance_loss")
        return functional.variance_loss(z, **self.options(), **self._common())


class CovarianceLoss(Loss):
    """Decorrelate the dimensions; see :func:`functional.covariance_loss`.

    Args:
        strategy: "gram" for N x N, "feature" for D x D, "auto" for the smaller product.
        **common: ``gather_distributed``, ``process_group``, ``reduction``, ``impl``.
    """

    def __init__(self, strategy: str = "auto", **common: Any) -> None:
        super().__init__(**common)
        _options.covariance_request(strategy, self.impl)
        self.strategy = strategy

    def options(self) -> dict[str, Any]:
        return {"strategy": self.strategy}

    def forward(self, *views: Embeddings) -> Tensor:
        z = self._views(views, "covariance_loss")
        return functional.covariance_loss(z, **self.options(), **self._common())


class InvarianceLoss(Loss):
    """Bring the views of each sample together; see :func:`functional.invariance_loss`.

    Args:
        form: "pairwise" (VICReg, 2022) or "center" (VISReg, 2026; LeJEPA, 2025).
        num_global: how many views form the centre; ``None`` for all ("center" only).
        **common: ``gather_distributed``, ``process_group``, ``reduction``, ``impl``.
    """

    def __init__(
        self, form: str = "pairwise", num_global: int | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        _options.invariance_options(form, num_global, self.impl)
        self.form, self.num_global = form, num_global

    def options(self) -> dict[str, Any]:
        return {"form": self.form, "num_global": self.num_global}

    def forward(self, *views: Embeddings) -> Tensor:
        return functional.invariance_loss(self._views(views), **self.options(), **self._common())


class SlicedLoss(Loss):
    """A loss that owns a sequence of random slices.

    The buffers ``seed`` and ``step`` name the slices of the next call. Both are in ``state_dict``,
    so a run resumes where it stopped; PyTorch's global generators are never touched. In evaluation
    mode the step stands still. A call that activation checkpointing repeats in the backward pass
    gets the slices of the last call before it: checkpoint one call of a module in a step.
    """

    seed: Tensor
    step: Tensor

    def __init__(self, num_slices: int, seed: int, **common: Any) -> None:
        super().__init__(**common)
        _checks.integer("num_slices", num_slices, 1)
        _checks.seed("seed", seed)
        self.num_slices = num_slices
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64))

    def next_directions(self, like: Tensor, rank: int = 0) -> Tensor:
        """Directions of this call, (D, K), float32, for embeddings ``like`` (..., D).

        The same for all ranks, or those of one that has its own.
        """
        self._follow(like)
        advance = int(self.training)
        seed = functional.seed_of_rank(self.seed, rank)
        drawn = _opaque.draw_directions(
            seed, self.step, like.shape[-1], self.num_slices, advance, self.impl
        )
        if advance:
            _opaque.advance_step(self.step, advance)
        return drawn.to(like.device)

    def _follow(self, like: Tensor) -> None:
        """Move the counter to the embeddings once, rather than the slices at every call."""
        plain = type(like) in (Tensor, nn.Parameter) and not like.is_meta
        if plain and not torch.compiler.is_compiling() and self.step.device != like.device:
            self.seed, self.step = self.seed.to(like.device), self.step.to(like.device)

    def directions_for(
        self, views: Sequence[Tensor], explicit: Tensor | None, rank: int = 0
    ) -> Tensor:
        """Explicit directions, checked, or those of this call, in the computing dtype."""
        if explicit is not None:
            return _options.prepare_directions(explicit, views)
        return self.next_directions(views[0], rank).to(computing_dtype(views))

    def _shown_seed(self) -> int | str:
        return "meta" if self.seed.is_meta else int(self.seed)


class SlicedSketchLoss(SlicedLoss):
    """Pull every projection towards N(0, 1); see :func:`functional.sliced_sketch_loss`.

    Args:
        num_slices: K, how many directions each call draws.
        statistic: "wasserstein" (VISReg's shape term, 2026) or "epps_pulley" (SIGReg of LeJEPA,
            2025).
        quantiles: "paper" or "exact" targets ("wasserstein").
        seed: which sequence of slices; two losses with one seed draw the same slices.
        slices: "shared", K slices overall whatever the number of ranks; or "per_rank", K for each
            (VISReg's trainer). The same for one rank.
        knots: number of points t ("epps_pulley").
        t_max: the last of them ("epps_pulley").
        directions: fixed unit columns, (D, K), instead of drawn ones.
        generator_seed: the same slices at every call, drawn from this seed, instead of a sequence.
        exchange: what several ranks send each other: "slices", "samples" or "auto".
        **common: ``gather_distributed``, ``process_group``, ``reduction``, ``impl``.
    """

    directions: Tensor | None

    def __init__(
        self,
        num_slices: int = 1024,
        statistic: str = "wasserstein",
        quantiles: str = "paper",
        seed: int = 0,
        slices: str = "shared",
        knots: int = 17,
        t_max: float = 3.0,
        directions: Tensor | None = None,
        generator_seed: int | None = None,
        exchange: str = "auto",
        **common: Any,
    ) -> None:
        super().__init__(num_slices, seed, **common)
        if generator_seed is not None:
            _checks.seed("generator_seed", generator_seed)
        self.statistic, self.quantiles, self.slices = statistic, quantiles, slices
        self.knots, self.t_max, self.generator_seed = knots, t_max, generator_seed
        self.exchange = exchange
        self._request()
        if directions is not None:
            _checks.directions(directions)
            if generator_seed is not None:
                raise ValueError("generator_seed: expected None beside directions, got both.")
        self.register_buffer("directions", directions, persistent=False)

    def options(self) -> dict[str, Any]:
        names = ("num_slices", "statistic", "quantiles", "slices", "knots", "t_max")
        shown = {"seed": self._shown_seed(), **{name: getattr(self, name) for name in names}}
        if self.generator_seed is not None:
            shown["generator_seed"] = self.generator_seed
        if self.exchange != "auto":
            shown["exchange"] = self.exchange
        if self.directions is not None:
            shown["directions"] = tuple(self.directions.shape)
        return shown

    def _request(self) -> Request:
        return _options.sketch_request(
            self.statistic,
            self.quantiles,
            self.knots,
            self.t_max,
            self.impl,
            self.slices,
            self.exchange,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "SlicedSketchLoss":
        """Let ``.to()`` and ``.bfloat16()`` move fixed directions, but never round them."""
        fixed = self.directions
        super()._apply(fn, recurse)
        if fixed is not None and self.directions is not None:
            self.directions = fixed.to(self.directions.device)
        return self

    def forward(self, *views: Embeddings, directions: Tensor | None = None) -> Tensor:
        z = self._views(views, "sliced_sketch_loss")
        if directions is None:
            directions = self.directions
        if directions is None and self.generator_seed is None:
            # Checked first: a refused call must not advance the slices.
            tensors, request = _options.shared(self._request(), z, **self._sharing())
            _checks.warn_of_unit_norm("sliced_sketch_loss", tensors)
            rank = rank_in(request.group) if request.own_slices else 0
            w = self.directions_for(tensors, None, rank)
            return _ops.regularizers(request, tensors, w)[0]
        return functional.sliced_sketch_loss(
            z,
            directions=directions,
            num_slices=self.num_slices,
            statistic=self.statistic,
            quantiles=self.quantiles,
            generator_seed=self.generator_seed,
            slices=self.slices,
            knots=self.knots,
            t_max=self.t_max,
            exchange=self.exchange,
            **self._common(),
        )
