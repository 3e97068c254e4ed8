"""Deployed sparse networks against dense engines, as ratios within one run.

    OMP_NUM_THREADS=1 python benchmarks/inference.py --network resnet50 --batch 1 --out results.json
    OMP_NUM_THREADS=1 python benchmarks/inference.py --network bert --tokens 128 --engines torch ort openvino
    OMP_NUM_THREADS=1 python benchmarks/inference.py --engines deepsparse --deepsparse-python PATH --masks uniform
    OMP_NUM_THREADS=1 python benchmarks/inference.py --scaling --threads 2 --sparsities 0.9 0.95

Weights are random and masks are drawn as AC/DC leaves them, more in some layers than in others: scores are normal
numbers with a deviation of fan-in^-0.35, one threshold for all layers keeps the wanted share, and the first
convolution, the classifier and the embeddings stay dense (``--masks uniform``: about the same share of each layer).
Batch norms get statistics that are not trivial. Random weights take the same time as trained ones with equal masks.

Contestants take turns, round after round, and each round gives a quotient of two of them; the median of these is how
often faster one is. On a shared machine, which is slow for a while and fast again, it means more than the
milliseconds. With one thread the clock is the process's own processor time, since a long call is interrupted by other
processes more often than a short one; with more it is the wall. Dense engines do not see the sparsity: they run once,
with the weights of the first. All results are checked against float64 before they are timed: fp32 engines to 1e-4.
``deploy`` runs without torch.compile and OpenVINO among its own rivals here: they are contestants of their own.
DeepSparse sees the sparsity too. It runs in a process of its own, of an older Python, and reads that process's clock.

``--scaling`` compares one thread with several, by the wall's clock, and with what the machine gives to as many
processes of one thread each: where its processors share cores, or other programs use them, there is no more to have.
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from inference_scaling import scaling_of
from torch import Tensor, nn

from sparsetwin.bench import Clock, DeepSparse
from sparsetwin.errors import UsageError
from sparsetwin.export import export_onnx
from sparsetwin.models import build
from sparsetwin.runtime import Deployed, deploy

Run = Callable[[], Any]
Timer = Callable[[], float]  # one call: its seconds
_REDUCED = 5e-2  # relative error in bfloat16 and float16


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
    engines: tuple[Literal["torch", "compile", "ort", "openvino", "csr", "deepsparse"], ...] = ("torch",)
    """Contestants; torch is its eager mode in both layouts, csr its sparse matrices (for BERT)."""
    deepsparse_python: Path | None = None
    """Python 3.10 or older with the package deepsparse."""
    reduced_precision: bool = False
    """Also in bfloat16 and float16: deployed with the permission, against torch and OpenVINO in bfloat16."""
    scaling: bool = False
    """Time several threads against one, and no other engine."""
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
            if settings.reduced_precision:
                half, few = copy.deepcopy(last).bfloat16(), images.bfloat16()
                found["torch bfloat16 channels_last"] = lambda: half(few)
        elif settings.reduced_precision:
            half = copy.deepcopy(model).bfloat16()
            found["torch bfloat16"] = lambda: half(*inputs)
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
            hints = {"INFERENCE_NUM_THREADS": settings.threads, "NUM_STREAMS": 1}
            for kind, shown in (("f32", ""), ("bf16", " bfloat16"))[: 1 + settings.reduced_precision]:
                engine = openvino.Core().compile_model(path, "CPU", {**hints, "INFERENCE_PRECISION_HINT": kind})
                request = engine.create_infer_request()
                name = f"openvino {openvino.__version__.split('-')[0]}{shown}"
                found[name] = lambda request=request: torch.from_numpy(next(iter(request.infer(numpy_inputs).values())))
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


def deepsparse_engine(twin: nn.Module, inputs: tuple[Tensor, ...], settings: Settings, stack: ExitStack) -> DeepSparse:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    assert settings.deepsparse_python is not None, "deepsparse needs --deepsparse-python PATH"
    export_onnx(twin, inputs, path=folder / "model.onnx")
    engine = DeepSparse(
        settings.deepsparse_python, folder / "model.onnx", inputs=inputs, folder=folder, threads=settings.threads
    )
    stack.callback(engine.close)
    return engine


def timed(run: Run, settings: Settings) -> Timer:
    clock = time.process_time if settings.threads == 1 else time.perf_counter

    def seconds() -> float:
        started = clock()
        run()
        return clock() - started

    return seconds


def race(contestants: dict[str, Timer], settings: Settings) -> dict[str, list[float]]:
    """Return every contestant's seconds, round by round; they take turns, in reversed order every other round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(-1, settings.rounds):
        for name in names:
            found = contestants[name]()
            if number >= 0:
                seconds[name].append(found)
        names.reverse()
    return seconds


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


def report_of(settings: Settings) -> dict[str, Any]:
    shown = {**asdict(settings), "packages": None, "out": None, "deepsparse_python": None}
    return {"settings": shown, "machine": machine(), "results": {}, "plans": {}}


def write(report: dict[str, Any], out: Path | None) -> None:
    """Write a report as JSON, if there is a place for it."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def rivals_of(name: str, seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the seconds of what a contestant is compared with: dense engines, and DeepSparse on the same network."""
    mine = name.rsplit(" ", 1)[-1]
    return {
        other.removesuffix(f" {mine}") if "%" in other else other: found
        for other, found in seconds.items()
        if "%" not in other or ("DeepSparse" in other and other.endswith(f" {mine}"))
    }


def quartiles(rivals: list[float], mine: list[float]) -> list[float]:
    """Return the median and the quartiles of the rounds' quotients."""
    quotients = [other / own for other, own in zip(rivals, mine, strict=True)]
    low, median, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return [round(number, 3) for number in (median, low, high)]


def show(seconds: dict[str, list[float]], errors: dict[str, float], report: dict[str, Any]) -> None:
    for name, found in seconds.items():
        faster = {other: quartiles(theirs, found) for other, theirs in rivals_of(name, seconds).items()}
        cells = "  ".join(f"{ratio:.2f} x {other}" for other, (ratio, *_) in faster.items() if other not in name)
        median, least, most = (1e3 * of(found) for of in (statistics.median, min, max))
        print(f"{name:<28}{median:>9.2f} ms {least:>9.2f} to {most:.2f}  {cells}")
        report["results"][name] = {
            "median_ms": round(median, 3),
            "rounds_ms": [round(1e3 * one, 3) for one in found],
            "relative_error": errors.get(name),
            "times_faster_than": {other: ratios[0] for other, ratios in faster.items()},
            "quartiles": {other: ratios[1:] for other, ratios in faster.items()},
        }


def compare(settings: Settings, stack: ExitStack) -> dict[str, Any]:
    """Time deployed networks against other engines."""
    model, inputs, layers = networks(settings)
    names = {id(module): name for name, module in model.named_modules()}
    contestants: dict[str, Timer] = {}
    report, errors = report_of(settings), dict[str, float]()
    for sparsity in settings.sparsities:
        twin = pruned(model, layers, sparsity, settings)
        expected = twin.double()(*[x.double() if x.is_floating_point() else x for x in inputs])
        twin.float()
        if not contestants:
            for name, run in dense_engines(twin, inputs, settings).items():
                contestants[name], errors[name] = timed(run, settings), error(run(), expected)
        for reduced in (False, True)[: 1 + settings.reduced_precision]:
            deployed: Deployed = deploy(
                twin, inputs, threads=settings.threads, rivals=(), allow_reduced_precision=reduced
            )
            name = f"sparsetwin {'reduced ' if reduced else ''}{sparsity:.0%}"
            contestants[name] = timed(lambda deployed=deployed: deployed(*inputs), settings)
            errors[name] = error(deployed(*inputs), expected)
            assert errors[name] <= (_REDUCED if reduced else 1e-5), f"{name}: relative error {errors[name]:.1e}"
            report["plans"][name] = deployed.plan.to_json()
            print(f"{name}: {deployed.plan.engine}, deployed", flush=True)
        if "csr" in settings.engines:
            sparse = csr_network(twin, [names[id(layer)] for layer in layers])
            contestants[f"torch CSR {sparsity:.0%}"] = timed(lambda sparse=sparse: sparse(*inputs), settings)
        if "deepsparse" in settings.engines:
            try:
                engine = deepsparse_engine(twin, inputs, settings, stack)
            except UsageError as failure:
                report.setdefault("failed", {})[f"DeepSparse {sparsity:.0%}"] = str(failure)
                print(f"DeepSparse {sparsity:.0%}: {failure}", flush=True)
                continue
            name = f"DeepSparse {engine.version} {sparsity:.0%}"
            clock: Clock = "processor" if settings.threads == 1 else "wall"
            contestants[name] = lambda engine=engine, clock=clock: engine.seconds(1, clock=clock)[0]
            errors[name] = error(engine.output, expected)
            report.setdefault("own_kernels", {})[name] = round(engine.own, 4)
            print(f"{name}: {engine.own:.1%} of operations in its own kernels", flush=True)
    for name, found in errors.items():
        bound = _REDUCED if "bfloat16" in name or "reduced" in name else 1e-4
        assert found <= bound, f"{name}: relative error {found:.1e}"
    show(race(contestants, settings), errors, report)
    return report


def scale(settings: Settings, stack: ExitStack) -> dict[str, Any]:
    """Time several threads against one, and against as many processes of one thread."""
    assert settings.threads > 1, "--scaling needs --threads of 2 or more"
    model, inputs, layers = networks(settings)
    report = report_of(settings)
    for sparsity in settings.sparsities:
        twin, name = pruned(model, layers, sparsity, settings), f"sparsetwin {sparsity:.0%}"
        found = scaling_of(twin, inputs, threads=settings.threads, rounds=settings.rounds, stack=stack)
        report["results"][name], report["plans"][name] = found.results, found.plans
        print(name, {key: value for key, value in found.results.items() if key != "rounds"}, flush=True)
    return report


@torch.no_grad()
def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    if settings.packages is not None:
        sys.path.append(str(settings.packages))
    with ExitStack() as stack:
        write(scale(settings, stack) if settings.scaling else compare(settings, stack), settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
