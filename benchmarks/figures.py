"""``python -m benchmarks.figures``: the figures of the documentation that are no times.

The kernels run in Triton's interpreter here, so their errors are those of the arithmetic, not of a
chip. About a minute; ``--json FILE`` keeps them for ``benchmarks.publish``.
"""

import argparse
import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import measure, published
from benchmarks.contenders import Loss
from vicreg_losses import VICRegLoss, functional

SHAPES = ((1, 256, 1024), (1, 1024, 256))
SETTINGS = (
    (torch.float32, "highest"),
    (torch.float32, "high"),
    (torch.float16, "highest"),
    (torch.bfloat16, "highest"),
)
SKETCHES = {"wasserstein": published.sliced_wasserstein, "epps_pulley": published.epps_pulley}


def white(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def value_and_gradient(loss: Loss, z: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def errors(loss: Loss, z: Tensor, formula: Loss = published.covariance) -> tuple[float, float]:
    """Relative errors of value and gradient against the published formula in float64.

    The loss is scaled, as for a gradient scaler, so that float16 does not lose small gradients.
    """
    true = value_and_gradient(formula, z.double())
    value, gradient = value_and_gradient(lambda leaf: 1024 * loss(leaf), z)
    found = value.double() / 1024, gradient.double() / 1024
    off, slope = ((f - t).norm() / t.norm() for f, t in zip(found, true, strict=True))
    return off.item(), slope.item()


def kernels(z: Tensor) -> Tensor:
    return functional.covariance_loss(z, impl="triton")


def covariance_errors() -> Table:
    table = Table("input", "setting", "loss", "value", "gradient", title="covariance, white data")
    for shape in SHAPES:
        for dtype, setting in SETTINGS:
            z = white(shape).to(dtype)
            torch.set_float32_matmul_precision(setting)
            row = [f"{error:.1e}" for error in errors(kernels, z)]
            table.add_row(f"{shape} {dtype}", setting, "kernels", *row)
        row = [f"{error:.1e}" for error in errors(published.covariance, white(shape).float())]
        table.add_row(f"{shape} torch.float32", "highest", "published formula", *row)
    return table


def sketch_kernels(statistic: str, w: Tensor) -> Loss:
    function = functional.sliced_sketch_loss
    return partial(function, directions=w.float(), statistic=statistic, impl="triton")


def sketch_errors() -> Table:
    """Where the embeddings are normal, the residual is small, and the ranks hang on roundings."""
    table = Table(
        "input", "setting", "loss", "value", "gradient", title="sketch, (1, 256, 64), K 8"
    )
    w = white((64, 8))
    w /= w.norm(dim=0)
    normal = white((1, 256, 64))
    for name, data in (("normal", normal), ("skewed", normal.exp())):
        for statistic, formula in SKETCHES.items():
            wanted = partial(formula, directions=w)
            for dtype, setting in SETTINGS:
                torch.set_float32_matmul_precision(setting)
                z = data.to(dtype)
                ours = sketch_kernels(statistic, w)
                row = [f"{error:.1e}" for error in errors(ours, z, wanted)]
                table.add_row(f"{name} {statistic} {dtype}", setting, "kernels", *row)
            plain = partial(formula, directions=w.float())
            row = [f"{error:.1e}" for error in errors(plain, data.float(), wanted)]
            table.add_row(f"{name} {statistic} torch.float32", "", "published formula", *row)
    return table


def outlier_errors() -> Table:
    table = Table("outlier, spreads", "parts", "value", "gradient", title="covariance, (256, 1024)")
    for parts, setting in ((1, "high"), (2, "highest")):
        torch.set_float32_matmul_precision(setting)
        for size in (100.0, 1000.0, 10000.0):
            z = white(SHAPES[0]).float()
            z[0, 0, 0] = size
            row = [f"{error:.1e}" for error in errors(kernels, z)]
            table.add_row(f"{size:g}", str(parts), *row)
    return table


def sketch_extreme_errors() -> Table:
    table = Table(
        "input", "parts", "value", "gradient", title="sketch at extremes, (1, 40, 64), K 8"
    )
    w = white((64, 8))
    w /= w.norm(dim=0)
    outlier = white((1, 40, 64))
    outlier[0, 0, 0] = 1e4
    cases = [("epps_pulley, an outlier of 10,000", "epps_pulley", outlier)]
    for statistic, scales in (("epps_pulley", (1e-9, 1e-11)), ("wasserstein", (1e-14, 1e-16))):
        cases += [(f"{statistic}, x {s:g}", statistic, s * white((1, 40, 64))) for s in scales]
    for name, statistic, z in cases:
        wanted = partial(SKETCHES[statistic], directions=w)
        for parts, setting in ((1, "high"), (2, "highest")):
            torch.set_float32_matmul_precision(setting)
            ours = sketch_kernels(statistic, w)
            row = [f"{error:.1e}" for error in errors(ours, z.float(), wanted)]
            table.add_row(name, str(parts), *row)
        plain = partial(SKETCHES[statistic], directions=w.float())
        row = [f"{error:.1e}" for error in errors(plain, z.float(), wanted)]
        table.add_row(name, "published formula", *row)
    return table


def narrow_column_errors() -> Table:
    """The variance's gradient of one narrow column, with a covariance term whose gradient is 0."""
    table = Table("narrow / widest", "two parts", "one part", title="hinge beside a covariance")
    for power in (3, 5, 7, 9, 11):
        row = []
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            z = white((1, 64, 8))
            z[..., 0] *= 1e-4
            z[..., 1:] *= 10.0 ** (power - 4)
            found = []
            for leaf, impl in ((z.float(), "triton"), (z.float().double(), "torch")):
                loss = VICRegLoss(covariance=0.0, impl=impl)

                def hinge(x: Tensor, loss: VICRegLoss = loss) -> Tensor:
                    request = loss.terms(x, x)
                    return request.variance + 0 * request.covariance

                found.append(value_and_gradient(hinge, leaf[0])[1][:, 0].double())
            row.append(f"{((found[0] - found[1]).norm() / found[1].norm()).item():.1e}")
        table.add_row(f"1e-{power}", *row)
    return table


def floors() -> Table:
    table = Table("N", "target variance", "VISReg's shape", "SIGReg", title="perfect embeddings")
    for samples in (16, 256, 4096):
        z = white((samples, 256)).float()
        normal = torch.special.ndtri(torch.arange(1, samples + 1).double() / (samples + 1))
        common = {"num_slices": 1024, "generator_seed": 0}
        shape = functional.sliced_sketch_loss(z, **common)
        sigreg = functional.sliced_sketch_loss(z, statistic="epps_pulley", **common)
        variance = normal.square().mean()
        table.add_row(str(samples), *(f"{x.item():.2g}" for x in (variance, shape, sigreg)))
    return table


def hinge_behind_batch_norm() -> Table:
    title = "hinge behind a BatchNorm, 256 samples of 128 dimensions"
    table = Table("standard deviation before", "hinge", title=title)
    z = white((256, 128)).float()
    for std in (0.1, 0.05, 0.02, 0.01, 0.003, 0.001, 0.0001):
        after = torch.nn.BatchNorm1d(128, affine=False)(std * z)
        table.add_row(f"{std:g}", f"{functional.variance_loss(after).item():.2g}")
    return table


def contents(table: Table) -> dict[str, list[str] | list[list[str]]]:
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return {
        "columns": [str(column.header) for column in table.columns],
        "rows": [[str(cell) for cell in row] for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="also write them here")
    options = parser.parse_args()
    console = Console()
    before = torch.get_float32_matmul_precision()
    functions = (
        floors,
        hinge_behind_batch_norm,
        covariance_errors,
        outlier_errors,
        narrow_column_errors,
        sketch_errors,
        sketch_extreme_errors,
    )
    record = {}
    for function in functions:
        table = function()
        console.print(table)
        record[function.__name__] = contents(table)
    torch.set_float32_matmul_precision(before)
    if options.json:
        about = {"machine": measure.machine(), "versions": measure.versions()}
        options.json.write_text(json.dumps(about | {"tables": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
