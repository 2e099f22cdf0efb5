"""Options and embeddings of a call, checked and put into a request, for functions and modules."""

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from . import _checks, _collectives
from ._collectives import Group
from ._dispatch import check
from ._request import Request, batch_shape, computing_dtype, narrow_dtype

Embeddings: TypeAlias = Tensor | Sequence[Tensor]


def with_invariance(
    request: Request, form: str, num_global: int | None, views: Sequence[Tensor]
) -> Request:
    """The request with the invariance: how many views form the centre, and its factor."""
    count = batch_shape(views)[0]
    if form == "pairwise":
        if count < 2:
            raise ValueError("embeddings: expected at least 2 views with form='pairwise', got 1.")
        return request.but(invariance=count, factor=2 * count / (count - 1))
    group = count if num_global is None else num_global
    if group > count:
        raise ValueError(f"num_global: expected at most the {count} views there are, got {group}.")
    return request.but(invariance=group, factor=1.0)


def invariance_options(form: str, num_global: int | None, impl: str) -> None:
    """Check the options of :func:`invariance_loss`."""
    _checks.one_of("form", form, ("pairwise", "center"))
    check(impl, kernels=False)
    if num_global is not None:
        _checks.integer("num_global", num_global, 1)
        if form == "pairwise":
            raise ValueError(f"num_global: expected None with form='pairwise', got {num_global}.")


def variance_request(gamma: float, eps: float, form: str, impl: str) -> Request:
    """Check the options of :func:`variance_loss`."""
    _checks.one_of("form", form, ("hinge", "squared"))
    _checks.real("gamma", gamma)
    _checks.real("eps", eps)
    check(impl)
    return Request(variance=form, gamma=float(gamma), eps=float(eps), impl=impl)


def covariance_request(strategy: str, impl: str) -> Request:
    """Check the options of :func:`covariance_loss`."""
    _checks.one_of("strategy", strategy, ("auto", "gram", "feature"))
    check(impl)
    return Request(covariance=strategy, impl=impl)


def sketch_request(
    statistic: str,
    quantiles: str,
    knots: int,
    t_max: float,
    impl: str,
    slices: str = "shared",
    exchange: str = "auto",
) -> Request:
    """Check the options of :func:`sliced_sketch_loss`."""
    _checks.one_of("statistic", statistic, ("wasserstein", "epps_pulley"))
    _checks.one_of("quantiles", quantiles, ("paper", "exact"))
    _checks.integer("knots", knots, 2)
    _checks.real("t_max", t_max, positive=True)
    _checks.one_of("slices", slices, ("shared", "per_rank"))
    _checks.one_of("exchange", exchange, ("auto", "slices", "samples"))
    if slices == "per_rank" and exchange == "slices":
        raise ValueError(
            "exchange: expected 'auto' or 'samples' with slices='per_rank', got 'slices'."
        )
    check(impl)
    return Request(
        sketch=statistic,
        quantiles=quantiles,
        knots=knots,
        t_max=float(t_max),
        impl=impl,
        own_slices=slices == "per_rank",
        exchange=exchange,
    )


def shared(
    request: Request,
    z: Embeddings,
    gather_distributed: bool,
    process_group: Group,
    reduction: str,
) -> tuple[tuple[Tensor, ...], Request]:
    """Check what all losses share; return the views, and the request with the ranks in it.

    A rank among several may have no samples at all.
    """
    _checks.one_of("reduction", reduction, ("mean", "sum"))
    world, name = _collectives.members(process_group) if gather_distributed else (1, "")
    views = _checks.embeddings(z, min_samples=2 if world == 1 else 0)
    request = request.but(gathers=gather_distributed)
    if world > 1:
        request = request.but(
            world=world, group=name, averages=reduction == "mean", wire=narrow_dtype(views)
        )
    return views, request


def prepare_directions(directions: Tensor, views: Sequence[Tensor]) -> Tensor:
    """Check explicit directions and give them the computing dtype."""
    _checks.directions(directions, views[0])
    return directions.to(computing_dtype(views))
