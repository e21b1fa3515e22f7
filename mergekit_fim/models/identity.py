"""Identify a checkpoint by its fingerprint: the same for every copy of the weights, another one for other weights.

It is made of the checkpoint's headers and of samples of every tensor's bytes, so it costs seconds however large the
checkpoint is. docs/measurements.md says what it can miss.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mergekit_fim.measurements.record import ModelIdentity
from mergekit_fim.models.checkpoint import IMMATERIAL, TensorHeader, explained, tensor_index
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.language import is_tied

# Bytes that are read at a time, how many such blocks of a whole checkpoint, and the least of a single tensor.
_BLOCK = 4096
_BLOCKS = 1024
_LEAST = 2

# Keys of config.json that say how text is generated, not what the model computes.
_OF_GENERATION = {"bos_token_id", "eos_token_id", "pad_token_id"}


def identity(model: InputModel) -> ModelIdentity:
    """Say which model one is that a merge uses, wherever it lies.

    Raises:
        FimError: a file can't be read.
    """
    return ModelIdentity(
        str(model.reference),
        model.reference.model.revision,
        next(iter(model.config.architectures or ()), None),
        len(model.layout.layers),
        model.text_config.vocab_size,
        fingerprint(model),
    )


def fingerprint(model: InputModel) -> str:
    """Identify a model by its weights and its config, wherever they are and however they are split into files.

    Returns:
        "<weights>-<config>", two hexadecimal numbers of 32 and 16 digits. The first covers every tensor's name, dtype
        and shape, and evenly spaced blocks of its bytes, the first and the last among them; the second what config.json
        says of the computation. A tied output head counts only where it is stored with other values than the embedding.

    Raises:
        FimError: a file can't be read.
    """
    tied = _tied(model)
    total = sum(math.prod(header.shape) for name, header in model.headers.items() if name not in tied)
    digests: dict[str, bytes] = {}
    for path in {header.path for header in model.headers.values()}:
        read_tensors = _safetensors if path.endswith(".safetensors") else _pickled
        with explained(f"{model}: can't read {path}", "download or save the model again"):
            for name, values in read_tensors(path, model.headers):
                header = model.headers[name]
                digest = hashlib.sha256(f"{header.torch_dtype} {list(header.shape)}\n".encode())
                share = math.ceil(_BLOCKS * math.prod(header.shape) / max(1, total))
                for start in _starts(len(values), max(_LEAST, share)):
                    digest.update(values[start : start + _BLOCK])
                digests[name] = digest.digest()
    for head, embedding in tied.items():
        if digests[head] == digests[embedding]:
            del digests[head]
    named = "".join(f"{name} {digests[name].hex()}\n" for name in sorted(digests))
    weights = hashlib.sha256(named.encode()).hexdigest()[:32]
    return f"{weights}-{_config_digest(os.path.join(tensor_index(model.reference).base_path, 'config.json'))}"


def _tied(model: InputModel) -> dict[str, str]:
    """Find the output heads that are tied to embeddings by the config, and stored all the same, as in .bin files."""
    pairs = {
        model.stored_name(tensor, tied=False): next((n for n in tensor.tied_names if n in model.headers), None)
        for tensor in model.layout.other
        if tensor.tied_names and is_tied(model.config)
    }
    return {head: embedding for head, embedding in pairs.items() if head and embedding and head != embedding}


def _starts(size: int, blocks: int) -> list[int]:
    """Say where so many evenly spaced blocks of a tensor of `size` bytes begin; all of its blocks where it is short."""
    if size <= blocks * _BLOCK:
        return list(range(0, size, _BLOCK))
    return [(size - _BLOCK) * i // (blocks - 1) for i in range(blocks)]


def _safetensors(path: str, headers: Mapping[str, TensorHeader]) -> Iterator[tuple[str, Any]]:
    """Map a file, and yield (name, bytes) of every tensor in it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_RANDOM)  # a few blocks are read: the system is not to read on
        for name, header in headers.items():
            if header.path == path and header.span is not None:
                with memoryview(mapped) as whole, whole[slice(*header.span)] as view:
                    yield name, view


def _pickled(path: str, headers: Mapping[str, TensorHeader]) -> Iterator[tuple[str, Any]]:
    """The same of a `.bin` file, mapped where its format allows it, else read whole."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format from before torch 1.6
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    for name in headers.keys() & tensors.keys():
        yield name, tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _config_digest(path: str) -> str:
    with explained(f"{path}: can't be read", "download or save the model again"), open(path, encoding="utf-8") as file:
        config = json.load(file)
    material = {key: value for key, value in config.items() if key not in IMMATERIAL | _OF_GENERATION}
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:16]
