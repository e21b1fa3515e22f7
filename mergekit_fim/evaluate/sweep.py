"""Merge configs and problems -> every run's answers, and what they show. The street of this folder.

It can be stopped at any moment: answers are kept one by one, a merge is there whole or not at all, and the same command
goes on where it was. Any number of the same command work on one sweep: each takes the runs that no other has.
"""

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import filelock
import numpy as np
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.answers.by_vllm import Vllm, check_known, parse_arguments
from mergekit_fim.evaluate.answers.engine import Decoding, Engine
from mergekit_fim.evaluate.answers.generation import Transformers
from mergekit_fim.evaluate.answers.prompts import file_template, prompts
from mergekit_fim.evaluate.conclusion import conclude, is_concluded, write_findings, write_logs
from mergekit_fim.evaluate.folder import SweepFolder, agreed_dtype, concluding, open_folder, taken, writing
from mergekit_fim.evaluate.front.eval_results import eval_results
from mergekit_fim.evaluate.front.findings import Findings
from mergekit_fim.evaluate.front.fronts import pareto_set
from mergekit_fim.evaluate.front.table import markdown_rows
from mergekit_fim.evaluate.models import Models, dtype_named
from mergekit_fim.evaluate.one_run import Answers, Asked, answer, whole_answers
from mergekit_fim.evaluate.problems.grading import CLOSE, OPEN
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.runs.families import Run, series
from mergekit_fim.evaluate.runs.listed import BASE, families, models_as_they_are
from mergekit_fim.evaluate.runs.refine import Point, between_ends, next_strength
from mergekit_fim.evaluate.runs.settings import fine_tuned
from mergekit_fim.evaluate.wanted import Wanted, check_options, connected, identity_of, read_questions
from mergekit_fim.files import FolderInMemory, folder_in_memory
from mergekit_fim.fisher.measure import dtypes
from mergekit_fim.models.identity import fingerprint
from mergekit_fim.models.inputs import InputModel, open_model
from mergekit_fim.prepass.measured import measured_once
from mergekit_fim.prepass.written import default_density
from mergekit_fim.processes import launched
from mergekit_fim.report.card import write_section
from mergekit_fim.tools.plan import plan_merge

LOG = logging.getLogger("mergekit_fim")

# A merge in memory and the engine's copy of it are at most so many times as large as the largest model: in float32,
# where that is in 16 bits.
_ROOM = 4
_PAUSE = 0.5  # seconds between two looks at runs that other processes have


def sweep(
    configs: Mapping[str, MergeConfiguration], out: str, wanted: Wanted, options: MergeOptions
) -> Findings | None:
    """Let the base, the fine-tuned models and merges answer problems, and say which merge is worth keeping.

    The configs are by their files; docs/sweep.md has what is in the folder `out`.

    Returns:
        What it shows; None where another process that worked on the same sweep has said so.

    Raises:
        FimError: an option, a config, a model, a problem or a server is bad. The answers so far are kept.
    """
    with launched.apart(options) as options:
        check_options(wanted)
        if wanted.keep == "none":
            options = options.model_copy(update={"write_model_card": False})  # it asks the Hub about names
        parse_arguments(wanted.engine_args)
        config = next(iter(configs.values()))
        as_they_are = models_as_they_are(config, wanted.also)
        merges = families(configs, wanted.varied, wanted.compare, lambda: default_density(inputs[BASE]))
        template = file_template(wanted.template) if wanted.template is not None else None
        inputs = _opened(as_they_are, options)
        runs = [*as_they_are, *(run for family in merges for run in family.runs())]
        servers = connected(wanted, [run.name for run in runs])
        runs += [Run(name) for name in servers if name not in {run.name for run in runs}]
        questions = read_questions(wanted)
        fingerprints = {name: fingerprint(model) for name, model in inputs.items()}
        tuned = [run for run in as_they_are if run.model in fine_tuned(config)]
        own = {str(run.model): fingerprints[run.name] for run in as_they_are if run.model in config.referenced_models()}
        folder = SweepFolder(out, identity_of(configs, wanted, questions, template, own))
        with writing(out), measured_once(), _memory(wanted, inputs.values()) as memory:
            open_folder(folder)
            since = os.stat(folder.record).st_mtime_ns
            reading = config.out_dtype or config.dtype
            dtype = agreed_dtype(folder, lambda: str(dtypes(inputs[BASE], reading, options)[1]))
            engine = _engine(wanted, inputs, options, dtype_named(folder, dtype))
            models = Models(folder, options, template, fingerprints, engine, memory)
            decoding = Decoding(wanted.max_tokens, wanted.temperature, wanted.seed, wanted.batch)
            asked = Asked(folder, questions, decoding, models, servers, wanted.mix_engines)
            _check_before(asked, runs, tuned)
            answers: dict[str, Answers] = {}
            _answer_all(asked, runs, answers, wanted.keep)
            for _ in range(wanted.refine):
                runs = list({run.name: run for run in [*runs, *_further(runs, questions, answers, tuned)]}.values())
                _answer_all(asked, runs, answers, wanted.keep)
            with concluding(folder):
                if os.stat(folder.record).st_mtime_ns != since and is_concluded(folder, runs, wanted.margin):
                    return None
                return _conclude(asked, runs, answers, [run.name for run in tuned], wanted)


def _opened(runs: Sequence[Run], options: MergeOptions) -> dict[str, InputModel]:
    """Open the models as they are, by their runs. Where adapters are merged for that, one process does it at a time."""
    LoaderCache().setup(options)
    with contextlib.ExitStack() as stack:
        if options.lora_merge_cache and any(run.model is not None and run.model.lora for run in runs):
            with writing(options.lora_merge_cache):
                os.makedirs(options.lora_merge_cache, exist_ok=True)
                stack.enter_context(filelock.FileLock(os.path.join(options.lora_merge_cache, ".lock")))
        return {run.name: open_model(str(run.model), None, options) for run in runs}


def _memory(wanted: Wanted, models: Iterable[InputModel]) -> contextlib.AbstractContextManager[FolderInMemory | None]:
    """Make a folder in memory for merges that aren't kept, unless other machines read them, too."""
    if wanted.keep != "none" or parse_arguments(wanted.engine_args).keys() & {"nnodes", "distributed_executor_backend"}:
        return contextlib.nullcontext()
    return folder_in_memory(_ROOM * max(sum(its.nbytes for its in model.headers.values()) for model in models))


def _engine(wanted: Wanted, models: Mapping[str, InputModel], options: MergeOptions, dtype: torch.dtype) -> Engine:
    """Choose what answers: unless told vLLM, where it is installed and has a class of its own for every model."""
    arguments = parse_arguments(wanted.engine_args)
    fits = wanted.engine == "vllm"
    if fits or (wanted.engine == "auto" and importlib.util.find_spec("vllm") is not None):
        try:
            for name, model in models.items():
                check_known(name, model.config)
            return Vllm(options, dtype, wanted.batch, arguments)
        except FimError as error:
            if fits:
                raise
            LOG.warning("transformers answers, though vLLM is installed: %s", error)
    if arguments:
        raise FimError("--engine-args: expected --engine vllm, whose they are, found transformers; leave them out")
    return Transformers(options, dtype)


def _check_before(asked: Asked, runs: Sequence[Run], tuned: Sequence[Run]) -> None:
    """Find what would fail later: templates, questions, and the merge itself."""
    models, questions = asked.models, asked.questions
    missing = [run for run in runs if run.name not in asked.servers and not whole_answers(asked, run.name)]
    for run in missing:
        if run.model is not None:
            prompts(questions, questions.keys, models.template_of(run))
    merges = {run.family: run.config for run in reversed(missing) if run.config is not None}
    for merge in merges.values():
        if merge.merge_method in METHODS:
            plan_merge(merge, models.options)
    if any(merge.tokenizer is None and merge.tokenizer_source is None for merge in merges.values()):
        _warn_of_tags(models, runs[0], tuned)


def _warn_of_tags(models: Models, base: Run, tuned: Sequence[Run]) -> None:
    """Warn where a merge's tokenizer, the base's, has another name for what a fine-tuned model thinks between."""
    own = models.tokenizer(base)
    for run in tuned:
        vocabulary = models.tokenizer(run).get_vocab()
        for tag in (OPEN, CLOSE):
            number = vocabulary.get(tag)
            if number is not None and own.get_vocab().get(tag) != number:
                LOG.warning(
                    "merges have the base's tokenizer, in which the token that %s writes as %s is %s: their thoughts "
                    "aren't told from their answers; `tokenizer: {source: %s}` in the config gives them that model's",
                    run.name,
                    tag,
                    own.convert_ids_to_tokens(number) or "none",
                    run.model,
                )
                break


def _answer_all(asked: Asked, runs: Sequence[Run], answers: dict[str, Answers], keep: str) -> None:
    """Let every run answer that isn't in `answers`, and add it there.

    Wait for runs that other processes have, and take over where such a process ends. Merges that aren't to be kept go
    as soon as that is clear, as they are large.
    """
    order, left, said = [run.name for run in runs], [run for run in runs if run.name not in answers], False
    while left:
        others = []
        for run in left:
            with taken(asked.folder, run.name) as free:
                if free:
                    answers[run.name] = answer(asked, run, order)
            if not free:
                others.append(run)
            elif keep != "all":
                _drop(asked, answers, keep)
        if len(others) == len(left):
            if not (said or asked.models.options.quiet):
                LOG.warning("waiting for %s, which other processes answer", ", ".join(run.name for run in others))
            said = True
            time.sleep(_PAUSE)
        left = others


def _drop(asked: Asked, answers: Mapping[str, Answers], keep: str) -> set[str]:
    """Remove the merges that have answered and aren't to be kept. Return the runs that are, of the front by now."""
    lasting = set(answers) if keep == "all" else set()
    if keep == "front":
        points = [_point(asked.questions, its, 0.0) for its in answers.values()]
        are_on = pareto_set(np.array([its.accuracy for its in points]), np.array([its.tokens for its in points]))
        lasting = {run for run, is_on in zip(answers, are_on, strict=True) if is_on}
    for name in answers.keys() - lasting:
        asked.models.drop(name)
    with contextlib.suppress(OSError):  # there is none, or it isn't empty
        os.rmdir(os.path.dirname(asked.folder.model("")))
    return lasting


def _point(questions: Questions, answers: Answers, strength: float) -> Point:
    """Tell where a run of this strength came out."""
    return Point.of(strength, (answers[key] for key in questions.gradable()))


def _further(
    runs: Sequence[Run], questions: Questions, answers: Mapping[str, Answers], tuned: Sequence[Run]
) -> Iterator[Run]:
    """Make one more merge like those that differ in their strength alone, where it would show most."""
    base = _point(questions, answers[BASE], 0.0)
    long = max((_point(questions, answers[run.name], 1.0) for run in tuned), key=lambda point: point.tokens)
    for alike in series(runs):
        points = [_point(questions, answers[run.name], run.strength or 0.0) for run in alike]
        family = alike[0].family
        assert family is not None  # of a series
        near = between_ends(family.strength, points, base, long if len(tuned) == 1 else None)
        strength = next_strength(near, base, long)
        if strength is not None:
            yield family.run({**alike[0].settings, family.strength: round(strength, 4)})


def _conclude(
    asked: Asked, runs: Sequence[Run], answers: dict[str, Answers], tuned: Sequence[str], wanted: Wanted
) -> Findings:
    """Write down what the runs show, those of earlier commands too, and keep what is to be kept."""
    findings = conclude(asked, answers, (BASE, tuned), wanted.seed, wanted.margin)
    lasting = _drop(asked, answers, wanted.keep)
    for run in runs:
        if run.config is not None and run.name in lasting:
            with taken(asked.folder, run.name, -1):
                path = asked.models.merged(run)
                shown = [findings.summary.base, findings.summary.long, run.name]
                results = eval_results(findings, run.name, asked.folder.identity["problems"])
                write_section(path, measured=markdown_rows(findings.summary, shown), results=results)
    write_findings(asked.folder, findings)
    if wanted.log is not None:
        write_logs(asked.folder, findings)
    return findings
