"""Choose which of the user's accelerators hold a base model, by their free memory and the model's sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn

# What an accelerator needs beside the weights, for activations and chunks of logits, in bytes and as a part of the
# weights. Where it turns out to be more, the measurement starts again with streamed weights.
RESERVE, RESERVED_PART = 1 << 30, 0.1


@dataclass(frozen=True)
class DevicePlan:
    """Which devices get a base model."""

    devices: tuple[int, ...]  # counted from 0
    device_map: Mapping[str, int]  # accelerate's map of the modules; where it is empty, the model is streamed

    def __str__(self) -> str:
        if len(self.devices) > 1:
            several = ", ".join(map(str, self.devices))
            return f"accelerators {several} hold the base together, by a device map, and run it in turn"
        if self.device_map:
            return f"accelerator {self.devices[0]} holds the base whole and measures all sequences"
        return f"accelerator {self.devices[0]} gets the base streamed, a decoder layer at a time"


def plan_devices(model: nn.Module, layers: Sequence[nn.Module], free: Sequence[int]) -> DevicePlan:
    """Choose which devices hold a model, whose weights may be on the meta device.

    Several devices hold it together, in parts as even as whole decoder layers allow, even where one of them has room
    for all of it: what is read then goes over all their buses at once. Where together they lack the room, one device
    holds the model, or has it streamed. `free` is the number of bytes that are free on each device.
    """
    rooms = {device: max(0, int((size - RESERVE) / (1 + RESERVED_PART))) for device, size in enumerate(free)}
    if len(free) > 1:
        undivided = sorted({type(layer).__name__ for layer in layers})
        # Where even parts are too small for what isn't divided, each device takes as much as it has room for.
        for memory in (get_balanced_memory(model, rooms, undivided), rooms):
            try:
                device_map = infer_auto_device_map(model, memory, undivided, offload_buffers=True)
            except IndexError:  # accelerate 1.15 fails at a tied bias in a part that it has divided, as RoBERTa's
                continue
            if "disk" not in device_map.values():
                return DevicePlan(tuple(sorted(set(device_map.values()))), device_map)
    roomiest = max(rooms, key=free.__getitem__)
    size = sum(parameter.nbytes for parameter in model.parameters())
    return DevicePlan((roomiest,), {"": roomiest} if size <= rooms[roomiest] else {})
