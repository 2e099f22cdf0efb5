"""The losses as functions.

Conventions of all of them:

- ``z`` is one (N, D) tensor of embeddings, one (V, N, D) tensor of V views, or a list or tuple of
  (N, D) tensors; N samples, D dimensions; float16, bfloat16, float32 or float64.
- Every term is the mean over views. The result is a 0-dim tensor in float32, or in float64 if the
  input is; arithmetic is done in that dtype whatever autocast says. The gradient has the dtype of
  the input.
- Gradients are closed forms: a second derivative is an error. A value that is not finite never
  comes with a finite gradient.
- Common keywords. ``gather_distributed``: where ``torch.distributed`` has several ranks, value and
  gradient are those of the global batch, on every rank, whatever its share of the samples (0 too);
  else, and with ``False``, those of this rank's. ``process_group``: the ranks, or their group's
  name; ``None`` for the default group at the time of the call. ``reduction``: "mean" for a trainer
  that averages gradients over ranks (DDP, FSDP, Lightning, Accelerate): the gradient is W times
  the derivative, for W ranks; "sum" for one that adds them. Nothing is communicated in the
  backward pass. ``impl``: "torch" for plain PyTorch; "triton" for fused kernels of every term but
  the invariance on a GPU, in the precision of ``torch.set_float32_matmul_precision``, refused with
  the reason where they cannot run (so far also over several ranks); "auto" chooses, and takes
  kernels only on chips on which they have been measured (so far none).
- Errors. ``TypeError``: not a tensor, or one of integers, booleans, complex numbers, sparse, nested
  or a DTensor. ``ValueError``: wrong rank or mismatched views, fewer than 2 samples, an unknown
  option. ``RuntimeError``: what this version or machine cannot run. Each names the argument, what
  was expected and what came. Over several ranks ``RuntimeError`` on all of them, if their calls are
  not the same.
"""

import torch
from torch import Tensor

from . import _checks, _collectives, _opaque, _ops, _slices
from ._collectives import Group
from ._dispatch import check
from ._options import (
    Embeddings,
    covariance_request,
    invariance_options,
    prepare_directions,
    shared,
    sketch_request,
    variance_request,
    with_invariance,
)
from ._request import Request, computing_dtype

__all__ = [
    "center_loss",
    "covariance_loss",
    "invariance_loss",
    "sliced_sketch_loss",
    "variance_loss",
]


def variance_loss(
    z: Embeddings,
    *,
    gamma: float = 1.0,
    eps: float = 1e-4,
    form: str = "hinge",
    gather_distributed: bool = True,
    process_group: Group = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Keep the standard deviation of every dimension up.

    ``form="hinge"``: ``mean_j relu(gamma - sqrt(s_j^2 + eps))`` with the unbiased variance
    ``s_j^2``. VICReg (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906, eqs. 1 and 2). The paper
    adds the views up; this is their mean, as in the authors' code. Its gradient fades below a
    standard deviation of ``sqrt(eps)``.

    ``form="squared"``: ``mean_j (1 - (sigma_j + 1e-6))^2`` with the biased standard deviation
    ``sigma_j``; the scale term of VISReg (2026, arXiv:2606.02572, eq. 1, with the 1e-6 of the
    authors' code). ``gamma`` and ``eps`` do not apply.

    Args:
        z: embeddings, see the module's conventions.
        gamma: target standard deviation, in the units of ``z``; not negative.
        eps: added to the variance under the root, in squared units of ``z``; not negative.
        form: "hinge" or "squared".
        gather_distributed: this and the rest: see the module's conventions.
        process_group: the ranks.
        reduction: "mean" or "sum".
        impl: "auto", "torch" or "triton".

    Returns:
        Tensor: 0-dim, the mean over dimensions and views.

    Raises:
        TypeError, ValueError, RuntimeError: see the module's conventions.

    Examples:
        >>> z = torch.zeros(8, 4)
        >>> variance_loss(z)
        tensor(0.9900)
    """
    request = variance_request(gamma, eps, form, impl)
    views, request = shared(request, z, gather_distributed, process_group, reduction)
    target = gamma if form == "hinge" else 1.0
    _checks.warn_of_unit_norm("variance_loss", views, target)
    return _ops.regularizers(request, views)[0]


def center_loss(
    z: Embeddings,
    *,
    gather_distributed: bool = True,
    process_group: Group = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Keep the mean of every dimension at zero: ``mean_j mu_j^2``.

    The centre term of VISReg (2026, arXiv:2606.02572, Algorithm 1; a mean over dimensions, where
    the paper's eq. 6 has a sum).

    Args:
        z: embeddings, see the module's conventions.
        gather_distributed: this and the rest: see the module's conventions.
        process_group: the ranks.
        reduction: "mean" or "sum".
        impl: "auto", "torch" or "triton".

    Returns:
        Tensor: 0-dim, the mean over dimensions and views, in squared units of ``z``.

    Raises:
        TypeError, ValueError, RuntimeError: see the module's conventions.
    """
    check(impl)
    request = Request(center=True, impl=impl)
    views, request = shared(request, z, gather_distributed, process_group, reduction)
    return _ops.regularizers(request, views)[0]


def covariance_loss(
    z: Embeddings,
    *,
    strategy: str = "auto",
    gather_distributed: bool = True,
    process_group: Group = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Decorrelate the dimensions: ``(1/D) sum_{i != j} C_ij^2``, ``C = Xc^T Xc / (N - 1)``.

    VICReg (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906, eqs. 3 and 4), with N the number of
    samples really present. VICReg adds the views up; this is their mean.

    ``||Xc^T Xc|| = ||Xc Xc^T||``, so the smaller of the D x D and the N x N product serves both
    the value and the gradient; half of it is computed. The N x N form subtracts the diagonal from
    a sum; on a CPU, float32 input whose diagonal dominates it is summed in float64. Triton kernels
    have relative errors of about 1e-6 for float32 input under "highest" precision, the default;
    under "high" and "medium", and for 16-bit input, about 1e-5 in the value and 4e-4 in the
    gradient.

    Args:
        z: embeddings, see the module's conventions.
        strategy: "gram" for N x N, "feature" for D x D, "auto" for the smaller one.
        gather_distributed: this and the rest: see the module's conventions.
        process_group: the ranks.
        reduction: "mean" or "sum".
        impl: "auto", "torch" or "triton".

    Returns:
        Tensor: 0-dim, the mean over views, in the fourth power of the units of ``z``.

    Raises:
        TypeError, ValueError, RuntimeError: see the module's conventions.
    """
    request = covariance_request(strategy, impl)
    views, request = shared(request, z, gather_distributed, process_group, reduction)
    _checks.warn_of_unit_norm("covariance_loss", views)
    return _ops.regularizers(request, views)[0]


def sliced_sketch_loss(
    z: Embeddings,
    *,
    directions: Tensor | None = None,
    num_slices: int = 1024,
    statistic: str = "wasserstein",
    quantiles: str = "paper",
    generator_seed: int | None = None,
    slices: str = "shared",
    knots: int = 17,
    t_max: float = 3.0,
    exchange: str = "auto",
    gather_distributed: bool = True,
    process_group: Group = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Pull every one-dimensional projection ``p = x w`` of the embeddings towards N(0, 1).

    ``statistic="wasserstein"``: ``mean_{i,k} (sort(p)_ik - q_i)^2`` on standardised embeddings
    ``x = (z - mu) / (stopgrad(sigma) + 1e-6)``, with the biased standard deviation sigma; the shape
    term of VISReg (2026, arXiv:2606.02572, Algorithm 1). Among tied samples the gradient is one of
    a set.

    ``statistic="epps_pulley"``: the mean over slices of ``N sum_t w_t [(mean_i cos(t p_i) -
    exp(-t^2/2))^2 + (mean_i sin(t p_i))^2]`` on ``x = z`` as it is, with ``knots`` points t from 0
    to ``t_max`` and trapezoid weights, doubled for t < 0, times ``exp(-t^2/2)``; SIGReg of LeJEPA
    (Balestriero and LeCun, 2025, arXiv:2511.08544). It stays near 1 for perfect embeddings.

    Triton kernels sort in the exact order of float32 for float32 input under "highest" precision.
    Otherwise the projections have operands of 11 bits, and elements of a slice that are nearer than
    ``2^-24`` of its range (``2^-17`` at N = 16384) count as tied; longer rows have no such steps.

    Args:
        z: embeddings, see the module's conventions.
        directions: unit columns, (D, K), which get no gradient; ``None`` draws them. Lengths are
            checked on the CPU, and elsewhere if the environment has ``VICREG_LOSSES_DEBUG=1``.
        num_slices: K of a draw.
        statistic: "wasserstein" or "epps_pulley".
        quantiles: targets of the sorted projections. "paper": ``ndtri(i / (N + 1))``, which pulls
            the variance of a small batch below 1 (.72 for N = 16, .96 for 256). "exact": the mean
            of N(0, 1) over each of N bins of equal probability, which makes the term the squared W2
            distance up to a constant. Of no effect on "epps_pulley".
        generator_seed: seed of the draw: the same seed, the same slices on one kind of device.
            ``None`` takes the next of a process-wide sequence, so each call has slices of its own.
            PyTorch's global generators are left alone either way.
        slices: "shared", K slices overall; or "per_rank", K of each rank's own (its directions, or
            those that it draws), so W K overall. The same for one rank.
        knots: number of points t, at least 2 ("epps_pulley").
        t_max: the last of them, in inverse units of ``z`` ("epps_pulley").
        exchange: what several ranks send each other: "slices" (projections; for "epps_pulley" sums
            of harmonics), "samples", or "auto" for the fewer bytes.
        gather_distributed: this and the rest: see the module's conventions.
        process_group: the ranks.
        reduction: "mean" or "sum".
        impl: "auto", "torch" or "triton".

    Returns:
        Tensor: 0-dim, the mean over slices and views.

    Raises:
        TypeError, ValueError, RuntimeError: see the module's conventions; also for directions of
            another shape, device or length, or that require a gradient.
    """
    request = sketch_request(statistic, quantiles, knots, t_max, impl, slices, exchange)
    _checks.integer("num_slices", num_slices, 1)
    views, request = shared(request, z, gather_distributed, process_group, reduction)
    _checks.warn_of_unit_norm("sliced_sketch_loss", views)
    if directions is None:
        rank = _collectives.rank_in(request.group) if request.own_slices else 0
        w = _draw(views[0], num_slices, generator_seed, impl, rank).to(computing_dtype(views))
    else:
        w = prepare_directions(directions, views)
    return _ops.regularizers(request, views, w)[0]


def invariance_loss(
    z: Embeddings,
    *,
    form: str = "pairwise",
    num_global: int | None = None,
    gather_distributed: bool = True,
    process_group: Group = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Bring the views of each sample together.

    ``form="pairwise"``: the mean over all pairs of views of ``mean((z_a - z_b)^2)`` over N and D;
    for two views the mean squared error of VICReg (Bardes, Ponce and LeCun, 2022,
    arXiv:2105.04906, the authors' code).

    ``form="center"``: ``mean((z - c)^2)`` over views, N and D, with c the mean of the first
    ``num_global`` views, not detached. VISReg (2026, arXiv:2606.02572, eq. 8) and LeJEPA
    (Balestriero and LeCun, 2025, arXiv:2511.08544).

    Args:
        z: embeddings of at least two views ("pairwise"), see the module's conventions.
        form: "pairwise" or "center".
        num_global: G, how many views form the centre; ``None`` for all ("center" only).
        gather_distributed: this and the rest: see the module's conventions.
        process_group: the ranks.
        reduction: "mean" or "sum".
        impl: "auto", "torch" or "triton".

    Returns:
        Tensor: 0-dim, in squared units of ``z``.

    Raises:
        TypeError, ValueError, RuntimeError: see the module's conventions.
    """
    invariance_options(form, num_global, impl)
    request = Request(impl=impl)
    views, request = shared(request, z, gather_distributed, process_group, reduction)
    return _ops.regularizers(with_invariance(request, form, num_global, views), views)[0]


def seed_of_rank(seed: Tensor, rank: int) -> Tensor:
    """The seed of one rank's own slices; the first one's is the seed itself."""
    return _slices.seed_of_rank(seed, rank) if rank else seed


def _draw(like: Tensor, slices: int, seed: int | None, impl: str, rank: int) -> Tensor:
    if seed is not None:
        _checks.seed("generator_seed", seed)
    key = torch.full((), seed or 0, dtype=torch.int64, device=like.device)
    step = torch.zeros_like(key) if seed is not None else _opaque.next_call().to(key.device)
    return _opaque.draw_directions(seed_of_rank(key, rank), step, like.shape[-1], slices, impl=impl)
