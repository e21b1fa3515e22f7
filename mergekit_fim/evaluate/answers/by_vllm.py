"""A model and prompts -> completions by vLLM, in this process. One engine serves all models of one shape."""

import contextlib
import dataclasses
import gc
import os
import re
import zlib
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from huggingface_hub import snapshot_download
from mergekit.options import MergeOptions

from mergekit_fim.errors import FimError, require
from mergekit_fim.evaluate.answers.engine import Decoding, ModelFiles
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.answers.tokens import Reader, stop_tokens
from mergekit_fim.evaluate.records import Completion
from mergekit_fim.files import available_memory
from mergekit_fim.models.checkpoint import explained

if TYPE_CHECKING:
    import vllm

# Options of vLLM's that would change what an answer is, or that follow from the sweep.
_OURS = {"model", "tokenizer", "revision", "dtype", "seed", "generation_config", "skip_tokenizer_init"}
_OURS |= {"max_num_seqs", "trust_remote_code"}
# What a launcher tells its processes: vLLM starts processes of its own, and would take these for theirs.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OLDEST = (0, 32)
# What of a config says nothing of the shape.
_NO_SHAPE = ("_name_or_path", "transformers_version", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")


class Vllm:
    """The engine for many answers."""

    def __init__(
        self, options: MergeOptions, dtype: torch.dtype, batch: int | None, arguments: Mapping[str, Any]
    ) -> None:
        """Take the merge's options, what models run in, answers at a time, and further options of vLLM's."""
        self._options, self._dtype, self._arguments = options, str(dtype).removeprefix("torch."), dict(arguments)
        self._batch = {"max_num_seqs": batch} if batch else {}
        self._shape: dict[str, Any] | None = None
        self._llm: vllm.LLM | None = None
        self._reader: Reader | None = None

    def open(self, files: ModelFiles) -> dict[str, Any]:
        """See `Engine`: swap the weights in where the model's shape is that of the one before."""
        path, trust = files.path, self._options.trust_remote_code
        with explained(f"{files.name}: expected a model that can be loaded, found none", "download or save it again"):
            if not os.path.isdir(path):
                path = snapshot_download(path, revision=files.revision, cache_dir=self._options.transformers_cache)
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust)
        check_known(files.name, config)
        from vllm.platforms import current_platform

        shape = {name: value for name, value in config.to_dict().items() if name not in _NO_SHAPE}
        what = f"{files.name}: expected a model that vLLM can load with these options, found none"
        hidden = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
        try:
            with explained(what, "change --engine-args, or pass --engine transformers"):
                if self._llm is None or shape != self._shape:
                    if self._llm is not None:
                        self._end()
                    self._llm, self._shape = self._started(path), shape
                else:
                    self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
                    self._llm.reset_prefix_cache()
        except FimError:
            self._end()
            raise
        finally:
            os.environ.update(hidden)
        text = config.get_text_config()
        configs = [config, text]
        with contextlib.suppress(OSError):  # there is no such file
            configs.append(transformers.GenerationConfig.from_pretrained(path))
        context = self._llm.llm_engine.model_config.max_model_len
        stop = stop_tokens(configs, files.tokenizer)
        self._reader = Reader(files.name, files.tokenizer, stop, context, text.vocab_size)
        return {
            "engine": {"name": "vllm", "version": _vllm().__version__, "options": self._arguments},
            "device": current_platform.device_type,
            "dtype": f"torch.{self._dtype}",
            "stop": list(stop),
        }

    def answers(self, prompts: Sequence[Prompt], decoding: Decoding) -> Generator[tuple[Prompt, Completion]]:
        """See `Engine`."""
        assert self._llm is not None
        assert self._reader is not None
        read = {str(number): (prompt, self._reader.ids(prompt)) for number, prompt in enumerate(prompts)}
        return _answers(self._llm, self._reader, read, decoding)

    def close(self) -> None:
        """Keep the engine, which the next model's weights go into."""

    def _started(self, path: str) -> "vllm.LLM":
        llm = _vllm().LLM
        from vllm.platforms import current_platform

        defaults = {"disable_log_stats": True, "use_tqdm_on_load": False, **self._batch}
        if current_platform.is_cpu():
            defaults["enforce_eager"] = True  # compiling costs more than it gains
            if "gpu_memory_utilization" not in self._arguments:  # a share of all memory, and an error if it isn't free
                defaults["kv_cache_memory_bytes"] = available_memory() // 2
        return llm(
            model=path,
            dtype=self._dtype,
            seed=0,
            generation_config="vllm",
            skip_tokenizer_init=True,
            trust_remote_code=self._options.trust_remote_code,
            **defaults | self._arguments,
        )

    def _end(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm = self._shape = None
        gc.collect()
        cleanup_dist_env_and_memory()


def _answers(
    llm: "vllm.LLM", reader: Reader, read: Mapping[str, tuple[Prompt, list[int]]], decoding: Decoding
) -> Generator[tuple[Prompt, Completion]]:
    """Let the engine answer what was read, by numbers."""
    engine, left = llm.llm_engine, set(read)
    what = f"{reader.name}: expected answers by vLLM, found that it failed"
    remedy = (
        "check the model's weights, --engine-args and memory, or pass --engine transformers: the answers so far are "
        "kept, and the same command goes on"
    )
    try:
        with explained(what, remedy):
            for number, (prompt, ids) in read.items():
                parameters = _vllm().SamplingParams(
                    max_tokens=reader.room(ids, decoding.max_tokens),
                    temperature=decoding.temperature,
                    seed=zlib.crc32(repr((decoding.seed, *prompt.key)).encode()),
                    stop_token_ids=list(reader.stop),
                    detokenize=False,
                )
                engine.add_request(number, {"prompt_token_ids": ids}, parameters)
            while left:
                for output in engine.step():
                    if output.finished:
                        left.discard(output.request_id)
                        prompt, ids = read[output.request_id]
                        yield prompt, reader.completion(ids, output.outputs[0].token_ids)
    finally:
        with contextlib.suppress(Exception):  # it may have died
            engine.abort_request(list(left))


def check_known(name: str, config: Any) -> None:
    """Check that vLLM has a model class of its own for a config.

    Raises:
        FimError: it hasn't, or can't be used.
    """
    known = set(_vllm().ModelRegistry.get_supported_archs())
    if not any(architecture in known for architecture in config.architectures or ()):
        raise FimError(
            f"{name}: expected a model that vLLM has a class of its own for, found {config.architectures}; pass "
            "--engine transformers"
        )


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Read `NAME=VALUE,...`, options of vLLM's, whose values are as in YAML.

    Raises:
        FimError: vLLM has no such option, or the sweep sets it.
    """
    found: dict[str, Any] = {}
    if not text:
        return found
    known = {item.name for item in dataclasses.fields(_vllm().EngineArgs)}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        with contextlib.suppress(yaml.YAMLError):
            found[name] = yaml.safe_load(value)
        if not equals or name not in known or name not in found:
            raise FimError(
                f"--engine-args: expected NAME=VALUE,... of options of vLLM's EngineArgs, such as max_model_len=16384, "
                f"found {part!r}; correct it"
            )
        if name in _OURS:
            raise FimError(f"--engine-args: {name} follows from the sweep's own options; leave it out")
    return found


def _vllm() -> Any:
    """Import vLLM: in this process, where a stop ends it too, without its log, and with an error for logits of NaN."""
    require("vllm", "vllm")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_RAISE_ON_LOGIT_NANS", "1")
    what = "vllm: expected one that fits what is installed beside it, found none"
    with explained(what, "install it anew in an environment of its own, or pass --engine transformers"):
        import vllm
    version = tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:2])
    if version and version < _OLDEST:
        raise FimError(
            f"vllm: expected version 0.32 or newer, found {vllm.__version__}; upgrade it, or pass --engine transformers"
        )
    return vllm
