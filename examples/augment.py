"""Augmented views of a batch of images, every sample with draws of its own, on the images' device.

The random transforms of torchvision's ``v2`` draw once per call: a batch would share one crop and
one colour, and a call for every sample is thousands of small kernels, for which a GPU waits. So
here a batch of N images takes N draws of each parameter and a few large operations: one sampling
grid does crop, rotation and flip, one matrix for each sample does all of the colour, and two
products with banded matrices do the blur. What is the same for all samples, or needs no parameter,
is torchvision's: ``v2.functional``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import ranks
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

ATTEMPTS = 10  # to draw a crop that fits, as torchvision's RandomResizedCrop
LUMA = (0.2989, 0.587, 0.114)  # the weights of torchvision's rgb_to_grayscale
HUE_PLANE = ((0.0, -1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 1.0, 0.0))  # a quarter turn, times sqrt(3)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Augmentation:
    """Random views of a batch of images: SimCLR's and BYOL's family, which VICReg uses.

    In this order: crop, rotation and flip; with probability ``jitter`` brightness, contrast,
    saturation and hue; grayscale; Gaussian blur; solarization; normalisation. An operation is off
    where its field is 0. Images of one channel skip saturation, hue and grayscale.

    The crop is torchvision's ``RandomResizedCrop``, less its rounding to whole pixels: its area is
    uniform, the logarithm of its aspect is uniform, and draws that do not fit in the image are
    drawn again. It is sampled bilinearly without antialiasing, which is right while a pixel of the
    view covers no more than 2x2 of the image: store images no larger than twice the view.

    Colour differs from torchvision's ``ColorJitter`` in three ways: the order is fixed, values are
    clamped to [0, 1] once, at the end, and the hue is turned about the gray axis of RGB. That is
    the linear approximation of a shift in HSV: it keeps the mean of red, green and blue where HSV
    keeps the largest, and the two agree at multiples of a third of the circle.

    Attributes:
        area: Range of the crop's area, as a fraction of the image; above 1 it zooms out.
        aspect: Largest ratio of the crop's sides, either way.
        degrees: Largest rotation, either way. Outside of the image its edge is repeated.
        flip: Probability of a horizontal flip.
        jitter: Probability that brightness, contrast, saturation and hue change.
        brightness: Largest relative change; the factor is uniform in [1 - x, 1 + x].
        contrast: The same, about the mean of the view's gray.
        saturation: The same.
        hue: Largest shift, either way, as a fraction of the circle.
        grayscale: Probability of losing all colour.
        blur: Probability of a blur. Its sigma is uniform in [0.1, 2] pixels, its kernel about a
            tenth of the view wide: 23 pixels at 224.
        solarize: Probability of inverting what is brighter than 1/2.
        mean: Of each channel in [0, 1], subtracted at the end; one number serves all channels.
        std: Of each channel, divided by.
    """

    area: tuple[float, float] = (0.08, 1.0)
    aspect: float = 4 / 3
    degrees: float = 0.0
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(
        self, images: Tensor, generator: torch.Generator, size: int | None = None
    ) -> Tensor:
        """Draw one view of every image.

        The view of an image does not depend on the number of ranks: each rank makes the draws of
        the global batch, and takes those of its rows.

        Args:
            images: This rank's images (N, C, H, W), uint8, C of 1 or 3.
            generator: On the device of ``images``, in the same state on all ranks.
            size: Height and width of the views; None: H.

        Returns:
            Views (N, C, size, size), float32, normalised, in the channels-last memory format.

        Raises:
            ValueError: Type or shape of ``images`` is another one.
        """
        self._check(images)
        size = images.shape[2] if size is None else size
        crop, colour, rest = _draws(images, generator).split([2 * ATTEMPTS + 4, 6, 3])
        with torch.autocast(images.device.type, enabled=False):  # the products below are of pixels
            grid = F.affine_grid(
                self._crops(crop, images), [*images.shape[:2], size, size], align_corners=False
            )
            pixels = v2.functional.to_dtype(images, torch.float32, scale=True)
            views = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
            views = self._colours(views, colour)
            chosen, sigma, inverted = rest
            if self.blur:
                sigma = torch.where(chosen < self.blur, _between(sigma, 0.1, 2), 0)
                views = gaussian_blur(views, sigma, radius=size // 20)
            if self.solarize:
                solarized = v2.functional.solarize(views, 0.5)
                views = torch.where(_column(inverted < self.solarize), solarized, views)
        return self.normalise(views)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Subtract the mean of (N, C, H, W) pixels in [0, 1], divide by std; channels-last."""
        mean, std = (_constant(values, pixels.device) for values in (self.mean, self.std))
        pixels = (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        return pixels.contiguous(memory_format=torch.channels_last)

    def _check(self, images: Tensor) -> None:
        channels = images.shape[1] if images.dim() == 4 else 0
        if images.dtype != torch.uint8 or channels not in (1, 3):
            found = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"images: expected uint8 (N, 1 or 3, H, W), got {found}")
        if len(self.mean) not in (1, channels):
            raise ValueError(f"images: expected {len(self.mean)} channels, got {channels}")

    def _crops(self, draws: Tensor, images: Tensor) -> Tensor:
        """Affine maps (N, 2, 3) from the view's coordinates to the image's, both in [-1, 1]."""
        areas, aspects = draws[: 2 * ATTEMPTS].chunk(2)
        shift_x, shift_y, turn, mirrored = draws[2 * ATTEMPTS :]
        aspects = (_between(aspects, -1, 1) * math.log(self.aspect)).exp()
        half = self._first_that_fits(
            _between(areas, *self.area), aspects * (images.shape[2] / images.shape[3])
        )
        shift = (1 - half).abs() * _between(torch.stack([shift_x, shift_y], 1), -1, 1)
        angle = _between(turn, -1, 1) * math.radians(self.degrees)
        mirror = torch.where(mirrored < self.flip, -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        x_axis = torch.stack([cos * mirror, -sin], 1) * half
        y_axis = torch.stack([sin * mirror, cos], 1) * half
        return torch.cat([torch.stack([x_axis, y_axis], 1), shift.unsqueeze(2)], 2)

    def _first_that_fits(self, areas: Tensor, aspects: Tensor) -> Tensor:
        """Half sides (N, 2) of each sample's first crop (attempts, N) that is within the image.

        Where the area may exceed 1, so may the sides. A sample without a fit takes its first crop,
        cut off at the image.
        """
        sides = torch.stack([areas * aspects, areas / aspects], 2).sqrt()
        largest = max(1.0, math.sqrt(self.area[1]))
        fits = (sides <= largest).all(2)
        first = fits.to(torch.uint8).argmax(0)
        return sides[first, torch.arange(len(first), device=first.device)].clamp(max=largest)

    def _colours(self, views: Tensor, draws: Tensor) -> Tensor:
        """Jitter and grayscale of views (N, C, H, W) in [0, 1], by ``draws`` (6, N)."""
        chosen, *factors, gray = draws
        ranges = (self.brightness, self.contrast, self.saturation, self.hue)
        changes = [
            torch.where(chosen < self.jitter, _between(draw, -most, most), 0)
            for draw, most in zip(factors, ranges, strict=True)
        ]
        brightness, contrast, saturation = (1 + change for change in changes[:3])
        return adjust_colours(
            views, brightness, contrast, saturation, changes[3], gray < self.grayscale
        )


def adjust_colours(
    views: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    hue: Tensor,
    grayscale: Tensor,
) -> Tensor:
    """Change the colours of each sample: v2's adjust_brightness, _contrast, _saturation and _hue.

    All of it but the final clamp is affine in the colour of a pixel: with brightness b, contrast c
    and the mean gray m of the view, x becomes M (c b x + (1 - c) b m), where M = G R S: saturation
    S, rotation R about the gray axis, grayscale G (or the identity); all of them keep gray.

    Args:
        views: (N, C, H, W) in [0, 1].
        brightness: Factors (N,).
        contrast: Factors (N,).
        saturation: Factors (N,).
        hue: Shifts (N,), as fractions of the circle.
        grayscale: Whether the sample loses its colour (N,).

    Returns:
        Changed views, clamped to [0, 1].
    """
    gain, rest = _column(contrast * brightness), _column((1 - contrast) * brightness)
    if views.shape[1] == 1:
        return (views * gain + views.mean((2, 3), keepdim=True) * rest).clamp_(0, 1)
    matrix = _colour_matrices(saturation, hue, grayscale)
    mean_gray = views.mean((2, 3)) @ _constant(LUMA, views.device)
    offset = rest.flatten(1) * mean_gray.unsqueeze(1)
    changed = torch.baddbmm(offset.unsqueeze(2), matrix * gain.flatten(1, 2), views.flatten(2))
    return changed.view_as(views).clamp_(0, 1)


def _colour_matrices(saturation: Tensor, hue: Tensor, grayscale: Tensor) -> Tensor:
    """The matrix M of each sample in ``adjust_colours``, (N, 3, 3)."""
    identity = torch.eye(3, device=hue.device)
    to_gray = _constant(LUMA, hue.device).expand(3, 3)
    angle = (2 * math.pi * hue).view(-1, 1, 1)
    rotation = torch.lerp(torch.full_like(identity, 1 / 3), identity, angle.cos())
    rotation = rotation + angle.sin() / math.sqrt(3) * _constant(HUE_PLANE, hue.device)
    matrix = rotation @ torch.lerp(to_gray, identity, saturation.view(-1, 1, 1))
    return torch.where(grayscale.view(-1, 1, 1), to_gray @ matrix, matrix)


def gaussian_blur(views: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each sample by its own sigma: v2's gaussian_blur with a kernel of 2 radius + 1 pixels.

    Rows and columns are multiplied by one banded matrix (size, size) for each sample, in which the
    reflection at the edges is included.

    Args:
        views: (N, C, size, size).
        sigma: (N,), in pixels; 0 leaves a sample as it is.
        radius: Of the kernel, less than size.

    Returns:
        Blurred views.
    """
    last = views.shape[3] - 1
    distance = torch.arange(2 * last + 1, device=views.device)
    scale = sigma.clamp(min=1e-3).unsqueeze(1)  # at which a neighbour's weight is 0 in float32
    weights = torch.exp(-0.5 * (distance.clamp(max=radius) / scale).square())
    weights = weights * (distance <= radius)
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    row, column = distance[: last + 1].unsqueeze(1), distance[: last + 1]
    bands = weights[:, (row - column).abs()]
    bands = bands + weights[:, row + column] * (column > 0)  # reflected before the first pixel
    bands = bands + weights[:, 2 * last - row - column] * (column < last)  # and behind the last
    views = torch.einsum("nij,nchj->nchi", bands, views)
    return torch.einsum("nij,ncjw->nciw", bands, views)


@dataclass(frozen=True)
class Views:
    """The augmentations of one data set, which make a list of views of a batch.

    Attributes:
        first: Of the first, third, ... global view.
        second: Of the second, fourth, ...; asymmetric in BYOL and in VICReg's official code.
        local: Of the local views, which are small crops.
        size: Height and width of the global views; None: that of the stored images.
        local_size: Of the local views; None: 3/7 of the global ones, which is 96 of 224.
    """

    first: Augmentation
    second: Augmentation
    local: Augmentation
    size: int | None = None
    local_size: int | None = None

    def __call__(
        self, images: Tensor, generator: torch.Generator, num_global: int = 2, num_local: int = 0
    ) -> list[Tensor]:
        """Draw the views of (N, C, H, W) uint8 images, see ``Augmentation``: global ones first.

        With local views, the area of a global one is 1/4 of the image or more, as in DINO (Caron
        et al. 2021), so that it shows what the local ones are a part of.
        """
        size = images.shape[2] if self.size is None else self.size
        small = round(size * 3 / 7) if self.local_size is None else self.local_size
        pair = (self.first, self.second)
        if num_local:
            pair = tuple(replace(one, area=(max(one.area[0], 0.25), one.area[1])) for one in pair)
        views = [pair[index % 2](images, generator, size) for index in range(num_global)]
        return views + [self.local(images, generator, small) for _ in range(num_local)]

    def plain(self, images: Tensor) -> Tensor:
        """The images as evaluation sees them: not augmented, resized to ``size``, normalised."""
        if self.size is not None and images.shape[2] != self.size:
            images = v2.functional.resize(images, [self.size, self.size], antialias=True)
        return self.first.normalise(v2.functional.to_dtype(images, torch.float32, scale=True))


def _views(first: Augmentation, second: Augmentation | None = None, *, local: float) -> Views:
    """Views whose local crops are ``local`` of the image in area, down to a fifth of that."""
    second = second or first
    return Views(first, second, replace(second, area=(local / 5, local)))


_LIGHT = {"brightness": 0.4, "contrast": 0.4}
_DIGIT = Augmentation(
    area=(0.5, 1.2), aspect=1.3, degrees=15, jitter=1, mean=(0.1307,), std=(0.3081,), **_LIGHT
)
_GARMENT = Augmentation(
    area=(0.4, 1), degrees=5, flip=0.5, jitter=0.8, mean=(0.286,), std=(0.353,), **_LIGHT
)
_PHOTO = Augmentation(
    flip=0.5, jitter=0.8, saturation=0.2, hue=0.1, grayscale=0.2, **_LIGHT, **IMAGENET
)

DIGITS = _views(_DIGIT, local=0.5)
"""Handwritten digits: no flip, and no crop too small to hold a digit's strokes."""
FASHION = _views(_GARMENT, local=0.4)
"""Gray pictures of clothes, 28 pixels."""
PHOTOS = _views(replace(_PHOTO, blur=1.0), replace(_PHOTO, blur=0.1, solarize=0.2), local=0.25)
"""Photographs: as likely as in VICReg's official code, which is BYOL's; DINO's local crops."""
SMALL_PHOTOS = _views(_PHOTO, replace(_PHOTO, solarize=0.2), local=0.25)
"""Photographs of 64 pixels and less: the same without blur."""


def _draws(images: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), (draws of a sample, N): this rank's columns of all ranks'."""
    total = len(images) * ranks.size()
    draws = torch.rand(2 * ATTEMPTS + 13, total, generator=generator, device=images.device)
    return draws[:, ranks.part(total)]


def _between(draw: Tensor, low: float, high: float) -> Tensor:
    """Numbers in [low, high) from ones in [0, 1)."""
    return low + (high - low) * draw


def _column(values: Tensor) -> Tensor:
    """One value for each sample (N,), in the shape that meets (N, C, H, W)."""
    return values.view(-1, 1, 1, 1)


@lru_cache
def _constant(values: tuple[object, ...], device: torch.device) -> Tensor:
    """A constant on the device; copied there once, because a GPU waits for a copy."""
    return torch.tensor(values, device=device)
