"""Read a merge config as `mergekit-yaml` does, with errors of one line.

mergekit ignores keys that it doesn't know. Where a key stands twice, it takes the last. Here both are errors, the first
only in merges by this package's methods.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from pydantic import BaseModel, ValidationError

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.errors import FimError, brief, misfit, reason

# What `export` writes for 126 layers has some 20 kB, and PyYAML takes seconds for a megabyte.
_LARGEST_CONFIG = 1 << 20


def read_config(path: str) -> tuple[MergeConfiguration, str]:
    """Read a merge config as `mergekit-yaml` does: the config, and its text.

    Raises:
        FimError: it can't be read, isn't YAML, or isn't a merge config.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST_CONFIG + 1)
        if len(text) > _LARGEST_CONFIG:
            most = _LARGEST_CONFIG >> 20
            raise FimError(f"{path}: expected a merge config of at most {most} MB, found more; check the name")
        content = _Loader(text).get_single_data()
    except OSError as error:
        raise FimError(f"{path}: can't be read ({error.strerror or error}); check the name") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # of odd tags, numbers
        raise FimError(f"{path}: expected a merge config in YAML ({reason(error)}); correct it") from error
    return validated(content, path), text


def validated(content: Any, where: str) -> MergeConfiguration:
    """Make a merge config of `content`, whatever it is. Errors call it `where`.

    Raises:
        FimError: it isn't a merge config, or has keys that mergekit would ignore.
    """
    if isinstance(content, MergeConfiguration):
        return content
    if not isinstance(content, dict):
        raise FimError(f"{where}: expected the mapping of a merge config, found {type(content).__name__}; change it")
    try:
        config = MergeConfiguration.model_validate(content)
    except ValidationError as error:
        raise FimError(f"{where}: not a merge config: {misfit(error, content)}; change it") from error
    except Exception as error:  # the RuntimeErrors of mergekit's own checks
        raise FimError(f"{where}: not a merge config that mergekit can use ({reason(error)}); change it") from error
    if config.merge_method in METHODS:
        _check_keys(content, config, where)
    return config


class _Loader(yaml.SafeLoader):
    """Read YAML as mergekit does, but refuse a key that stands twice in one place."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag != "tag:yaml.org,2002:merge" and (key.tag, key.value) in keys:
                line = key.start_mark.line + 1
                raise ValueError(f"{brief(key.value)} stands twice in one place, again in line {line}")
            keys.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _check_keys(content: Any, parsed: Any, config: str, path: str = "") -> None:
    """Check that mergekit knows every key in a part of a config, given as YAML has it and as mergekit parsed it."""
    if isinstance(content, Mapping) and isinstance(parsed, BaseModel):
        fields = type(parsed).model_fields
        for key in (key for key in content if key not in fields):
            near = difflib.get_close_matches(str(key), fields, n=1)
            known = f"did you mean `{near[0]}`?" if near else f"mergekit knows {', '.join(fields)} there"
            where = f"in `{brief(path)}`" if path else "at the top"
            raise FimError(f"{config}: unknown key `{brief(key)}` {where}; {known}")
        parsed = vars(parsed)
    if isinstance(content, Mapping) and isinstance(parsed, Mapping):
        for name, value in content.items():
            _check_keys(value, parsed.get(name), config, f"{path}.{name}".removeprefix("."))
    elif isinstance(content, list) and isinstance(parsed, Sequence):
        for i, (value, its) in enumerate(zip(content, parsed, strict=False)):
            _check_keys(value, its, config, f"{path}[{i}]")
