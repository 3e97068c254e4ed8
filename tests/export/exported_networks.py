"""Pruned networks of the kinds that exporters have to take."""

import torch
from torch import Tensor, nn

from sparsetwin.masking import Masks, apply_masks_
from sparsetwin.models import MODELS


class Branches(nn.Module):
    """Convolutions with stride, groups and a residual; batch norm; two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 + 4, 5)

    def forward(self, image: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm(self.stem(image)).relu()
        features = features + self.point(self.depthwise(features))
        pooled = features.mean((2, 3))
        return self.head(torch.cat([pooled, extra], 1)), pooled


def pruned(model: nn.Module, *, density: float = 0.2, seed: int = 0) -> Masks:
    """Prune all weights of two and more axes, run batch norms off their defaults, and return the masks."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
    masks = {name: torch.rand(weight.shape, generator=generator) < density for name, weight in weights.items()}
    apply_masks_(dict(weights), masks)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return masks


def networks() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Name -> model and example inputs."""
    torch.manual_seed(0)
    return {
        "branches": (Branches(), (torch.randn(1, 3, 12, 12), torch.randn(1, 4))),
        "digits_cnn": (MODELS["digits_cnn"](num_classes=10), (torch.randn(1, 1, 8, 8),)),
        "gpt": (
            MODELS["gpt"](vocabulary=11, context=8, layers=1, heads=2, width=16),
            (torch.randint(0, 11, (2, 8)),),
        ),
    }
