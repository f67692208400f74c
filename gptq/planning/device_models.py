"""Devices for which `gptq plan` estimates a run without having one: data-sheet figures, and what of them is assumed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceModel:
    """What one process of a run has. Rates are those of the data sheet times REACHED; nothing was measured."""

    memory: float  # bytes
    forward: float  # floating-point operations per second in bfloat16
    solver: float  # floating-point operations per second in float32
    network: float  # bytes per second into a process from the others
    disk: float  # bytes per second that a process reads or writes


REACHED = 0.5  # fraction of a data sheet's rate that a run is assumed to reach
# NVIDIA's data sheets: dense bfloat16 and plain float32 rates; 400 Gbit/s of network for each GPU. Disk: an assumption.
DEVICE_MODELS = {
    "h100": DeviceModel(80e9, REACHED * 989e12, REACHED * 67e12, REACHED * 50e9, 2e9),
    "h200": DeviceModel(141e9, REACHED * 989e12, REACHED * 67e12, REACHED * 50e9, 2e9),
}
