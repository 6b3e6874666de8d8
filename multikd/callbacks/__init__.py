"""Callbacks: probes and diagnostics around training; none of them trains anything."""

from multikd.callbacks.data_faults import DataFaults
from multikd.callbacks.feature_writer import FeatureWriter
from multikd.callbacks.finite import FiniteLossGuard, NonFiniteLossError
from multikd.callbacks.gradient_share import GradientShare
from multikd.callbacks.influence import InfluentialSamples
from multikd.callbacks.knn_probe import KNNProbe
from multikd.callbacks.linear_probe import LinearProbe
from multikd.callbacks.precompute import PrecomputeFeatures
from multikd.callbacks.preemption import SaveOnSignal
from multikd.callbacks.quantization_aware import QuantizationAware
from multikd.callbacks.spikes import LossSpikes
from multikd.callbacks.stalled import StallWatch
from multikd.callbacks.throughput import Throughput
from multikd.errors import PreemptedError

__all__ = [
    "DataFaults",
    "FeatureWriter",
    "FiniteLossGuard",
    "GradientShare",
    "InfluentialSamples",
    "KNNProbe",
    "LinearProbe",
    "LossSpikes",
    "NonFiniteLossError",
    "PrecomputeFeatures",
    "PreemptedError",
    "QuantizationAware",
    "SaveOnSignal",
    "StallWatch",
    "Throughput",
]
