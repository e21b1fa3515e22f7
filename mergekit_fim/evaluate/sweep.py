"""A merge config and problems -> every run's answers, and what they show. The street of this folder.

It can be stopped at any moment: answers are kept one by one, a merge is there whole or not at all, and the same command
goes on where it was.
"""

import contextlib
import io
import logging
import os
import re
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tqdm
from accelerate.utils import release_memory
from mergekit.common import ModelPath
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.answers.answering import Decoding, by_model, by_server, prompts
from mergekit_fim.evaluate.answers.generation import load_model, load_tokenizer
from mergekit_fim.evaluate.answers.prompts import Template, chat_template, file_template
from mergekit_fim.evaluate.answers.server import Server, connect
from mergekit_fim.evaluate.folder import (
    SweepFolder,
    append_answer,
    earlier_runs,
    note_run,
    opened,
    read_answers,
    write_answers,
    writing,
)
from mergekit_fim.evaluate.front.findings import Findings, find, write_findings
from mergekit_fim.evaluate.front.statistics import pareto_set
from mergekit_fim.evaluate.front.table import markdown_rows
from mergekit_fim.evaluate.problems.grading import CLOSE, OPEN
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.problems.sources import open_problems
from mergekit_fim.evaluate.records import Answer, Key, ProblemSet, Written
from mergekit_fim.evaluate.runs.families import BASE, Run, at_strength, merges, models_as_they_are, series
from mergekit_fim.evaluate.runs.refine import Point, next_strength
from mergekit_fim.evaluate.runs.varied import fine_tuned, parse_settings, spec_of
from mergekit_fim.files import write_text
from mergekit_fim.fisher.measure import dtypes
from mergekit_fim.measurements.record import versions
from mergekit_fim.models.identity import fingerprint
from mergekit_fim.models.inputs import InputModel, open_model
from mergekit_fim.prepass.measured import measured_once
from mergekit_fim.prepass.written import default_density
from mergekit_fim.processes import launched
from mergekit_fim.processes.together import in_all
from mergekit_fim.report.card import write_section
from mergekit_fim.tools.plan import plan_merge
from mergekit_fim.tools.whole import merge_whole

LOG = logging.getLogger("mergekit_fim")


@dataclass(frozen=True)
class Wanted:
    """What a sweep is to be of, beside the merge config.

    Attributes:
        problems: the sources.
        n: how many problems of each; 0 for all.
        seed: of the problems that are drawn or made, of sampling, and of the bootstrap.
        system: what the models are told before the question.
        question_field: see `open_problems`; likewise `answer_field`.
        varied: each as NAME=V1,V2,...
        refine: further merges of each method and setting, of strengths that are found.
        compare: other merge methods.
        also: further models as they are.
        template: a file in Jinja, in place of the models' chat templates.
        max_tokens: that an answer may have.
        temperature: 0 for greedy decoding.
        samples: answers to each problem.
        batch: rows, or requests to a server, at a time; None for as many as will do.
        servers: each as RUN=URL, or URL for a run more.
        server_model: the model's name there; None for the only one.
        keep: which merges to keep: none, front or all.
        margin: how much less accurate than the long model the run to keep may be.
    """

    problems: tuple[str, ...]
    n: int
    seed: int
    system: str | None
    question_field: str | None
    answer_field: str | None
    varied: tuple[str, ...]
    refine: int
    compare: tuple[str, ...]
    also: tuple[str, ...]
    template: str | None
    max_tokens: int
    temperature: float
    samples: int
    batch: int | None
    servers: tuple[str, ...]
    server_model: str | None
    keep: str
    margin: float


def sweep(config: MergeConfiguration, out: str, wanted: Wanted, options: MergeOptions) -> Findings | None:
    """Let the base, the fine-tuned models and merges answer problems, and say which merge is worth keeping.

    Args:
        config: the merge config.
        out: the folder for answers, `sweep.json`, `sweep.md` and figures; docs/sweep.md has what is in them.
        wanted: what is to be done.
        options: mergekit's, for merging and for where models run.

    Returns:
        What it shows. Of several processes that a launcher started, each answers for some of the runs, and all but the
        main one return None.

    Raises:
        FimError: something of it can't be had. What was answered by then is kept.
    """

    def part() -> Findings | None:
        return _sweep(config, out, wanted, launched.options_of_process(options))

    return launched.by_all(part, part)


def _sweep(config: MergeConfiguration, out: str, wanted: Wanted, options: MergeOptions) -> Findings | None:
    _check(wanted)
    varied = parse_settings(config.merge_method, wanted.varied)
    for method in wanted.compare:
        spec_of(method)
    as_they_are = models_as_they_are(config, wanted.also)
    template = file_template(wanted.template) if wanted.template is not None else None
    LoaderCache().setup(options)
    inputs = {run.name: open_model(str(run.model), None, options) for run in as_they_are}
    launched.inputs_are_there()

    def density() -> float:
        return default_density(inputs[BASE])

    runs = [*as_they_are, *merges(config, varied, wanted.compare, density)]
    servers = _servers(wanted, [run.name for run in runs])
    runs += [Run(name) for name in servers if name not in {run.name for run in runs}]
    questions = Questions([_problems(source, wanted) for source in dict.fromkeys(wanted.problems)], wanted.samples)
    fingerprints = {name: fingerprint(model) for name, model in inputs.items()}
    identity = _identity(config, wanted, questions, template, as_they_are, fingerprints)
    tuned = [run.name for run in as_they_are if run.model in fine_tuned(config)]
    main, folder = launched.is_main(), SweepFolder(out)
    with writing(out), opened(folder, identity) if main else contextlib.nullcontext(), measured_once():
        launched.meet()  # the folder is there
        under_way = _Sweep(
            config, folder, identity, wanted, options, template, questions, inputs[BASE], fingerprints, servers, tuned
        )
        under_way.read(runs)
        under_way.check_before(runs)
        under_way.answer_all(runs)
        for _ in range(wanted.refine):
            more = [
                at_strength(config, its[0], value, density)
                for its in series(runs)
                if (value := under_way.next_strength(its)) is not None
            ]
            runs = list({run.name: run for run in [*runs, *more]}.values())
            under_way.read(runs)
            under_way.answer_all(runs)
        return under_way.conclude(runs) if main else None


def _check(wanted: Wanted) -> None:
    if not wanted.problems:
        raise FimError("--problems: expected a source of problems, found none; name one")
    for name, least in (("max_tokens", 1), ("samples", 1), ("seed", 0), ("batch", 1), ("refine", 0)):
        value = getattr(wanted, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise FimError(f"--{option}: expected a whole number of at least {least}, found {value}; change it")
    if not 0 <= wanted.temperature < float("inf"):
        raise FimError(f"--temperature: expected a finite number of at least 0, found {wanted.temperature}; change it")
    if not 0 <= wanted.margin < 1:
        raise FimError(f"--margin: expected a number of at least 0 and below 1, found {wanted.margin}; change it")
    if wanted.samples > 1 and wanted.temperature == 0:
        raise FimError(
            f"--samples: {wanted.samples} answers by greedy decoding would be the same; set a --temperature above 0"
        )


def _problems(source: str, wanted: Wanted) -> ProblemSet:
    found = open_problems(
        source,
        n=wanted.n,
        seed=wanted.seed,
        system=wanted.system,
        question_field=wanted.question_field,
        answer_field=wanted.answer_field,
    )
    for warning in found.warnings:
        LOG.warning("%s", warning)
    if len(found.ungradable) == len(found.problems):
        why = next(iter(found.ungradable.values()))
        raise FimError(f"{source}: expected problems that can be graded, found none ({why}); change their answers")
    return found


def _servers(wanted: Wanted, runs: Sequence[str]) -> dict[str, Server]:
    """The servers by the runs that they answer for."""
    found: dict[str, Server] = {}
    for text in wanted.servers:
        match = re.fullmatch(r"(?:(?P<run>.*?)=)?(?P<url>[A-Za-z]+://.*)", text, re.DOTALL)
        run, url = (match["run"], match["url"]) if match else (None, text)
        if run is not None and run not in runs:
            raise FimError(f"--server: expected one of the runs {', '.join(runs)}, found {run}; correct it")
        server = connect(url, wanted.server_model)
        name = run if run is not None else os.path.basename(server.model) or server.model
        if name in found or (run is None and name in runs):
            raise FimError(f"--server: {name} is answered by another already; write RUN={server.url} with another run")
        found[name] = server
    return found


def _identity(
    config: MergeConfiguration,
    wanted: Wanted,
    questions: Questions,
    template: Template | None,
    as_they_are: Sequence[Run],
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    """What must be the same for answers to be of the same sweep."""
    own = config.referenced_models()
    parameters = {name: value for name, value in (config.parameters or {}).items() if name != "fisher_cache"}
    return {
        "config": config.model_copy(update={"parameters": parameters or None}).to_yaml(),
        "models": {str(run.model): fingerprints[run.name] for run in as_they_are if run.model in own},
        "problems": [
            {"source": s.source, "problems": len(s.problems), "n": wanted.n, **s.description}
            for s in questions.problem_sets
        ],
        "system": wanted.system,
        "question_field": wanted.question_field,
        "answer_field": wanted.answer_field,
        "template": None if template is None else template.record | {"text": template.text},
        "seed": wanted.seed,
        "max_tokens": wanted.max_tokens,
        "temperature": wanted.temperature,
        "samples": wanted.samples,
    }


class _Sweep:
    """A sweep under way: its folder, and what is known of every run by name."""

    def __init__(
        self,
        config: MergeConfiguration,
        folder: SweepFolder,
        identity: Mapping[str, Any],
        wanted: Wanted,
        options: MergeOptions,
        template: Template | None,
        questions: Questions,
        base: InputModel,
        fingerprints: Mapping[str, str],
        servers: Mapping[str, Server],
        tuned: Sequence[str],
    ) -> None:
        self.config, self.folder, self.identity, self.wanted, self.options = config, folder, identity, wanted, options
        self.template, self.questions, self.base, self.servers = template, questions, base, servers
        self.fingerprints, self.tuned = fingerprints, tuned
        self.tokenizers: dict[str, Any] = {}
        self.decoding = Decoding(wanted.max_tokens, wanted.temperature, wanted.seed, wanted.batch)
        self.earlier: list[str] | None = None
        self.entries: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, dict[Key, Answer]] = {}

    def read(self, runs: Sequence[Run]) -> None:
        """Read what this sweep's folder says of runs, and their answers so far."""
        found = {str(entry["run"]): entry for entry in earlier_runs(self.folder, self.identity)}
        # Those of earlier commands first; then in the order of the runs, not in that of the processes that began them.
        self.earlier = list(found) if self.earlier is None else self.earlier
        names = list(dict.fromkeys([*self.earlier, *(run.name for run in runs)]))
        self.entries = {name: found[name] for name in names if name in found}
        for name in names:
            path = self.folder.answers(name)
            self.answers[name] = read_answers(path, self.questions.keys)
            if self.answers[name] and name not in self.entries:
                raise FimError(
                    f"{path}: expected answers of a run in {self.folder.record}, found some of one that isn't there; "
                    "remove the file, and the run is answered anew"
                )

    def check_before(self, runs: Sequence[Run]) -> None:
        """Find what would fail later: templates, questions, and the merge itself."""
        self.running = in_all(launched.together(), lambda: self.dtype() if launched.is_main() else None)[0]
        missing = [run for run in runs if run.name not in self.servers and not self.is_done(run.name)]
        for run in missing:
            if run.model is not None:
                prompts(self.questions, self.questions.keys, self.template_of(run, self.tokenizer(run)))
        config = next((run.config for run in missing if run.config is not None), None)
        if config is None:
            return
        if config.merge_method in METHODS:
            launched.until_shared(lambda: plan_merge(config, self.options))
        if config.tokenizer is None and config.tokenizer_source is None:
            self.warn_of_tags(runs)

    def warn_of_tags(self, runs: Sequence[Run]) -> None:
        """Warn where a merge's tokenizer, the base's, has another name for what a fine-tuned model thinks between."""
        own = self.tokenizer(next(run for run in runs if run.name == BASE))
        own_vocabulary = own.get_vocab()
        tuned = fine_tuned(self.config)
        for run in (run for run in runs if run.model in tuned):
            vocabulary = self.tokenizer(run).get_vocab()
            for tag in (OPEN, CLOSE):
                number = vocabulary.get(tag)
                if number is not None and own_vocabulary.get(tag) != number:
                    LOG.warning(
                        "merges have the base's tokenizer, in which the token that %s writes as %s is %s: their "
                        "thoughts aren't told from their answers; `tokenizer: {source: %s}` in the config gives them "
                        "that model's",
                        run.name,
                        tag,
                        own.convert_ids_to_tokens(number) or "none",
                        run.model,
                    )
                    break

    def answer_all(self, runs: Sequence[Run]) -> None:
        """Let every run answer what it hasn't answered yet, each in one of the processes."""
        launched.meet()  # all have read the same
        main, own = launched.is_main(), launched.share_of([run for run in runs if not self.is_done(run.name)])
        with launched.alone():
            for run in runs:
                if run in own or (main and self.is_done(run.name)):
                    self.answer(run)
        if launched.together() is not None:
            launched.meet()
            self.read(runs)  # what the others have answered, too

    def next_strength(self, its: Sequence[Run]) -> float | None:
        """Where one more of these merges would show most."""
        base = self.point(BASE, 0.0)
        long = max((self.point(name, 1.0) for name in self.tuned), key=lambda point: point.tokens)
        points = [self.point(run.name, run.strength or 0.0) for run in its]
        start = [base] if all(point.strength > 0 for point in points) else []
        value = next_strength([*start, *points], base, long)
        return None if value is None else round(value, 4)

    def point(self, run: str, at: float) -> Point:
        """Where a run that is of this strength came out."""
        return Point.of(at, (self.answers[run][key] for problem in self.questions.gradable() for key in problem))

    def is_done(self, run: str) -> bool:
        """Whether a run has all its answers."""
        return len(self.answers[run]) == len(self.questions.keys)

    def answer(self, run: Run) -> None:
        """Let a run answer what it hasn't answered yet."""
        if run.config is not None:
            os.makedirs(os.path.dirname(self.folder.config(run.name)), exist_ok=True)
            write_text(self.folder.config(run.name), run.config.to_yaml() + "\n")
        answers, path = self.answers[run.name], self.folder.answers(run.name)
        if not self.is_done(run.name):
            if run.config is not None and run.name not in self.servers:
                self.merged(run)  # before the bar, as mergekit has its own
            for answer in self.new_answers(run, path):
                answers[answer.source, answer.index, answer.sample] = answer
        if list(answers) != self.questions.keys:  # they are in the order in which they came
            write_answers(path, [answers[key] for key in self.questions.keys])
        self.drop_merges()

    def new_answers(self, run: Run, path: str) -> Iterator[Answer]:
        """The answers that a run hasn't given yet, each already in its file."""
        done = self.answers[run.name].values()
        tokens, right = sum(a.tokens for a in done), sum(a.correct is True for a in done)
        graded, count = sum(a.correct is not None for a in done), len(done)
        missing = [key for key in self.questions.keys if key not in self.answers[run.name]]
        written = self.written_by_server(run, missing) if run.name in self.servers else self.written(run, missing)
        bar = tqdm.tqdm(
            total=len(self.questions.keys), initial=count, desc=run.name, unit="answer", disable=self.options.quiet
        )
        with contextlib.closing(written), bar, open(path, "ab") as file:
            started = time.perf_counter()
            for its in written:
                answer = self.questions.graded(its, time.perf_counter() - started)
                append_answer(file, answer)
                yield answer
                count, tokens = count + 1, tokens + answer.tokens
                right, graded = right + (answer.correct is True), graded + (answer.correct is not None)
                accuracy = f"accuracy {right / graded:.2f}, " if graded else ""
                bar.set_postfix_str(f"{accuracy}{tokens / count:.0f} tokens", refresh=False)
                bar.update()
                started = time.perf_counter()

    def written_by_server(self, run: Run, keys: Sequence[Key]) -> Generator[Written]:
        """What a server writes."""
        server = self.servers[run.name]
        self.note(run, {"server": server.url, "model": server.model}, self.template, {})
        yield from by_server(server, self.questions, keys, self.template, self.decoding)

    def written(self, run: Run, keys: Sequence[Key]) -> Generator[Written]:
        """What a model writes here."""
        tokenizer = self.tokenizer(run)
        template = self.template_of(run, tokenizer)
        path, revision = self.path(run)
        model = load_model(run.name, path, tokenizer, self.options, self.running, revision)
        its = {"model": str(run.model)} if run.config is None else {"config": run.config.to_yaml()}
        if run.name in self.fingerprints:
            its["fingerprint"] = self.fingerprints[run.name]
        how = {"device": str(model.model.device), "dtype": str(model.model.dtype), "stop": list(model.stop)}
        self.note(run, its, template, how)
        try:
            yield from by_model(model, self.questions, keys, template, self.decoding)
        finally:
            del model
            release_memory()

    def note(self, run: Run, of: Mapping[str, str], template: Template | None, how: Mapping[str, Any]) -> None:
        """Write down what a run is of, before its first answer.

        Raises:
            FimError: it has answers of something else.
        """
        entry: dict[str, Any] = {
            "run": run.name,
            "method": run.method,
            "settings": dict(run.settings),
            "of": dict(of),
            "template": None if template is None else template.record,
            "answers": os.path.relpath(self.folder.answers(run.name), self.folder.path),
            **how,
            "versions": versions(),
        }
        old = self.entries.get(run.name, {})
        if self.answers[run.name]:
            for name in ("of", "template"):
                if old.get(name) != entry[name]:
                    raise FimError(
                        f"{self.folder.answers(run.name)}: expected answers of the same model by the same template, "
                        f"found some whose {'model' if name == 'of' else name} was {old.get(name)}, now {entry[name]}; "
                        "remove the file, and the run is answered anew"
                    )
        self.entries[run.name] = old | entry
        note_run(self.folder, self.identity, self.entries[run.name])

    # Models

    def tokenizer(self, run: Run) -> Any:
        """A run's tokenizer. Its merge has to be there for that; an adapter's is its base's."""
        if run.name not in self.tokenizers:
            its = run.model.model if run.model is not None else ModelPath(path=self.merged(run))
            self.tokenizers[run.name] = load_tokenizer(run.name, its.path, its.revision, self.options.trust_remote_code)
        return self.tokenizers[run.name]

    def template_of(self, run: Run, tokenizer: Any) -> Template:
        """By which a model here gets its questions."""
        return self.template or chat_template(run.name, tokenizer)

    def path(self, run: Run) -> tuple[str, str | None]:
        """Where a run's model is, or what it is called on the Hub, and its revision."""
        if run.model is None:
            return self.merged(run), None
        options = self.options
        whole = run.model.merged(options.lora_merge_cache, options.trust_remote_code, options.lora_merge_dtype)
        return whole.model.path, whole.model.revision

    def dtype(self) -> torch.dtype:
        """What all the models here run in: the merges' dtype, or float32 on a CPU that is slow in that."""
        known = next((entry["dtype"] for entry in self.entries.values() if "dtype" in entry), None)
        if known is None:
            return dtypes(self.base, self.config.out_dtype or self.config.dtype, self.options)[1]
        found = getattr(torch, str(known).removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise FimError(f"{self.folder.record}: expected the name of a torch dtype, found {known}; correct it")
        return found

    def merged(self, run: Run) -> str:
        """The folder of a merge, which is made unless it is there."""
        path = self.folder.model(run.name)
        if not os.path.isfile(os.path.join(path, "config.json")):
            assert run.config is not None
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # A merge that isn't kept needs no card, for which mergekit asks the Hub about names.
            card = self.options.write_model_card and self.wanted.keep != "none"
            with contextlib.redirect_stdout(io.StringIO()):  # the table of coefficients is in the merge's report
                merge_whole(run.config, None, path, self.options.model_copy(update={"write_model_card": card}))
        return path

    def drop_merges(self) -> None:
        """Remove the merges that have answered and aren't to be kept: as soon as that is clear, as they are large."""
        done = [name for name in self.answers if self.is_done(name)]
        kept = set()
        if self.wanted.keep == "all":
            kept = set(done)
        elif self.wanted.keep == "front":
            kept = {done[i] for i in np.flatnonzero(self.pareto(done))}
        for name in done:
            if name not in kept and os.path.isdir(self.folder.model(name)):
                shutil.rmtree(self.folder.model(name))
        with contextlib.suppress(OSError):  # there is none, or it isn't empty
            os.rmdir(os.path.dirname(self.folder.model("")))

    def pareto(self, runs: Sequence[str]) -> Any:
        """Which of these runs are on the Pareto set of them [run]."""
        points = [self.point(run, 0.0) for run in runs]
        return pareto_set(np.array([point.accuracy for point in points]), np.array([point.tokens for point in points]))

    # What came out

    def conclude(self, runs: Sequence[Run]) -> Findings:
        """Write down what the runs show, and keep what is to be kept."""
        named = {run.name: run for run in runs}
        done = [entry for name, entry in self.entries.items() if self.is_done(name)]
        findings = find(done, self.answers, self.questions, BASE, self.tuned, self.wanted.seed, self.wanted.margin)
        on_front = {run.run for run in findings.summary.runs if run.pareto}
        for name, run in named.items():
            if run.config is not None and (
                self.wanted.keep == "all" or (self.wanted.keep == "front" and name in on_front)
            ):
                folder = self.merged(run)
                shown = [findings.summary.base, findings.summary.long, name]
                write_section(folder, measured=markdown_rows(findings.summary, shown))
        write_findings(self.folder, self.identity, list(self.entries.values()), findings)
        return findings
