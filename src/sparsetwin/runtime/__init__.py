"""Networks with pruned weights, run by the fastest engine that was measured on this machine."""

from sparsetwin.runtime._deploy import deploy
from sparsetwin.runtime._deployed import Deployed
from sparsetwin.runtime._load import load
from sparsetwin.runtime._plan import LayerPlan, Plan

__all__ = ["Deployed", "LayerPlan", "Plan", "deploy", "load"]
