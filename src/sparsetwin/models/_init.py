"""Weight initialisation that the convolutional networks share."""

from torch import nn


def kaiming_convolutions_(model: nn.Module) -> None:
    """Draw every convolution's weight from a normal distribution of variance 2 / fan-out, and zero its bias.

    Batch norms and linear layers keep PyTorch's own initialisation. The numbers come from torch's global generator,
    in the order of ``model.modules()``.

    Source: He et al., 2015, arXiv 1502.01852, section 2.2.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
