"""Deployed sparse networks against dense engines, as ratios within one run.

    OMP_NUM_THREADS=1 python benchmarks/inference.py --network resnet50 --batch 1 --out results.json
    OMP_NUM_THREADS=1 python benchmarks/inference.py --network bert --tokens 128 --engines torch ort openvino

Weights are random and masks are drawn as AC/DC leaves them, more in some layers than in others: scores are normal
numbers with a deviation of fan-in^-0.35, one threshold for all layers keeps the wanted share, and the first
convolution, the classifier and the embeddings stay dense (``--masks uniform``: about the same share of each layer).
Batch norms get statistics that are not trivial. Random weights take the same time as trained ones with equal masks.

Contestants take turns, round after round, and medians are compared: on a shared machine the ratios mean more than the
milliseconds. With one thread the clock is the process's own processor time, since a long call is interrupted by other
processes more often than a short one; with more it is the wall. Dense engines do not see the sparsity: they run once,
with the weights of the first. All results are checked against float64 before they are timed: fp32 engines to 1e-4.
``deploy`` runs without torch.compile and OpenVINO among its own rivals here: they are contestants of their own.
"""

import copy
import datetime
import importlib
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from sparsetwin.models import build
from sparsetwin.runtime import Deployed, deploy

Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    network: Literal["resnet50", "bert"] = "resnet50"
    batch: int = 1
    tokens: int = 128
    """Of BERT's input."""
    size: int = 224
    """Height and width of images."""
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    masks: Literal["acdc", "uniform"] = "acdc"
    threads: int = 1
    rounds: int = 7
    engines: tuple[Literal["torch", "compile", "ort", "openvino", "csr"], ...] = ("torch",)
    """Dense contestants; torch is its eager mode in both layouts, csr its sparse matrices (for BERT)."""
    packages: Path | None = None
    """A folder with more packages, such as another environment's site-packages with onnxruntime and openvino."""
    seed: int = 0
    out: Path | None = None
    """Where the results go, as JSON."""


def networks(settings: Settings) -> tuple[nn.Module, tuple[Tensor, ...], list[nn.Module]]:
    """Return a network, its input, and the layers that are pruned."""
    torch.manual_seed(settings.seed)
    if settings.network == "resnet50":
        model = build("resnet50").eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        layers = [module for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and name != "conv1"]
        return model, (torch.randn(settings.batch, 3, settings.size, settings.size),), layers
    from transformers import BertConfig, BertModel

    class Bert(nn.Module):
        """The encoder's last hidden state, for engines that know tensors only."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(BertConfig(), add_pooling_layer=False)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden: Tensor = self.bert(tokens).last_hidden_state
            return hidden

    model = Bert().eval()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return model, (torch.randint(0, 30000, (settings.batch, settings.tokens)),), layers


def pruned(model: nn.Module, layers: list[nn.Module], sparsity: float, settings: Settings) -> nn.Module:
    """Return a copy with the weights of these layers pruned."""
    twin = copy.deepcopy(model)
    names = {id(module): name for name, module in model.named_modules()}
    chosen = [twin.get_submodule(names[id(layer)]) for layer in layers]
    generator = torch.Generator().manual_seed(settings.seed)
    spread = 0.35 if settings.masks == "acdc" else 0.0
    scores = [
        torch.randn(layer.weight.shape, generator=generator).abs() * layer.weight[0].numel() ** -spread
        for layer in chosen
    ]
    everything = torch.cat([score.reshape(-1) for score in scores])
    threshold = everything.kthvalue(max(1, round(sparsity * everything.numel()))).values
    for layer, score in zip(chosen, scores, strict=True):
        layer.weight.data *= score > threshold
    return twin


def onnx_file(model: nn.Module, inputs: tuple[Tensor, ...], folder: str) -> str:
    path = f"{folder}/model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
    return path


def dense_engines(model: nn.Module, inputs: tuple[Tensor, ...], settings: Settings) -> dict[str, Run]:
    """Return what runs the network densely, each ready and warm."""
    found: dict[str, Run] = {}
    if "torch" in settings.engines:
        found["torch eager"] = lambda: model(*inputs)
        if inputs[0].dim() == 4:
            last = copy.deepcopy(model).to(memory_format=torch.channels_last)
            images = inputs[0].to(memory_format=torch.channels_last)
            found["torch eager channels_last"] = lambda: last(images)
    if "compile" in settings.engines:
        importlib.import_module("torch._inductor.config").freezing = True  # as an option it has half the effect
        compiled = torch.compile(copy.deepcopy(model))
        found["torch.compile"] = lambda: compiled(*inputs)
    numpy_inputs = [tensor.numpy() for tensor in inputs]
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_file(model, inputs, folder) if {"ort", "openvino"} & set(settings.engines) else ""
        if "ort" in settings.engines:
            ort: Any = importlib.import_module("onnxruntime")
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            feed = {part.name: array for part, array in zip(session.get_inputs(), numpy_inputs, strict=True)}
            found[f"onnxruntime {ort.__version__}"] = lambda: torch.from_numpy(session.run(None, feed)[0])
        if "openvino" in settings.engines:
            openvino: Any = importlib.import_module("openvino")
            hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": settings.threads, "NUM_STREAMS": 1}
            engine = openvino.Core().compile_model(path, "CPU", hints)
            request = engine.create_infer_request()
            name = f"openvino {openvino.__version__.split('-')[0]}"
            found[name] = lambda: torch.from_numpy(request.infer(numpy_inputs)[engine.output(0)])
    return found


def csr_network(model: nn.Module, layers: list[str]) -> nn.Module:
    """Return a copy whose pruned linears multiply with PyTorch's sparse matrices."""
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        for name in layers:
            layer = twin.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    return twin


def race(contestants: dict[str, Run], settings: Settings) -> dict[str, list[float]]:
    """Return every contestant's seconds, sorted; they take turns, in reversed order every other round."""
    clock = time.process_time if settings.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(-1, settings.rounds):
        for name in names:
            started = clock()
            contestants[name]()
            if number >= 0:
                seconds[name].append(clock() - started)
        names.reverse()
    return {name: sorted(found) for name, found in seconds.items()}


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).abs().max() / expected.abs().max())


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "processors": len(names),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llvmlite": importlib.import_module("llvmlite").__version__,
        "date": datetime.date.today().isoformat(),
    }


@torch.no_grad()
def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    if settings.packages is not None:
        sys.path.append(str(settings.packages))
    model, inputs, layers = networks(settings)
    names = {id(module): name for name, module in model.named_modules()}
    contestants: dict[str, Run] = {}
    report: dict[str, Any] = {"settings": asdict(settings), "machine": machine(), "results": {}, "plans": {}}
    report["settings"] |= {"packages": None, "out": None}
    errors: dict[str, float] = {}
    for sparsity in settings.sparsities:
        twin = pruned(model, layers, sparsity, settings)
        expected = twin.double()(*[x.double() if x.is_floating_point() else x for x in inputs])
        twin.float()
        if not contestants:
            contestants = dense_engines(twin, inputs, settings)
            for name, run in contestants.items():
                errors[name] = error(run(), expected)
                assert errors[name] <= 1e-4, f"{name}: relative error {errors[name]:.1e}"
        deployed: Deployed = deploy(twin, inputs, threads=settings.threads, rivals=())
        name = f"sparsetwin {sparsity:.0%}"
        contestants[name] = lambda deployed=deployed: deployed(*inputs)
        errors[name] = error(deployed(*inputs), expected)
        assert errors[name] <= 1e-5, f"{name}: relative error {errors[name]:.1e}"
        if "csr" in settings.engines:
            sparse = csr_network(twin, [names[id(layer)] for layer in layers])
            contestants[f"torch CSR {sparsity:.0%}"] = lambda sparse=sparse: sparse(*inputs)
        report["plans"][name] = deployed.plan.to_json()
        print(f"{name}: {deployed.plan.engine}, deployed", flush=True)
    seconds = race(contestants, settings)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    dense = {name: found for name, found in medians.items() if "%" not in name}
    print(f"\n{'':<28}{'ms':>9}{'min':>9}{'max':>9}  " + "".join(f"{'x ' + name:>28}" for name in dense))
    for name, found in seconds.items():
        ratios = {other: dense[other] / medians[name] for other in dense}
        cells = "".join(f"{ratio:>28.2f}" for ratio in ratios.values())
        print(f"{name:<28}{1e3 * medians[name]:>9.2f}{1e3 * found[0]:>9.2f}{1e3 * found[-1]:>9.2f}  {cells}")
        report["results"][name] = {
            "median_ms": round(1e3 * medians[name], 3),
            "min_ms": round(1e3 * found[0], 3),
            "max_ms": round(1e3 * found[-1], 3),
            "relative_error": errors.get(name),
            "times_faster_than": {other: round(ratio, 3) for other, ratio in ratios.items()},
        }
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
