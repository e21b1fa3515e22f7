"""Read what a model's checkpoint says of its tensors, without their values."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import safetensors
import torch
from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from transformers import PretrainedConfig

from mergekit_fim.errors import FimError, check_own_code, reason

# Keys of config.json that say where it came from or how the model is run, not what it computes.
IMMATERIAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map"}

# As safetensors and torch spell them.
_FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOAT_DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in _FLOAT_DTYPES.values()}


@dataclass(frozen=True)
class TensorHeader:
    """What a checkpoint file says of a tensor without reading its values."""

    shape: tuple[int, ...]
    dtype: str  # as the file's format spells it
    path: str  # of the file
    span: tuple[int, int] | None = None  # where its bytes begin and end in a safetensors file

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype, where it is one of floating-point numbers that can be merged."""
        return _FLOAT_DTYPES.get(self.dtype)

    @property
    def nbytes(self) -> int:
        """The size of its values, taken as bytes where they aren't floating-point numbers."""
        return math.prod(self.shape) * (self.torch_dtype.itemsize if self.torch_dtype else 1)


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises into one line that says what failed, why, and what to do.

    Raises:
        FimError: something was raised.
    """
    try:
        yield
    except FimError:
        raise
    except Exception as error:  # transformers, huggingface_hub, peft, safetensors, torch and pydantic have their own
        check_own_code(error)
        if "No space left" in str(error):
            remedy = "free some space, or write elsewhere"
        raise FimError(f"{what} ({reason(error)}); {remedy}") from error


def _opening(reference: ModelReference) -> contextlib.AbstractContextManager[None]:
    what = f"{reference}: expected the folder of a model or its name on the Hub, found none that can be opened"
    return explained(what, "check the name, or download or save the model again")


def model_config(reference: ModelReference, trust_remote_code: bool) -> PretrainedConfig:
    """Read a model's config, which names one architecture.

    Raises:
        FimError: there is none, or it is damaged.
    """
    with _opening(reference):
        config = reference.config(trust_remote_code=trust_remote_code)
        if len(config.architectures or ()) != 1:
            raise ValueError(f"config.json names {len(config.architectures or ())} architectures, expected one")
        return config


def tensor_index(reference: ModelReference) -> ShardedTensorIndex:
    """Find a model's checkpoint, downloaded and with its adapter applied where that is needed.

    mergekit's `LoaderCache` must have been set up with the merge's options, as `run_merge` does.

    Raises:
        FimError: there is none, or it is damaged.
    """
    with _opening(reference):
        index = LoaderCache().get(reference).index
        if not all(isinstance(name, str) for pair in index.tensor_paths.items() for name in pair):
            raise ValueError("its index names something that isn't a file")
        return index


def read_headers(reference: ModelReference) -> dict[str, TensorHeader]:
    """Read what a checkpoint says of its tensors, by their names.

    Raises:
        FimError: a file is missing or damaged, or there are two sets of weights.
    """
    index = tensor_index(reference)
    files = {shard.filename for shard in index.shards}
    for single in ("model.safetensors", "pytorch_model.bin"):
        both = [os.path.exists(os.path.join(index.base_path, name)) for name in (single, f"{single}.index.json")]
        if all(both) and single not in files:
            raise FimError(
                f"{reference}: expected one set of weights, found {single} and the files of {single}.index.json: "
                "transformers loads the one, mergekit the others; remove one of them"
            )
    headers: dict[str, TensorHeader] = {}
    for shard in index.shards:
        path = os.path.join(index.base_path, shard.filename)
        if not os.path.exists(path):
            raise FimError(f"{reference}: the checkpoint's file {path} is missing; download or save the model again")
        with explained(f"{reference}: can't read {path}", "download or save the model again"):
            is_safe = path.endswith(".safetensors")
            headers |= _of_safetensors(path, shard.contained_keys) if is_safe else _of_pickle(path)
    return headers


def _of_safetensors(path: str, names: Iterable[str]) -> dict[str, TensorHeader]:
    headers = {}
    with safetensors.safe_open(path, framework="pt") as file, open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        entries = json.loads(raw.read(length))
        for name in names:
            tensor = file.get_slice(name)  # of a file that has been checked, but this doesn't say where it begins
            begin, end = (8 + length + offset for offset in entries[name]["data_offsets"])
            headers[name] = TensorHeader(tuple(tensor.get_shape()), tensor.get_dtype(), path, (begin, end))
    return headers


def _of_pickle(path: str) -> dict[str, TensorHeader]:
    tensors = torch.load(path, map_location="meta", weights_only=True)
    return {
        name: TensorHeader(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), path)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }
