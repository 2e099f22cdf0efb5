"""What a training is set up with: its defaults, with their sources, and what it may not be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

LOSSES = ("vicreg", "visreg", "lejepa", "simsiam", "byol", "simclr", "barlow", "invariance")
# The weight of a term that is added without one; VICReg's variance has 25 times its covariance's.
ADDED = {"variance": 1.0, "covariance": 0.04, "sketch": 1.0}
PREDICTING = ("simsiam", "byol")
PRESETS = ("paper", "small")
OPTIMIZERS = ("lars", "sgd", "adamw")
PRECISIONS = ("32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
SMALL_DATA = ("digits", "fashion-mnist", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS")
SIZES = dict.fromkeys(SMALL_DATA, 28) | {"CIFAR10": 32, "CIFAR100": 32, "SVHN": 32, "STL10": 96}


class SettingsError(Exception):
    """The settings cannot be used; the message is one line: the argument, expected and got."""


@dataclass
class Settings:
    """All that a training depends on, in values that a checkpoint can hold.

    Attributes:
        data: "digits", "fashion-mnist", a torchvision data set by name, or a folder of images.
        root: Where torchvision's data sets are, or are downloaded to.
        image_size: Height and width of a global view; 0: that of the images, of files 224.
        local_size: Height and width of a local view; 0: three sevenths of ``image_size``.
        stored_size: Height and width of the images that views are cropped from; 0: one and a half
            times ``image_size`` for files. More would alias in the views, see ``augment.py``.
        limit: Use no more images than this.
        loss: One of ``LOSSES``.
        add: Terms added to it, with their weights.
        preset: Where the defaults come from, one of ``PRESETS``; None: by the data.
        arch: A torchvision ResNet, or "resnet-tiny".
        expander: Widths of the layers that make embeddings of features, joined by "-".
        predictor: Width of the predictor's hidden layer, for SimSiam and BYOL.
        global_views: Views of ``image_size`` per image.
        local_views: Smaller views per image.
        optimizer: "lars", "sgd" or "adamw".
        lr: Highest learning rate for a batch of 256; that of a batch of B is B / 256 of it.
        epochs: Passes over the images.
        warmup_epochs: Part of them, or epochs, in which the learning rate rises linearly.
        batch_size: Images of all ranks in one pass through the network; the losses' batch.
        accumulate: Such passes in one optimiser step.
        clip: Largest norm of the gradient of one step; None: not clipped.
        ema: Decay of the averaged network, rising to 1 along a cosine; 0: none.
        precision: Of the network: float32, or mixed with bfloat16 or float16. Not of the losses.
        compile: Whether ``torch.compile`` compiles the network.
        save_every: Steps between checkpoints, besides one after every epoch; None: no others.
        log_every: Steps between records; None: 64 records in all.
        eval_every: Epochs between k-NN evaluations; None: only the last.
    """

    data: str = "digits"
    root: str = "data"
    image_size: int = 0
    local_size: int = 0
    stored_size: int = 0
    limit: int | None = None
    loss: str = "vicreg"
    add: dict[str, float] = field(default_factory=dict)
    preset: str = ""
    arch: str = "resnet50"
    expander: str = "8192-8192-8192"
    predictor: int = 0
    global_views: int = 2
    local_views: int = 0
    optimizer: str = "lars"
    lr: float = 0.2
    weight_decay: float = 1e-6
    epochs: int = 100
    warmup_epochs: float = 10.0
    batch_size: int = 2048
    accumulate: int = 1
    clip: float | None = None
    ema: float = 0.0
    precision: str = "32"
    compile: bool = False
    seed: int = 0
    device: str = "auto"
    workers: int | None = None
    out: str = ""
    save_every: int | None = None
    log_every: int | None = None
    eval_every: int | None = None

    @property
    def global_batch(self) -> int:
        """Images in an optimiser step."""
        return self.batch_size * self.accumulate


# Section numbers are those of the papers on arXiv.
PAPER: dict[str, dict[str, Any]] = {
    # VICReg, 2105.04906, section 4.2: ResNet-50; three layers of 8192; LARS; weight decay 1e-6;
    # learning rate 0.2 * batch / 256; batch 2048; 10 epochs of warm-up from 0, then a cosine (here
    # to a thousandth, as the official code; the paper names 0.002). The 100 epochs are the code's
    # default; the paper's main result takes 1000.
    "vicreg": {
        "arch": "resnet50",
        "expander": "8192-8192-8192",
        "optimizer": "lars",
        "weight_decay": 1e-6,
        "lr": 0.2,
        "batch_size": 2048,
        "warmup_epochs": 10,
        "epochs": 100,
    },
    # VISReg, 2606.02572, appendix: three layers, 2048-2048-d; AdamW, weight decay 0.05; warm-up of
    # 5 epochs; gradients clipped at 1; 9e-4 at batch 512. For ViT-B: nothing is given for a ResNet.
    "visreg": {
        "expander": "2048-2048-256",
        "optimizer": "adamw",
        "weight_decay": 0.05,
        "lr": 4.5e-4,
        "batch_size": 512,
        "warmup_epochs": 5,
        "clip": 1.0,
    },
    # SimSiam, 2011.10566, section 3: SGD, learning rate 0.05 * batch / 256, weight decay 1e-4,
    # batch 512, 100 epochs, no warm-up; projector of three layers of 2048, predictor of 512. Its
    # code decays biases and norms too, and has an option to keep the predictor's rate constant.
    "simsiam": {
        "expander": "2048-2048-2048",
        "predictor": 512,
        "optimizer": "sgd",
        "weight_decay": 1e-4,
        "lr": 0.05,
        "batch_size": 512,
        "warmup_epochs": 0,
    },
    # BYOL, 2006.07733, section 3.3: LARS, learning rate 0.2 * batch / 256, weight decay 1.5e-6,
    # batch 4096, 10 epochs of warm-up; 4096-256 for projector and predictor; decay .996 to 1.
    "byol": {
        "expander": "4096-256",
        "predictor": 4096,
        "weight_decay": 1.5e-6,
        "batch_size": 4096,
        "ema": 0.996,
    },
    # SimCLR, 2002.05709, section 2: LARS, learning rate 0.3 * batch / 256, weight decay 1e-6, batch
    # 4096, 100 epochs, 10 of warm-up; two layers to 128 dimensions.
    "simclr": {"expander": "2048-128", "lr": 0.3, "batch_size": 4096},
    # Barlow Twins, 2103.03230, section 2: LARS, 0.2 * batch / 256, weight decay 1.5e-6, batch 2048.
    # The rate of 0.0048 that it has for biases and norms is not taken over.
    "barlow": {"weight_decay": 1.5e-6},
}
PAPER["lejepa"] = PAPER["visreg"]  # SIGReg's paper has no ResNet-50 at this size either
PAPER["invariance"] = PAPER["vicreg"]

# No paper's: chosen so that the small sets take minutes on two cores.
SMALL: dict[str, Any] = {
    "arch": "resnet-tiny",
    "expander": "256-256",
    "predictor": 128,
    "optimizer": "adamw",
    "weight_decay": 1e-4,
    "lr": 4e-3,
    "epochs": 6,
    "warmup_epochs": 0.6,
    "batch_size": 256,
}
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 64, "limit": 1000}

# What a resumed run may be given anew: the rest decides what the steps still to come compute.
FREE = frozenset(
    (
        *("root", "device", "workers", "compile", "out"),
        *("epochs", "warmup_epochs", "save_every", "log_every", "eval_every"),
    )
)


def defaults(given: Mapping[str, Any], quick: bool = False) -> dict[str, Any]:
    """The settings of a new run: a preset's, then ``--quick``'s, then those ``given``."""
    loss, data = given.get("loss", "vicreg"), given.get("data", "digits")
    small = data in SMALL_DATA
    preset = given.get("preset") or ("small" if small else "paper")
    chosen = asdict(Settings()) | {"preset": preset}
    if preset == "small":
        chosen |= SMALL | {"ema": PAPER["byol"]["ema"] if loss == "byol" else 0.0}
    else:
        chosen |= PAPER["vicreg"] | PAPER[loss]
    if quick:
        chosen |= QUICK
    chosen |= given
    if loss not in PREDICTING:
        chosen["predictor"] = 0
    if "warmup_epochs" not in given:
        chosen["warmup_epochs"] = min(chosen["warmup_epochs"], chosen["epochs"] / 10)
    size = chosen["image_size"] = chosen["image_size"] or SIZES.get(data, 224)
    chosen["local_size"] = chosen["local_size"] or max(8, size * 3 // 7)
    chosen["stored_size"] = chosen["stored_size"] or (size if data in SIZES else size * 3 // 2)
    name = loss + "".join(f"-{term}" for term in chosen["add"])
    chosen["out"] = chosen["out"] or f"runs/{name}-{Path(data).name}"
    return chosen


def resumed(saved: Mapping[str, Any], given: Mapping[str, Any], path: object) -> dict[str, Any]:
    """The settings of a run that continues: those ``saved``, with what of ``given`` is free.

    Raises:
        SettingsError: Something else is given, and differs from what the checkpoint has.
    """
    known = {each.name for each in fields(Settings)}
    if not isinstance(saved, Mapping) or (odd := known ^ saved.keys()):
        what = f": {', '.join(sorted(odd))}" if isinstance(saved, Mapping) else ""
        raise SettingsError(f"{path}: its settings are those of another version{what}")
    if odd := [each.name for each in fields(Settings) if not _of_kind(saved[each.name], each)]:
        raise SettingsError(f"{path}: its settings are not values of {', '.join(odd)}")
    differ = [
        f"--{key.replace('_', '-')} {saved[key]!r} (now {value!r})"
        for key, value in given.items()
        if key not in FREE and saved[key] != value
    ]
    if differ:
        raise SettingsError(f"{path} was made with other settings: {', '.join(differ)}")
    return {**saved, **given}


def _of_kind(value: object, of: Field[Any]) -> bool:
    """Whether it can be the value of a field, by the type of the field's default."""
    if of.name == "add":
        return isinstance(value, dict) and value.keys() <= ADDED.keys()
    kind = type(of.default)
    kinds = (type(None), int, float) if of.default is None else (int, float)
    return isinstance(value, kind if kind in (str, bool, int) else kinds)


def check(settings: Settings) -> None:
    """Refuse settings that no data could make right."""
    for name, known in (("loss", LOSSES), ("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
        if (value := getattr(settings, name)) not in known:
            raise SettingsError(f"--{name}: expected one of {', '.join(known)}, got {value!r}")
    if settings.batch_size < 2:
        raise SettingsError(f"--batch-size: expected 2 images or more, got {settings.batch_size}")
    if settings.global_views + settings.local_views < 2:
        raise SettingsError("--global-views and --local-views: expected 2 views or more, got 1")
    if settings.predictor < 1 and settings.loss in PREDICTING:
        raise SettingsError(f"--predictor: {settings.loss} needs one, got {settings.predictor}")
    if settings.optimizer == "lars" and not settings.weight_decay:
        raise SettingsError("--weight-decay: LARS adapts what decays; expected above 0, got 0")
    if not 0 <= settings.ema < 1:
        raise SettingsError(f"--ema: expected a decay in [0, 1), got {settings.ema}")
    if settings.warmup_epochs >= settings.epochs:
        raise SettingsError(
            f"--warmup-epochs: expected fewer than the {settings.epochs} epochs, "
            f"got {settings.warmup_epochs}"
        )
