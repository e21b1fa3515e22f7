"""Match the names of a checkpoint's tensors with those of transformers' model, as transformers' own loader does."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

# Steps of a converter that keep entries in their order, or that mergekit does in the same way.
_PLAIN = {"Chunk", "Concatenate", "Interleave", "MergeModulelist", "Split", "SplitModulelist", "Transpose"}


@dataclass(frozen=True)
class Place:
    """Where transformers' loader puts a matrix of a checkpoint."""

    key: str  # the parameter in the model's state dict
    expert: int | None  # which matrix of the parameter, where that is a stack of them
    turned: bool  # whether the matrix is transposed there
    rows: torch.Tensor  # [row], which rows of the parameter are the matrix's
    columns: torch.Tensor  # [column], likewise


class Loading:
    """Where transformers' loader puts a checkpoint's tensors. A key is a tensor's name in the model's state dict."""

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        """Look up all the `names` of a checkpoint, for a model that may be without weights."""
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        self._converters = list(dict.fromkeys(self._by_pattern.values()))
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        sources: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names, key=dot_natural_key):
            for key in self.targets(name):
                sources[key].append(name)
        # By key, the checkpoint's tensors that it is made of, in the loader's order.
        self.sources: Mapping[str, tuple[str, ...]] = {key: tuple(parts) for key, parts in sources.items()}

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """Find the key of a checkpoint's tensor, and the pattern of its converter, None where it is loaded whole."""
        key, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if not self._expanded(key, pattern) and name in self._state:
            return name, None
        return key, pattern

    def _expanded(self, key: str, pattern: str | None) -> list[str]:
        """List the keys that the model has of all that a converter makes at once of what it calls `key`."""
        patterns = [] if pattern is None else self._by_pattern[pattern].target_patterns
        keys = (key, *(key.replace(patterns[0], other, 1) for other in patterns[1:]))
        return [key for key in keys if key in self._state]

    def targets(self, name: str) -> list[str]:
        """List the keys that a checkpoint's tensor is loaded into, whole or as a part."""
        return self._expanded(*self._renamed(name))

    def keys_of(self, name: str) -> list[str]:
        """List the keys of a tensor of mergekit's definition, which names it as the checkpoint or as the model does."""
        return [key for key in dict.fromkeys((name, *self.targets(name))) if key in self._state]

    def is_whole(self, name: str) -> bool:
        """Tell whether a checkpoint's tensor is loaded as it is, under its own name or another one."""
        return self._renamed(name)[1] is None

    def is_reordered(self, key: str) -> bool:
        """Tell whether entries change their places, by a rule that mergekit's own conversion leaves out silently."""
        _, pattern = self._renamed(next(iter(self.sources.get(key, ())), ""))
        operations = self._by_pattern[pattern].operations if pattern is not None else ()
        return any(type(operation).__name__ not in _PLAIN for operation in operations)

    def loaded(self, names: Iterable[str]) -> set[str]:
        """List the keys that are complete where a checkpoint holds just these tensors."""
        held = set(names)
        return {
            key
            for name in held
            for key in self.targets(name)
            if self.is_whole(name) or held.issuperset(self.sources.get(key, ()))
        }

    def read(self, key: str, load: Callable[[str], torch.Tensor]) -> torch.Tensor | None:
        """Make a tensor of the model from the checkpoint's, which `load` reads; None where it has none for the key."""
        names = self.sources.get(key, ())
        if not names:
            return None
        first, pattern = self._renamed(names[0])
        if pattern is None:
            return load(names[0])
        converter = copy.deepcopy(self._by_pattern[pattern])
        for name in names:
            converter.add_tensor(first, name, self._renamed(name)[1], load(name))  # type: ignore[arg-type]  # as saving
        made = converter.convert(first)[key]
        return made[0] if isinstance(made, list) else made

    def place(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Place | None:
        """Find where a matrix of the checkpoint is put that is loaded as a part of a parameter.

        It is found by what transformers' converters make of numbered rows, and of numbered columns; None where the
        numbers don't show it. `shapes` are those of the checkpoint's tensors.
        """
        keys = self.targets(name)
        if len(keys) != 1 or any(len(shapes.get(source, ())) != 2 for source in self.sources.get(keys[0], ())):
            return None
        ends = []  # by axis of the matrix: [number along it, axis of the parameter], where the numbers went
        for axis in (0, 1):

            def numbered(source: str, axis: int = axis) -> torch.Tensor:
                numbers = torch.arange(1, shapes[source][axis] + 1)
                return (numbers if source == name else -numbers).unsqueeze(1 - axis)

            try:
                made = self.read(keys[0], numbered)
            except Exception:  # a converter that needs the values' true shape
                return None
            where = torch.zeros(0, 0) if made is None else (made > 0).nonzero()
            if made is None or made.ndim not in (2, 3) or len(where) != shapes[name][axis]:
                return None
            ends.append(where[made[tuple(where.T)].argsort()])
        # Along which axes of the parameter the rows run, and the columns. A single row or column doesn't say.
        rows, columns = ({axis for axis in (-2, -1) if len(its[:, axis].unique()) > 1} for its in ends)
        turned = -1 in rows or -2 in columns
        experts = {tuple(place) for its in ends for place in its[:, :-2].tolist()}
        if len(experts) != 1 or (turned and (-2 in rows or -1 in columns)):
            return None
        return Place(keys[0], next(iter(*experts), None), turned, ends[turned][:, -2], ends[not turned][:, -1])
