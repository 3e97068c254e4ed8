"""A network on this machine against every engine that is installed: time, spread, and whether the answers agree."""

from sparsetwin.bench._contest import bench_inference
from sparsetwin.bench._deepsparse import Clock, DeepSparse
from sparsetwin.bench._results import BenchResult, Contest, Row, write_result
from sparsetwin.bench._settings import ENGINES, PRECISIONS, BenchSettings, EngineName, Precision

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "BenchResult",
    "BenchSettings",
    "Clock",
    "Contest",
    "DeepSparse",
    "EngineName",
    "Precision",
    "Row",
    "bench_inference",
    "write_result",
]
