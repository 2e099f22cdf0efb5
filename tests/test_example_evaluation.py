"""The examples' evaluation: against oracles, on toys whose answer is known, and what it refuses."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from needed import needs
from torch import Tensor, nn
from torch.utils.data import TensorDataset

pytestmark = needs("torchvision", "rich", "sklearn", "lightning_fabric", "torchmetrics")
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = str(ROOT / "examples")
CLASSES = 8


@pytest.fixture(scope="module")
def evaluation() -> Iterator[ModuleType]:
    """The module, which imports its neighbours by plain names."""
    sys.path.insert(0, EXAMPLES)
    import evaluation

    yield evaluation
    sys.path.remove(EXAMPLES)


@pytest.fixture
def fabric() -> Any:
    from lightning_fabric import Fabric

    return Fabric(accelerator="cpu", devices=1)


def clusters(samples: int, spread: float, seed: int, features: int = 16) -> tuple[Tensor, Tensor]:
    """Samples about one direction for each class."""
    centres = torch.randn(CLASSES, features, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    noise = torch.randn(samples, features, generator=generator)
    return centres[labels] + spread * noise, labels


def toy_images(held_out: int = 83) -> SimpleNamespace:
    """8x8 images whose class is which row is bright."""
    import augment

    def samples(count: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % CLASSES
        pixels = torch.randint(40, (count, 1, 8, 8), generator=generator)
        pixels[torch.arange(count), 0, labels] += 200
        return TensorDataset(pixels.to(torch.uint8), labels)

    still = augment.Augmentation(area=(0.9, 1.0), jitter=1.0, brightness=0.9)
    return SimpleNamespace(
        train=samples(160, 1),
        held_out=samples(held_out, 2),
        classes=[str(number) for number in range(CLASSES)],
        channels=1,
        views=augment.Views(still, still, still),
    )


def literal_knn(
    train: Tensor, train_labels: Tensor, test: Tensor, k: int, temperature: float
) -> list[int]:
    """The definition, one pair at a time, in float64."""
    predictions = []
    for x in test.double():
        cosines = [float(x @ z / (x.norm() * z.norm())) for z in train.double()]
        votes = [0.0] * CLASSES
        for i in sorted(range(len(train)), key=cosines.__getitem__)[-k:]:
            votes[int(train_labels[i])] += math.exp(cosines[i] / temperature)
        predictions.append(votes.index(max(votes)))
    return predictions


def test_encode_keeps_the_order_and_leaves_tensors_to_train_on(evaluation: ModuleType) -> None:
    images = torch.arange(7 * 4, dtype=torch.uint8).view(7, 1, 2, 2)
    batches = [(images[i : i + 3], torch.arange(7)[i : i + 3]) for i in (0, 3, 6)]
    seen = []

    def encoder(x: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), x.dtype))
        return x[:, 0].half()

    features, labels = evaluation.encode(encoder, batches, lambda x: 2 * x.float(), "cpu")
    assert features.dtype == torch.float32
    assert torch.equal(features, 2 * images.flatten(1).float())
    assert labels.tolist() == list(range(7))
    assert seen == [(False, torch.float32)] * 3
    nn.Linear(4, 2)(features).sum().backward()  # an inference tensor refuses


@pytest.mark.parametrize(  # at the lowest temperature, float32's exp would overflow
    ("neighbours", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (5, 9), (20, 0.003)]
)
def test_knn_is_the_definition(
    evaluation: ModuleType, monkeypatch: pytest.MonkeyPatch, neighbours: int, temperature: float
) -> None:
    (train, labels), (test, _) = clusters(61, 1.5, 1), clusters(37, 1.5, 2)
    expected = torch.tensor(literal_knn(train, labels, test, neighbours, temperature))
    wrong = (expected + 1) % CLASSES
    monkeypatch.setattr(evaluation, "SIMILARITIES", 4 * 61)  # several chunks, the last ragged
    options = {"classes": CLASSES, "neighbours": neighbours, "temperature": temperature}
    # Scaled samples have the same cosines.
    scaled = train * torch.linspace(0.1, 9, 61).unsqueeze(1)
    assert evaluation.knn_accuracy(scaled, labels, test, expected, **options) == 1
    mixed = torch.where(torch.arange(37) < 10, expected, wrong)
    assert evaluation.knn_accuracy(scaled, labels, test, mixed, **options) == 10 / 37


def test_knn_is_that_of_scikit_learn(evaluation: ModuleType) -> None:
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (test, answers) = clusters(400, 2.0, 1, 32), clusters(300, 2.0, 2, 32)
    reference = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    expected = reference.fit(x.numpy(), y.numpy()).score(test.numpy(), answers.numpy())
    assert 0.2 < expected < 0.95
    assert evaluation.knn_accuracy(x, y, test, answers, classes=CLASSES) == expected


def test_knn_of_clusters_of_chance_and_of_few_samples(evaluation: ModuleType) -> None:
    train, labels = clusters(160, 0.05, 1)
    test, answers = clusters(80, 0.05, 2)
    assert evaluation.knn_accuracy(train, labels, test, answers, classes=CLASSES) == 1
    few = (train[:CLASSES], labels[:CLASSES])  # 8 samples, of 20 neighbours
    assert evaluation.knn_accuracy(*few, test, answers, classes=CLASSES) == 1
    generator = torch.Generator().manual_seed(3)
    random = torch.randint(CLASSES, (2000,), generator=generator)
    noise = torch.randn(4000, 16, generator=generator)
    accuracy = evaluation.knn_accuracy(noise[:2000], random, noise[2000:], random, classes=CLASSES)
    assert accuracy == pytest.approx(1 / CLASSES, abs=4 * math.sqrt(7 / 64 / 2000))


def test_logistic_regression(evaluation: ModuleType) -> None:
    train, labels = clusters(160, 0.1, 1)
    test, answers = clusters(80, 0.1, 2)
    # Standardised first: without that, these scales leave it at chance.
    scale, offset = torch.logspace(-6, 3, 16), 1e3
    accuracy = evaluation.logistic_accuracy(
        train * scale + offset * scale, labels, test * scale + offset * scale, answers
    )
    assert accuracy == 1
    wrong = (answers + (torch.arange(80) < 20)) % CLASSES
    assert evaluation.logistic_accuracy(train, labels, test, wrong) == 0.75


def test_online_probe_learns_and_leaves_the_backbone_alone(
    evaluation: ModuleType, fabric: Any
) -> None:
    x, labels = clusters(256, 0.1, 1)
    backbone = nn.Linear(16, 16)
    before = torch.random.get_rng_state()
    probe = evaluation.OnlineProbe(fabric, 16, CLASSES, lr=0.05)
    losses = [float(probe.step(backbone(x), labels)) for _ in range(40)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert backbone.weight.grad is None
    assert losses[0] == pytest.approx(math.log(CLASSES))  # it starts from zero
    assert losses[-1] < 0.1 * losses[0]
    assert 1 / CLASSES < probe.top1() < 1  # of all steps, the first ones too
    probe.step(backbone(x), labels)
    assert probe.top1() == 1
    probe.step(backbone(x), labels.roll(1))
    assert probe.top1() == 0  # it predicts before it learns


def test_online_probe_continues_from_a_checkpoint(
    evaluation: ModuleType, fabric: Any, tmp_path: Path
) -> None:
    x, labels = clusters(64, 1.0, 1)
    straight, saved, loaded = (evaluation.OnlineProbe(fabric, 16, CLASSES) for _ in "abc")
    for _ in range(3):
        straight.step(x, labels)
        saved.step(x, labels)
    fabric.save(tmp_path / "probe.ckpt", {"probe": saved})
    fabric.load(tmp_path / "probe.ckpt", {"probe": loaded})
    for probe in (straight, loaded):
        probe.step(x[:40], labels[:40])
        probe.step(x, labels)
    assert torch.equal(straight.head.weight, loaded.head.weight)
    assert straight.top1() == loaded.top1() > 0


@pytest.mark.parametrize("cached", [True, False])
def test_linear_evaluation_learns_what_the_features_have(
    evaluation: ModuleType, fabric: Any, cached: bool
) -> None:
    images, backbone, done = toy_images(), nn.Sequential(nn.Flatten(), nn.Dropout(0.9)), []
    options = {"epochs": 6, "batch_size": 32, "lr": 0.5, "cached": cached}
    found = evaluation.linear_evaluation(
        backbone.train(), images, fabric, **options, on_epoch=done.append
    )
    assert not backbone.training
    assert done == [1, 2, 3, 4, 5, 6]
    assert set(found) == {"top1", "top5"}
    assert 0.9 < found["top1"] <= found["top5"] <= 1


def test_linear_evaluation_of_a_collapsed_backbone_is_chance(
    evaluation: ModuleType, fabric: Any
) -> None:
    collapsed = nn.Sequential(nn.Flatten(), nn.Threshold(9, 1))  # ones
    images = toy_images(held_out=80)
    found = evaluation.linear_evaluation(collapsed, images, fabric, epochs=2, cached=True)
    assert found == {"top1": pytest.approx(1 / CLASSES), "top5": pytest.approx(5 / CLASSES)}


@pytest.fixture
def logits(evaluation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Those of the held-out images, of every linear evaluation."""
    seen: list[Tensor] = []
    monkeypatch.setattr(evaluation, "_top_accuracies", lambda found, *_: seen.append(found))
    return seen


def test_linear_evaluation_is_vicregs_protocol(
    evaluation: ModuleType, fabric: Any, logits: list[Tensor]
) -> None:
    images, options = toy_images(), {"epochs": 3, "lr": 0.3, "weight_decay": 0.01, "seed": 5}
    evaluation.linear_evaluation(
        nn.Flatten(), images, fabric, **options, batch_size=48, cached=True
    )
    (x, labels), (test, _) = images.train.tensors, images.held_out.tensors
    x, test = (pixels.flatten(1) / 255 for pixels in (x, test))
    weight = 0.01 * torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(5))
    weight = torch.cat([weight, torch.zeros(CLASSES, 1)], 1).requires_grad_()  # and the bias
    momentum = torch.zeros_like(weight)
    for epoch in range(3):
        order = torch.randperm(160, generator=torch.Generator().manual_seed(15 + epoch))
        for rows in order.split(48)[:3]:
            predicted = x[rows] @ weight[:, :-1].T + weight[:, -1]
            loss = nn.functional.cross_entropy(predicted, labels[rows])
            (gradient,) = torch.autograd.grad(loss, weight)
            momentum = 0.9 * momentum + gradient + 0.01 * weight.detach()
            weight.data -= 0.3 * (1 + math.cos(math.pi * epoch / 3)) / 2 * momentum
    expected = test @ weight[:, :-1].T + weight[:, -1]
    torch.testing.assert_close(logits[0], expected.detach(), rtol=1e-4, atol=1e-5)


def test_linear_evaluation_augments_reproducibly(
    evaluation: ModuleType, fabric: Any, logits: list[Tensor]
) -> None:
    for options in ({}, {}, {"cached": True}):
        evaluation.linear_evaluation(nn.Flatten(), toy_images(), fabric, epochs=1, **options)
    first, again, plain = logits
    assert torch.equal(first, again)
    assert not torch.allclose(first, plain)


def test_linear_evaluation_crops_but_leaves_colours(evaluation: ModuleType, fabric: Any) -> None:
    """The brightness of the toy's augmentation, by up to 90 %, is not for the linear protocol."""
    images = toy_images()
    images.train = TensorDataset(
        torch.full((32, 1, 8, 8), 100, dtype=torch.uint8), torch.arange(32) % CLASSES
    )
    seen, backbone = [], nn.Flatten()
    backbone.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    evaluation.linear_evaluation(backbone, images, fabric, epochs=1, batch_size=32)
    assert seen[-1].shape == (32, 1, 8, 8)
    assert seen[-1] == pytest.approx(100 / 255)


def test_top_5_is_not_of_five_classes(evaluation: ModuleType, fabric: Any) -> None:
    logits = torch.arange(6.0).expand(12, 6)  # always 5, 4, 3, 2, 1, never 0
    labels = torch.arange(12) % 6
    assert evaluation._top_accuracies(logits, labels, fabric) == {
        "top1": pytest.approx(1 / 6),
        "top5": pytest.approx(5 / 6),
    }
    five = evaluation._top_accuracies(logits[:, :5], labels.clamp(max=4), fabric)
    assert five == {"top1": pytest.approx(4 / 12)}


X, Y = torch.ones(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": X[0]}, r"train: expected features \(N, F\), N of 1 or more, got \(4,\)"),
        ({"test": X[:0], "test_labels": Y[:0]}, r"test: expected .* got \(0, 4\)"),
        ({"test": X[:, :3]}, "test: expected 4 features, as train, got 3"),
        ({"test_labels": Y[:5]}, r"test_labels: expected shape \(6,\), got \(5,\)"),
        ({"train": X.log() / 0}, "train: expected finite features, got 24 that are not"),
        ({"train_labels": Y + 1}, "train_labels: expected 0 to 2, got 1 to 3"),
        ({"test_labels": Y - 1}, "test_labels: expected 0 to 2, got -1 to 1"),
        ({"neighbours": 0}, "neighbours: expected 1 or more, got 0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
    ],
)
def test_knn_refuses(evaluation: ModuleType, changes: dict[str, Any], message: str) -> None:
    sets = {"train": X, "train_labels": Y, "test": X, "test_labels": Y} | changes
    with pytest.raises(ValueError, match=f"^{message}$"):
        evaluation.knn_accuracy(**{"classes": 3, **sets})
    if "train" in changes or "test" in changes:
        with pytest.raises(ValueError, match=f"^{message}$"):
            evaluation.logistic_accuracy(**sets)


def test_others_refuse(evaluation: ModuleType, fabric: Any) -> None:
    with pytest.raises(ValueError, match=r"^batches: expected one or more, got 0$"):
        evaluation.encode(nn.Identity(), [], nn.Identity(), "cpu")
    for wrong, features, classes in [("features", 0, 3), ("classes", 4, 1)]:
        with pytest.raises(ValueError, match=f"^{wrong}: expected . or more, got "):
            evaluation.OnlineProbe(fabric, features, classes)
    for name, value in [("epochs", 0), ("batch_size", 0), ("lr", 0.0), ("weight_decay", -1.0)]:
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}$"):
            evaluation.linear_evaluation(nn.Flatten(), toy_images(), fabric, **{name: value})
