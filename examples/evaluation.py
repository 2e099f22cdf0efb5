"""What frozen features are worth: nearest neighbours, logistic regression, linear probes.

All functions take features (N, F) and integer labels (N,); accuracies are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ranks
import torch
import torch.nn.functional as F
from data import Images, ordered_batches, shuffled_batches
from lightning_fabric import Fabric
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import Subset
from torchmetrics.classification import MulticlassAccuracy

SIMILARITIES = 1 << 28  # of nearest neighbours, held at a time: 1 GiB
Batch = tuple[Tensor, Tensor]
Encoder = Callable[[Tensor], Tensor]


def encode(
    encoder: Encoder,
    batches: Iterable[Batch],
    prepare: Callable[[Tensor], Tensor],
    device: torch.device | str,
) -> Batch:
    """Encode batches of (images, labels), in their order, without gradients.

    Args:
        encoder: Maps prepared images to features (N, ...), flattened to (N, F); in eval mode.
        batches: Images as stored, and labels; at least one batch.
        prepare: Maps images, on the device, to the encoder's input, e.g. ``views.plain``.
        device: Where the encoder is.

    Returns:
        Features (N, F), float32, and labels (N,), on ``device``: 10 GB of ImageNet by ResNet-50.

    Raises:
        ValueError: There are no batches.
    """
    features, labels = [], []
    with torch.inference_mode():
        for images, targets in batches:
            inputs = prepare(images.to(device, non_blocking=True))
            features.append(encoder(inputs).flatten(1).float())
            labels.append(targets.to(device))
    _require("batches", "one or more", len(features), len(features) > 0)
    return torch.cat(features), torch.cat(labels)  # in normal mode: to train on


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    r"""Accuracy of a weighted vote of the nearest neighbours, by cosine similarity.

    The ``neighbours`` training samples of highest similarity :math:`s_i`, or all of fewer, vote for
    their class with weight :math:`\exp(s_i / \tau)` (Wu et al., 2018, arXiv:1805.01978). Defaults
    are DINO's (Caron et al., 2021, arXiv:2104.14294). Takes up to 1 GiB, on the features' device.

    Args:
        train: Features (N, F).
        train_labels: Labels (N,).
        test: Features (M, F).
        test_labels: Labels (M,).
        classes: Number of classes; labels are below it.
        neighbours: How many vote.
        temperature: :math:`\tau`.

    Raises:
        ValueError: Shapes do not match, features are not finite, labels are not classes, or an
            option is not positive.
    """
    _check_features(train, train_labels, test, test_labels)
    _require("neighbours", "1 or more", neighbours, neighbours >= 1)
    _require("temperature", "a positive number", temperature, temperature > 0)
    for name, labels in (("train_labels", train_labels), ("test_labels", test_labels)):
        low, high = map(int, labels.aminmax())
        _require(name, f"0 to {classes - 1}", f"{low} to {high}", 0 <= low <= high < classes)
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    neighbours = min(neighbours, len(train))
    rows = max(1, min(1024, SIMILARITIES // len(train)))
    correct = 0
    for queries, answers in zip(test.split(rows), test_labels.split(rows), strict=True):
        similarity, nearest = (queries @ train.T).topk(neighbours, dim=1)
        weights = (similarity / temperature).softmax(1)  # the ratios of exp, but cannot overflow
        votes = weights.new_zeros(len(queries), classes)
        votes.scatter_add_(1, train_labels[nearest], weights)
        correct += int((votes.argmax(1) == answers).sum())
    return correct / len(test)


def logistic_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> float:
    """Accuracy of scikit-learn's logistic regression on standardised features.

    It finds the optimum, without a learning rate or a number of epochs; on the CPU, so for small
    sets, up to some ten thousand samples. Arguments are those of :func:`knn_accuracy`.

    Raises:
        ValueError: Shapes do not match, features are not finite, or there is one class.
    """
    _check_features(train, train_labels, test, test_labels)
    x_train, y_train, x_test, y_test = (
        x.cpu().numpy() for x in (train.float(), train_labels, test.float(), test_labels)
    )
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, tol=1e-5))
    with threadpool_limits(1, "blas"):  # on matrices this small, threads mostly wait for each other
        return float(probe.fit(x_train, y_train).score(x_test, y_test))


class OnlineProbe:
    """A linear classifier that is trained beside the pretraining, one step a batch.

    It sees detached features, so it changes no gradient of the backbone, and has an AdamW of its
    own. Its running accuracy shows during the pretraining whether the features improve. It starts
    from zero and draws no random numbers, so a run with it is the run without it.

    Over several ranks, as of ``DistributedDataParallel``, its gradient is averaged by Fabric, so it
    is the same on all ranks, and that of the global batch. It is float32 at any precision of the
    run, and leaves Fabric's gradient scaler, which may hold gradients of the backbone, alone.

    Args:
        fabric: Lightning Fabric, launched.
        features: F.
        classes: Number of classes.
        lr: Learning rate of AdamW, without weight decay.

    Raises:
        ValueError: There are no features, or fewer than two classes.
    """

    def __init__(self, fabric: Fabric, features: int, classes: int, *, lr: float = 1e-3) -> None:
        _require("features", "1 or more", features, features >= 1)
        _require("classes", "2 or more", classes, classes >= 2)
        self.head = _new_head(features, classes, fabric)
        self.optimiser = AdamW(self.head.parameters(), lr=lr, weight_decay=0.0)
        self._fabric = fabric
        self._accuracy = _accuracy(classes, 1, fabric)
        self._accuracy.persistent(True)

    def step(self, features: Tensor, labels: Tensor) -> Tensor:
        """Predict, count what was right, then learn from this rank's batch.

        Returns:
            The cross entropy before the step, 0-dim and detached.
        """
        features = features.detach().float()
        logits, loss = _learn(self.head, self.optimiser, features, labels, self._fabric)
        self._accuracy.update(logits, labels)
        return loss

    def top1(self) -> float:
        """Accuracy of the predictions of all ranks since the last call; all ranks must call."""
        accuracy = float(self._accuracy.compute())
        self._accuracy.reset()
        return accuracy

    def state_dict(self) -> dict[str, Any]:
        """All that training changes; the counts of :meth:`top1` are this rank's."""
        parts = {"head": self.head, "optimiser": self.optimiser, "accuracy": self._accuracy}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self._accuracy.load_state_dict(state["accuracy"])


def linear_evaluation(
    backbone: nn.Module,
    images: Images,
    fabric: Fabric,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 0.02,
    weight_decay: float = 1e-6,
    cached: bool = False,
    seed: int = 0,
    workers: int = 0,
    on_epoch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Train a linear classifier on frozen features, and judge it on the held-out images.

    VICReg's protocol for ImageNet, and its defaults (Bardes, Ponce and LeCun, 2022,
    arXiv:2105.04906): SGD with momentum 0.9 and a cosine schedule by epoch, the cross entropy of
    random crops and flips, held-out images as they are. It reports the
    last epoch, not the best on held-out images, and sees the stored centre square of an image.

    Over several ranks the batch is divided, gradients are averaged, and each rank judges its share
    of the held-out images; the result is that of all, on all ranks.

    Args:
        backbone: On Fabric's device; it is put in eval mode and left there.
        images: The data set.
        fabric: Lightning Fabric, launched.
        epochs: Passes over the training images.
        batch_size: Images per step, on all ranks; whole batches alone are taken.
        lr: Learning rate of the first epoch.
        weight_decay: Of SGD.
        cached: Compute the features once, without augmentation, and train on those: fast, for
            small sets. Every rank computes them all.
        seed: Of the order, the crops and the classifier's first weights.
        workers: Loader processes.
        on_epoch: Called with the number of epochs done, e.g. to show progress.

    Returns:
        ``top1`` and, of more than five classes, ``top5``.

    Raises:
        ValueError: An option is not positive, or ``weight_decay`` negative.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        _require(name, "1 or more", value, value >= 1)
    _require("lr", "a positive number", lr, lr > 0)
    _require("weight_decay", "0 or more", weight_decay, weight_decay >= 0)
    batch = min(batch_size, len(images.train))
    batch -= batch % ranks.size()
    _require("batch_size", f"{ranks.size()} or more, one for each rank", batch_size, batch > 0)
    backbone.eval()

    def encoder(inputs: Tensor) -> Tensor:
        with torch.no_grad(), fabric.autocast():
            return backbone(inputs).flatten(1).float()

    def encoded(samples: Any) -> Batch:
        stored = ordered_batches(samples, batch_size, workers)
        return encode(encoder, stored, images.views.plain, fabric.device)

    own = range(ranks.rank(), len(images.held_out), ranks.size())
    test, test_labels = encoded(Subset(images.held_out, own))
    if cached:
        batches = partial(_cached_batches, *encoded(images.train), batch)
    else:
        batches = partial(_augmented_batches, encoder, images, batch, workers, fabric.device)
    head = _new_head(test.shape[1], len(images.classes), fabric)
    first = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    head.weight.data.copy_(0.01 * first)  # as VICReg's code starts it
    optimiser = SGD(head.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    schedule = CosineAnnealingLR(optimiser, epochs)
    for epoch in range(epochs):
        for features, labels in batches(seed * epochs + epoch):
            _learn(head, optimiser, features, labels, fabric)
        schedule.step()
        if on_epoch:
            on_epoch(epoch + 1)
    with torch.inference_mode():
        return _top_accuracies(head(test), test_labels, fabric)


def _cached_batches(features: Tensor, labels: Tensor, batch: int, seed: int) -> Iterator[Batch]:
    """This rank's part of the shuffled whole batches of an epoch."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    whole = order[: len(order) // batch * batch].view(-1, batch)[:, ranks.part(batch)]
    for rows in whole.to(features.device):
        yield features[rows], labels[rows]


def _augmented_batches(
    encoder: Encoder, images: Images, batch: int, workers: int, device: torch.device, seed: int
) -> Iterator[Batch]:
    """The same of crops and flips, encoded as they come."""
    off = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0}
    crops = replace(images.views, first=replace(images.views.first, **off))
    generator = torch.Generator(device).manual_seed(seed)
    part = ranks.part(batch)
    for stored, labels in shuffled_batches(images.train, batch, seed, 0, workers, part):
        (inputs,) = crops(stored.to(device, non_blocking=True), generator, 1, 0)
        yield encoder(inputs), labels.to(device, non_blocking=True)


def _new_head(features: int, classes: int, fabric: Fabric) -> nn.Linear:
    """A linear layer of zeros; no random number is drawn."""
    head = nn.utils.skip_init(nn.Linear, features, classes, device=fabric.device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def _learn(
    head: nn.Linear, optimiser: Optimizer, features: Tensor, labels: Tensor, fabric: Fabric
) -> tuple[Tensor, Tensor]:
    """One step, of the average gradient of all ranks; the logits and the loss before it."""
    with torch.autocast(fabric.device.type, enabled=False):
        logits = head(features)
        loss = F.cross_entropy(logits, labels)
    optimiser.zero_grad()
    loss.backward()
    for parameter in head.parameters():
        parameter.grad = fabric.all_reduce(parameter.grad, reduce_op="mean")
    optimiser.step()
    return logits.detach(), loss.detach()


def _top_accuracies(logits: Tensor, labels: Tensor, fabric: Fabric) -> dict[str, float]:
    """Top-1 and, of more than five classes, top-5 accuracy over all ranks."""
    classes = logits.shape[1]
    found = {}
    for top in (1, 5) if classes > 5 else (1,):
        accuracy = _accuracy(classes, top, fabric)
        accuracy.update(logits, labels)
        found[f"top{top}"] = float(accuracy.compute())
    return found


def _accuracy(classes: int, top: int, fabric: Fabric) -> MulticlassAccuracy:
    """Counts over all ranks; without torchmetrics' checks, for which a GPU would wait."""
    metric = MulticlassAccuracy(classes, top_k=top, average="micro", validate_args=False)
    return metric.to(fabric.device)


def _check_features(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Refuse what no classifier can use."""
    sets = {"train": (train, train_labels), "test": (test, test_labels)}
    for name, (features, labels) in sets.items():
        shape = tuple(features.shape)
        _require(name, "features (N, F), N of 1 or more", shape, features.dim() == 2 and shape[0])
        expected, got = (shape[0],), tuple(labels.shape)
        _require(f"{name}_labels", f"shape {expected}", got, got == expected)
        width = train.shape[1]
        _require(name, f"{width} features, as train", shape[1], shape[1] == width)
        bad = int((~features.isfinite()).sum())
        _require(name, "finite features", f"{bad} that are not", not bad)


def _require(name: str, expected: str, got: object, holds: bool) -> None:
    """One line that names the argument, unless it is right."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}")
