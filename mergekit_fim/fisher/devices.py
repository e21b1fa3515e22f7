"""How the accelerators that a user gave share a measurement: decided from their free memory and the model's sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# What an accelerator needs beside the weights, for activations and chunks of logits, in bytes and as a part of the
# weights. Where it turns out to be more, the measurement starts again with streamed weights.
RESERVE, RESERVED_PART = 1 << 30, 0.1


class Way(Enum):
    """What accelerators do with a base model."""

    WHOLE = "whole"
    REPLICAS = "replicas"
    SPREAD = "spread"
    STREAMED = "streamed"


@dataclass(frozen=True)
class DevicePlan:
    """What is done, by which of the devices, counted from 0; where they hold it together, which holds each block."""

    way: Way
    devices: tuple[int, ...]
    holders: tuple[int, ...] = ()

    def __str__(self) -> str:
        first, *others = self.devices
        several = f"accelerators {', '.join(map(str, (first, *others)))}"
        return {
            Way.WHOLE: f"accelerator {first} holds the base whole and measures all sequences",
            Way.REPLICAS: f"{several} hold a replica of the base each, and share the sequences",
            Way.SPREAD: f"{several} hold the base together, by a device map, and run it in turn",
            Way.STREAMED: f"accelerator {first} gets the base streamed, a decoder layer at a time",
        }[self.way]


def plan_devices(free: Sequence[int], blocks: Sequence[int], sequences: int) -> DevicePlan:
    """Choose what to do with the accelerators.

    Every device that holds the whole model has a replica and measures a share of the sequences; a single sequence needs
    one of them alone. Where none does, they hold it together, if that is possible without dividing a block; else the
    roomiest of them has it streamed.

    Args:
        free: bytes that are free on each device.
        blocks: bytes of the model's parts that can't be divided, decoder layers and others, in order.
        sequences: how many there are to measure.
    """
    rooms = [_room(size) for size in free]
    holders = [device for device, room in enumerate(rooms) if sum(blocks) <= room][: max(1, sequences)]
    if len(holders) > 1:
        return DevicePlan(Way.REPLICAS, tuple(holders))
    if holders:
        return DevicePlan(Way.WHOLE, tuple(holders))
    # As evenly as the blocks allow, so that no device's bus has much more to carry than the others'.
    for spare in (0, max(blocks) / 2, max(blocks), sum(blocks)):
        most = sum(blocks) / len(rooms) + spare
        parts = _held_together([min(its, most) for its in rooms], blocks)
        if parts is not None:
            return DevicePlan(Way.SPREAD, tuple(sorted(set(parts))), parts)
    return DevicePlan(Way.STREAMED, (max(range(len(rooms)), key=rooms.__getitem__),))


def _room(free: int) -> float:
    """Bytes of weights that a device with so much free memory may hold."""
    return (free - RESERVE) / (1 + RESERVED_PART)


def _held_together(rooms: Sequence[float], blocks: Sequence[int]) -> tuple[int, ...] | None:
    """The device of each block, where each takes the next ones that it has the room for; None where some are left."""
    parts: list[int] = []
    device, left = 0, rooms[0]
    for block in blocks:
        while block > left:
            device += 1
            if device == len(rooms):
                return None
            left = rooms[device]
        left -= block
        parts.append(device)
    return tuple(parts)
