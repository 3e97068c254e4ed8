"""Optimizers from settings."""

from torch import nn, optim
from torch.optim import Optimizer

from sparsetwin.errors import ConfigError
from sparsetwin.training.settings import OptimizerSettings


def make_optimizers(model: nn.Module, settings: OptimizerSettings) -> list[Optimizer]:
    """Return the optimizers of a model: one, or for ``muon`` two (Muon for hidden matrices, then AdamW for the rest).

    Hidden are all matrices but embeddings and the weight of the last ``nn.Linear``, which is taken for the output head.
    AdamW is the last one, which takes what a method learns beside the weights.

    Raises:
        ConfigError: If torch has no such optimizer, it refuses a setting, or the model has no hidden matrix for Muon.

    Source: Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks", for what it is to update.
    """
    try:
        return _made(model, settings)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"optimizer {settings.name}: {error}") from error


def _made(model: nn.Module, settings: OptimizerSettings) -> list[Optimizer]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr, decay = settings.lr, settings.weight_decay
    match settings.name:
        case "sgd":
            return [
                optim.SGD(parameters, lr, momentum=settings.momentum, nesterov=settings.nesterov, weight_decay=decay)
            ]
        case "adam":
            return [optim.Adam(parameters, lr, betas=settings.betas, eps=settings.eps, weight_decay=decay)]
        case "adamw":
            return [optim.AdamW(parameters, lr, betas=settings.betas, eps=settings.eps, weight_decay=decay)]
        case "nadam":
            return [optim.NAdam(parameters, lr, betas=settings.betas, eps=settings.eps, weight_decay=decay)]
        case "rmsprop":
            return [optim.RMSprop(parameters, lr, eps=settings.eps, weight_decay=decay, momentum=settings.momentum)]
        case "adagrad":
            return [optim.Adagrad(parameters, lr, weight_decay=decay)]
        case "muon":
            return _muon_and_adamw(model, settings)


def _muon_and_adamw(model: nn.Module, settings: OptimizerSettings) -> list[Optimizer]:
    if not hasattr(optim, "Muon"):
        raise ConfigError("this torch has no Muon optimizer; it came with torch 2.9")
    modules = list(model.modules())
    outer = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    outer |= {module.weight for module in [module for module in modules if isinstance(module, nn.Linear)][-1:]}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2 and parameter not in outer]
    if not matrices:
        raise ConfigError(
            "the model has no hidden matrix that Muon could update: convolutions are none, and embeddings and the "
            "last linear layer, the output head, are left to AdamW; choose another optimizer, such as sgd or adamw"
        )
    rest = [parameter for parameter in parameters if not any(parameter is matrix for matrix in matrices)]
    muon = optim.Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay, momentum=settings.momentum)
    if not rest:
        return [muon]
    adamw = optim.AdamW(rest, settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    return [muon, adamw]
