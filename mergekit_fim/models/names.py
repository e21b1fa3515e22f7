"""What a checkpoint calls its tensors, and what transformers' model does: as transformers' own loader has it."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

# What a converter does that keeps entries in their order, or that mergekit does likewise.
_PLAIN = {"Chunk", "Concatenate", "Interleave", "MergeModulelist", "Split", "SplitModulelist", "Transpose"}


@dataclass(frozen=True)
class Place:
    """Where transformers' loader puts a matrix of a checkpoint.

    Attributes:
        key: the parameter in the model's state dict.
        expert: which of its matrices, where it is a stack of them.
        turned: whether the matrix is transposed there.
        rows: [row], which rows of the parameter are the matrix's.
        columns: [column], likewise.
    """

    key: str
    expert: int | None
    turned: bool
    rows: torch.Tensor
    columns: torch.Tensor


class Loading:
    """Where transformers' loader puts the tensors of a checkpoint.

    Attributes:
        keys: the names in the model's state dict.
        sources: for each of them, the checkpoint's tensors that it is made of, in the loader's order.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        """Look up all the `names` of a checkpoint, for a model that may be without weights."""
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self.keys = frozenset(self._state)
        sources: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names, key=dot_natural_key):
            for key in self.targets(name):
                sources[key].append(name)
        self.sources: Mapping[str, tuple[str, ...]] = {key: tuple(found) for key, found in sources.items()}

    def _renamed(self, name: str) -> tuple[str, str | None]:
        converters = list(dict.fromkeys(self._converters.values()))
        key, pattern = rename_source_key(name, self._renamings, converters, self._prefix, self._state)
        if not self._expanded(key, pattern) and name in self.keys:
            return name, None
        return key, pattern

    def _expanded(self, key: str, pattern: str | None) -> list[str]:
        """All that a converter makes at once of what it calls `key`, or `key` itself; what the model has of it."""
        if pattern is None:
            return [key] if key in self.keys else []
        first, *others = self._converters[pattern].target_patterns
        return [k for k in (key, *(key.replace(first, other, 1) for other in others)) if k in self.keys]

    def targets(self, name: str) -> list[str]:
        """The keys that a tensor of this name in a checkpoint is loaded into, whole or as a part."""
        return self._expanded(*self._renamed(name))

    def keys_of(self, name: str) -> list[str]:
        """The keys of a tensor by mergekit's definition, which may have its name from the checkpoints or the model."""
        return [key for key in dict.fromkeys((name, *self.targets(name))) if key in self.keys]

    def is_whole(self, name: str) -> bool:
        """Whether it is loaded as it is, under its own name or another one."""
        return self._renamed(name)[1] is None

    def is_reordered(self, key: str) -> bool:
        """Whether entries change their places, by a rule that mergekit's own conversion leaves out without a word."""
        _, pattern = self._renamed(next(iter(self.sources.get(key, ())), ""))
        operations = self._converters[pattern].operations if pattern is not None else ()
        return any(type(operation).__name__ not in _PLAIN for operation in operations)

    def loaded(self, names: Iterable[str]) -> set[str]:
        """The keys that are complete where a checkpoint holds just these tensors."""
        whole: set[str] = set()
        parts: dict[str, set[str]] = defaultdict(set)
        for name in names:
            for key in self.targets(name):
                if self.is_whole(name):
                    whole.add(key)
                else:
                    parts[key].add(name)
        return whole | {key for key, found in parts.items() if found.issuperset(self.sources.get(key, ()))}

    def read(self, key: str, load: Callable[[str], torch.Tensor]) -> torch.Tensor | None:
        """A tensor as the model has it, made of the checkpoint's, or None where that has none for it.

        Args:
            key: its name in the model's state dict.
            load: reads a tensor of the checkpoint.
        """
        names = self.sources.get(key, ())
        if not names:
            return None
        if self.is_whole(names[0]):
            return load(names[0])
        first, pattern = self._renamed(names[0])
        assert pattern is not None
        converter = copy.deepcopy(self._converters[pattern])
        for name in names:
            _, own = self._renamed(name)
            assert own is not None
            converter.add_tensor(first, name, own, load(name))  # type: ignore[arg-type]  # what saving passes it
        made = converter.convert(first)[key]
        return made[0] if isinstance(made, list) else made

    def place(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Place | None:
        """Where a matrix of the checkpoint is put that is loaded as a part of a parameter; None where that isn't seen.

        It is seen by what transformers' converters make of numbered rows, and of numbered columns; `shapes` are those
        of the checkpoint's tensors.
        """
        keys = self.targets(name)
        if len(keys) != 1 or any(len(shapes.get(source, ())) != 2 for source in self.sources.get(keys[0], ())):
            return None
        found = []
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
            found.append(where[made[tuple(where.T)].argsort()])
        # Along which axis of the parameter the rows run, and the columns; those of one have no say.
        runs = [{axis for axis in (-2, -1) if len(its[:, axis].unique()) > 1} for its in found]
        turned = -1 in runs[0] or -2 in runs[1]
        experts = {tuple(place) for its in found for place in its[:, :-2].tolist()}
        if len(experts) != 1 or (turned and (-2 in runs[0] or -1 in runs[1])):
            return None
        rows, columns = (found[turned][:, -2], found[not turned][:, -1])
        return Place(keys[0], next(iter(*experts), None), turned, rows, columns)
