"""The command line: `mergekit-fim`, the same as `python -m mergekit_fim`.

Commands import what is heavy when they run, so that help and shell completion are quick.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import click
from click.core import ParameterSource

# OpenMP reads it when torch is loaded. Threads that spin while they wait take the cores that others could use.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import mergekit_fim
from mergekit_fim.config.parameters import FLOAT_DTYPES, LABELS, PARAMETERS, FisherSettings
from mergekit_fim.errors import FimError, reason
from mergekit_fim.files import REPORT_NAME, check_writable, copy_whole, write_json, write_text
from mergekit_fim.text import echo, size, wrapped

_PATH = click.Path(readable=False)  # for completion; what it must be is checked where it is read


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True})
@click.version_option(mergekit_fim.__version__, prog_name="mergekit-fim")
def main() -> None:
    """Merge coefficients from Fisher information, for mergekit's merge methods fim_ties, fim_ta and fim_kron.

    mergekit-yaml makes the merges, as ever. These commands measure a base model once, to keep or publish the result;
    show what a merge will do; write its coefficients as a config for stock mergekit; and draw and compare measurements.

    Completion, in bash and likewise in zsh and fish:

    \b
    eval "$(_MERGEKIT_FIM_COMPLETE=bash_source mergekit-fim)"
    """


class _MergekitCommand(click.Command):
    """A command that has all of mergekit-yaml's options too, and gets them as `options`, mergekit's MergeOptions."""

    @functools.cached_property
    def mergekit_params(self) -> list[click.Parameter]:
        from mergekit.options import add_merge_options

        return click.command("mergekit")(add_merge_options(lambda **_: None)).params

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """List the command's own parameters, mergekit's, and --help."""
        *own, help_option = super().get_params(ctx)
        return [*own, *self.mergekit_params, help_option]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and set threads, seeds and logging as mergekit's options say."""
        from mergekit.options import MergeOptions

        mergekit_fim.install(always=True)
        try:
            rest = super().parse_args(ctx, args)
            if not ctx.resilient_parsing:  # as for completion
                options = MergeOptions(**{name: ctx.params.pop(name) for name in MergeOptions.model_fields})
                options.apply_global_options()
                ctx.params["options"] = options
        except (click.exceptions.Exit, click.Abort):  # RuntimeErrors of click's, as after --help
            raise
        except (ValueError, RuntimeError) as error:  # of mergekit, pydantic and torch
            raise FimError(f"one of the options has a value that can't be used ({reason(error)}); change it") from error
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show mergekit's options in the sections of mergekit-yaml's help."""
        from mergekit.options import OPTION_CATEGORIES

        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(OPTION_CATEGORIES.get(parameter.name, "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _together(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Make one decorator of several, which stand in this order in the help."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_no_cache = click.option(
    "--no-cache", is_flag=True, help="Measure anew, and don't keep the measurement for the next merge."
)

_margin = click.option(
    "--margin",
    default=0.05,
    help="How much less accurate than the long model the run to keep may be, by the interval of their difference.",
)


def _config(path: str, no_cache: bool) -> tuple[Any, str]:
    """Read a merge config, and its text."""
    from mergekit_fim.config.file import read_config

    config, text = read_config(path)
    if no_cache:
        config.parameters = {**(config.parameters or {}), "fisher_cache": False}
    return config, text


_SETTINGS = tuple(field.name for field in fields(FisherSettings))


def _setting(name: str) -> Callable[..., Any]:
    """Make the option for a parameter of a measurement."""
    parameter = PARAMETERS[f"fisher_{name}"]

    def check(_context: click.Context, _option: click.Parameter, value: Any) -> Any:
        if not parameter.accepts(value):
            raise click.BadParameter(f"expected {parameter.expected}, found {value}.")
        return value

    return click.option(
        f"--{name.replace('_', '-')}",
        default=parameter.default,
        type=click.Choice(LABELS) if name == "labels" else parameter.type,
        help=f"{parameter.meaning[:1].upper()}{parameter.meaning[1:]}.",
        callback=check,
    )


# What a command needs that reads checkpoints and doesn't merge.
_loading = _together(
    click.option(
        "--dtype",
        type=click.Choice(FLOAT_DTYPES),
        help="Read the weights in this type, as a merge with this `dtype` does.  [default: the checkpoint's]",
    ),
    click.option("--cuda", is_flag=True, help="Measure on the GPU."),
    click.option("--device", help="Measure on this torch device."),
    click.option("--multi-gpu", is_flag=True, help="Spread the model over all accelerators."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    click.option("--lora-merge-cache", type=click.Path(), help="Where merged LoRA models are kept."),
    click.option("--transformers-cache", type=click.Path(), help="Where models of the Hub are kept."),
    click.option("--lazy-unpickle", is_flag=True, help="Read .bin checkpoints tensor by tensor."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bar."),
)


def _options_of_process(options: dict[str, Any], state: Any) -> Any:
    """Make mergekit's options, with the device that accelerate gave this process unless the user chose one."""
    from mergekit.options import MergeOptions

    own = "cuda" if options["cuda"] else "cpu" if state is None else str(state.device)
    quiet = options["quiet"] or (state is not None and not state.is_main_process)
    return MergeOptions(**{**options, "quiet": quiet, "device": options["device"] or own})


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)


@main.command(short_help="Measure a model's Fisher information, once.")
@click.argument("model", type=_PATH)
@click.option(
    "-o", "--output", required=True, type=click.Path(), help="The file to write: JSON, or with --factors safetensors."
)
@click.option(
    "--factors", is_flag=True, help="Record Kronecker factors instead, for fim_kron: what the linear layers are given."
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    help="With --factors: how many tokens the random ones are drawn from; for models of different vocabularies the "
    "smallest. By default this model's.",
)
@_together(*map(_setting, _SETTINGS))
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@_no_cache
@_loading
def fisher(model: str, output: str, factors: bool, no_cache: bool, **options: Any) -> None:
    """Measure the Fisher information of MODEL's decoder layers on random tokens, and write it to a file.

    With --factors, write the Kronecker factors of each linear layer instead, some numbers for each token, by default of
    2 samples as in fim_kron. MODEL is a folder or a model on the Hub, with an adapter as in mergekit: model+adapter.

    With `parameters: {fisher: FILE}` in its config, a merge uses the file and doesn't measure. Weights are read as they
    are needed: the memory of one decoder layer will do. A measurement that an earlier command or merge has kept is used
    again; --no-cache measures anew.

    Several processes share the work:

    \b
    accelerate launch --num_processes K -m mergekit_fim fisher MODEL -o FILE
    torchrun --nproc_per_node K -m mergekit_fim fisher MODEL -o FILE    (on CPUs)
    """
    from mergekit_fim.measurements.file import model_files
    from mergekit_fim.models.inputs import InputModel, open_model
    from mergekit_fim.prepass.factors import measured_factors
    from mergekit_fim.prepass.measured import measured
    from mergekit_fim.processes.together import SharedError, processes

    dtype, revision, vocab_size = map(options.pop, ("dtype", "revision", "vocab_size"))
    if vocab_size is not None and not factors:
        raise click.UsageError("--vocab-size goes with --factors")
    settings = FisherSettings(*map(options.pop, _SETTINGS))
    measure: Callable[..., Any] = measured
    if factors:
        if click.get_current_context().get_parameter_source("samples") is ParameterSource.DEFAULT:
            settings = replace(settings, samples=PARAMETERS["fisher_samples"].default_for("fim_kron"))
        measure = functools.partial(measured_factors, vocab_size=vocab_size)
    with processes() as state:
        is_main = state is None or state.is_main_process
        merge_options = _options_of_process(options, state)

        def open_base() -> InputModel:
            if is_main:
                check_writable(output, *model_files(model))
            return open_model(model, revision, merge_options)

        try:
            result = measure(open_base, settings, dtype, merge_options, cache=not no_cache, state=state)
        except SharedError:
            if is_main:
                raise
            sys.exit(1)
    if is_main:
        what = (_write_factors if factors else _write_measurement)(result, model, output)
        if not options["quiet"]:
            click.echo(f"{output}: {what}{f', {result.origin}' if result.origin else ''}")


def _write_measurement(result: Any, model: str, output: str) -> str:
    """Write a measurement, and say what it is."""
    from mergekit_fim.measurements.file import write_measurement

    write_measurement(result.measurement, output)
    fisher = result.measurement.fisher
    _warn(fisher.warnings)
    return f"{len(fisher.layers)} decoder layers of {model}, in {fisher.dtype}"


def _write_factors(result: Any, model: str, output: str) -> str:
    """Write factors, and say what they are."""
    file = result
    copy_whole(file.path, output)
    _warn(file.warnings)
    if file.not_reached:
        _warn([f"no token reached {len(file.not_reached)} tensors of experts, such as {file.not_reached[0]}"])
    return f"factors of {len(file.tensors)} tensors of {model}, in {file.settings.dtype}, {size(file.size)}"


@main.command(short_help="Show what a task vector looks like.")
@click.argument("base", type=_PATH)
@click.argument("model", type=_PATH)
@click.option("--json", "json_file", type=click.Path(), help="Write the figures as JSON, too.")
@_loading
def delta(base: str, model: str, json_file: str | None, dtype: str | None, **options: Any) -> None:
    """Measure the task vector of MODEL, what fine-tuning changed in BASE, in a minute and before any merge.

    Print, for every kind of tensor in the decoder layers, for all of them, and for what is outside: the share of exact
    zeros, the norm, the kurtosis, the share of the squared norm in the largest 2 % of the entries, and the first
    singular value beside that of noise. BASE and MODEL are folders or models on the Hub, with an adapter as in
    mergekit: model+adapter, and with a revision: user/model@revision.

    Tensors are read one after the other: memory for the largest one, of both models, will do.
    """
    from mergekit_fim.measurements.file import model_files
    from mergekit_fim.tools.delta import measure_delta, render

    check_writable(json_file, *model_files(base), *model_files(model))
    statistics = measure_delta(base, model, dtype=dtype, options=_options_of_process(options, None))
    echo(render(statistics))
    if json_file is not None:
        write_json(json_file, statistics.as_json())


@main.command(cls=_MergekitCommand, short_help="Show what a merge will do, and its coefficients.")
@click.argument("config_file", type=_PATH)
@click.option("--json", "json_file", type=click.Path(), help="Write the report that the merge would write, as JSON.")
@click.option("--plot", "figure", type=click.Path(), help="Draw the coefficients into a .png or .svg file.")
@_no_cache
def plan(config_file: str, json_file: str | None, figure: str | None, no_cache: bool, options: Any) -> None:
    """Run everything of the merge in CONFIG_FILE up to its coefficients, and merge nothing.

    Print the table that the merge prints, and what the config doesn't show: densities, gate protection, output heads,
    config keys in which the models differ, and what the merge will read, write and hold.
    """
    from mergekit_fim.report.figure import check_figure, write_figure
    from mergekit_fim.report.record import as_json
    from mergekit_fim.report.table import render
    from mergekit_fim.tools.explain import explain
    from mergekit_fim.tools.plan import resolve

    check_writable(json_file, config_file)
    check_writable(figure, config_file, json_file)
    if figure is not None:
        check_figure(figure)
    config, _ = _config(config_file, no_cache)
    planned = resolve(config, options)
    echo(render(planned.pre_pass) + explain(planned, options))
    _warn(planned.pre_pass.warnings)
    report = as_json(planned.pre_pass)
    if json_file is not None:
        write_json(json_file, report)
    if figure is not None:
        write_figure(report, config_file, figure)


@main.command(cls=_MergekitCommand, short_help="Write a merge as a config for stock mergekit.")
@click.argument("config_file", type=_PATH)
@click.option("-o", "--output", required=True, type=click.Path(), help="The YAML file to write.")
@click.option(
    "--check/--no-check",
    default=True,
    help="Merge every tensor both ways, without writing any, and say how far apart they are.",
)
@_no_cache
def export(config_file: str, output: str, check: bool, no_cache: bool, options: Any) -> None:
    """Write the merge in CONFIG_FILE as one that needs no plug-in: with mergekit's `ties` or `task_arithmetic`.

    The coefficients become filtered weights, gate protection included. Say what stock mergekit can't do the same way,
    and the largest difference of a merged tensor. That takes as long as two merges (--no-check leaves it out).
    """
    from mergekit_fim.tools import export as exporting
    from mergekit_fim.tools.plan import resolve

    check_writable(output, config_file)
    config, _ = _config(config_file, no_cache)
    exporting.check_exportable(config.merge_method)
    planned = resolve(config, options)
    stock, exported = exporting.export(planned, options)
    _warn(planned.pre_pass.warnings)
    losses = [f"not the same as {config.merge_method}: {loss}" for loss in exporting.losses(planned, exported)]
    apart = "how far apart the two merges are was not measured (--check does)"
    notes = [*losses, exporting.summary(exporting.compare(planned, exported, options)) if check else apart]
    instead = f"{stock.merge_method} in place of {config.merge_method}"
    head = [f"# {instead}, by mergekit-fim {mergekit_fim.__version__}"]
    head += [f"# {line}" for note in notes for line in wrapped(note, 100)]
    write_text(output, "\n".join([*head, stock.to_yaml()]) + "\n")
    if not options.quiet:
        click.echo(f"{output}: {instead}")
    for note in notes:
        click.echo("\n".join(wrapped(f"- {note}")), err=bool(losses))


@main.command(cls=_MergekitCommand, short_help="Merge, as mergekit-yaml does.")
@click.argument("config_file", type=_PATH)
@click.argument("out_path", type=_PATH)
@_no_cache
def merge(config_file: str, out_path: str, no_cache: bool, options: Any) -> None:
    """Do the merge in CONFIG_FILE, and write the merged model to the folder OUT_PATH.

    As mergekit-yaml, but the model is in OUT_PATH whole or not at all. It works also where Python reads no .pth files
    and mergekit-yaml doesn't know the methods: `python -S`, and installs by `pip install --target`.

    A model that is in OUT_PATH already is replaced when the new one is complete; until then both are on the disk.
    """
    from mergekit_fim.tools.whole import merge_whole

    config, text = _config(config_file, no_cache)
    merge_whole(config, text, out_path, options)


@main.command(cls=_MergekitCommand, short_help="Accuracy against length: which merge to keep.")
@click.argument("config_files", type=_PATH, nargs=-1, required=True)
@click.argument("out", type=_PATH)
@click.option(
    "--problems",
    multiple=True,
    required=True,
    metavar="SOURCE",
    help="A JSONL file of `question` and `answer`, reasoning-gym:TASK[:JSON], hf:DATASET[:CONFIG][:SPLIT], or a task "
    "of inspect_ai's, inspect:PACKAGE/TASK[:JSON] or inspect:FILE.py@TASK[:JSON]; again for several.",
)
@click.option(
    "--set",
    "varied",
    multiple=True,
    metavar="NAME=V1,V2,...",
    help="A parameter's values; again for several, of which every combination is merged.  [default: "
    "alpha_mean=0.2,0.35,0.5,0.65,0.8]",
)
@click.option(
    "--refine",
    default=0,
    metavar="N",
    help="N further merges of each method, at strengths between those where accuracy and length change most.",
)
@click.option(
    "--compare",
    multiple=True,
    metavar="METHOD",
    help="The same merges by task_arithmetic, ties or linear, too; again for several.",
)
@click.option("--also", multiple=True, metavar="MODEL", help="A further model as it is; again for several.")
@click.option("--n", default=100, help="Problems of each source; 0 for all.")
@click.option("--seed", default=0, help="Of problems, sampling and bootstrap.")
@click.option("--system", help="What the models are told before the question.")
@click.option("--question-field", metavar="NAME", help="The question's field in files and data sets.")
@click.option("--answer-field", metavar="NAME", help="The answer's field in files and data sets.")
@click.option(
    "--template",
    type=_PATH,
    metavar="FILE",
    help="A prompt in Jinja, given `question` and `system`, in place of the models' chat templates.",
)
@click.option("--max-tokens", default=1024, help="Tokens that an answer may have.")
@click.option("--temperature", default=0.0, help="0 for greedy decoding.")
@click.option("--samples", default=1, help="Answers to each problem.")
@click.option("--batch", type=int, help="Answers, or requests to a server, at a time.  [default: as many as will do]")
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="[RUN=]URL",
    help="A server in OpenAI's protocol that answers for a run, or for one more; again for several.",
)
@click.option("--server-model", metavar="NAME", help="The model's name there.  [default: the only one]")
@click.option(
    "--engine",
    type=click.Choice(("auto", "transformers", "vllm")),
    default="auto",
    help="What runs the models; auto is vLLM where it is installed and has a class of its own for each model.",
)
@click.option("--engine-args", metavar="NAME=VALUE,...", help="vLLM's own options, such as tensor_parallel_size=4.")
@click.option("--mix-engines", is_flag=True, help="Let OUT have answers of several engines, or versions of them.")
@click.option(
    "--keep",
    type=click.Choice(("none", "front", "all")),
    default="none",
    help="Which merges to keep in OUT/models: those that no other run is better than, or all.",
)
@_margin
@click.option("--log", type=click.Choice(("inspect",)), help="Write each run to OUT/inspect, too, for `inspect view`.")
@_no_cache
def sweep(config_files: tuple[str, ...], out: str, no_cache: bool, options: Any, **wanted: Any) -> None:
    """Let the base, the fine-tuned models and merges of CONFIG_FILES answer problems, and write to the folder OUT what
    they answered, accuracy against length, and which merge to keep. The configs merge the same models, each by any
    method of mergekit.

    Stopped at any moment, the same command goes on where it was; with other values of --set, --compare or --also it
    adds to what is there, and with another --margin it concludes anew. Any number of the same command, on one machine
    or several, work on one sweep. The measurement and the task vectors are made once. docs/sweep.md says how to read a
    front, and how many problems tell two methods apart.
    """
    from mergekit_fim.evaluate.folder import SweepFolder
    from mergekit_fim.evaluate.front.findings import render
    from mergekit_fim.evaluate.sweep import sweep as run_sweep
    from mergekit_fim.evaluate.wanted import Wanted

    configs = {path: _config(path, no_cache)[0] for path in config_files}
    try:
        findings = run_sweep(configs, out, Wanted(**wanted), options)
    except KeyboardInterrupt:
        raise FimError("stopped; the answers so far are kept, and the same command goes on") from None
    if findings is not None:
        echo(render(findings, SweepFolder(out).remedy(findings.recommended.run)))


@main.command(short_help="Accuracy against length: of anybody's results.")
@click.argument("results", type=_PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(), help="Draw the front into this .png or .svg file.")
@click.option("--base", metavar="RUN", help="The base's run.  [default: the one called base]")
@click.option("--long", metavar="RUN", help="The long model's run.  [default: the one called long]")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Of the bootstrap.")
@_margin
@click.option("--json", "json_file", type=click.Path(), help="Write the findings to this file, as sweep.json has them.")
def front(results: tuple[str, ...], output: str | None, json_file: str | None, **asked: Any) -> None:
    """Show accuracy against length, and which run to keep, of RESULTS that anybody made, as sweep does of its own.

    RESULTS are files of rows, logs of Inspect (.eval), and folders of sweeps made apart, all on the same problems. The
    rows are CSV, JSONL or Parquet, with the columns run, problem, correct (0 to 1) and tokens, and if known family,
    strength, source, sample and truncated. docs/sweep.md says more.
    """
    from mergekit_fim.evaluate.front.figure import write_figure
    from mergekit_fim.evaluate.front.findings import render
    from mergekit_fim.evaluate.results.front import front_of
    from mergekit_fim.measurements.record import versions
    from mergekit_fim.report.figure import check_figure

    check_writable(json_file, *results)
    check_writable(output, *results, json_file)
    if output is not None:
        check_figure(output)
    findings, folders = front_of(results, **asked)
    remedies = (folder.remedy(findings.recommended.run) for folder in folders)
    echo(render(findings, next(filter(None, remedies), "")))
    content = findings.as_json()
    if json_file is not None:
        head = {"format": "mergekit-fim/front", "version": 1, "versions": versions()}
        write_json(json_file, {**head, "findings": content})
    if output is not None:
        write_figure(content["summary"], output)


@main.command(short_help="Draw a report or a measurement.")
@click.argument("report", type=_PATH)
@click.option("-o", "--output", required=True, type=click.Path(), help="The .png or .svg file to write.")
def plot(report: str, output: str) -> None:
    """Draw REPORT, a merge's fim_report.json or a measurement: per decoder layer, the Fisher information on a
    logarithmic axis with its standard error, the norm of each task vector, and each model's merge coefficient.
    A figure of a fim_report.json that is written beside it is shown in the merged model's card, where there is one.
    """
    from mergekit_fim.report.card import write_section
    from mergekit_fim.report.figure import check_figure, read_report, write_figure

    check_writable(output, report)
    check_figure(output)
    write_figure(read_report(report), report, output)
    (folder, name), (other, figure) = (os.path.split(os.path.abspath(path)) for path in (report, output))
    if name == REPORT_NAME and other == folder:
        write_section(folder, figure=figure)
    click.echo(output)


@main.command(short_help="Do two measurements rank the layers alike?")
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
@click.option("--layers", "count", default=5, type=click.IntRange(min=0), help="How many to list.")
def compare(first: str, second: str, count: int) -> None:
    """Compare two measurements or two files of factors, FIRST and SECOND, made with other settings or of other models.

    Print the correlation of their ranks (Spearman) and of their logarithms (Pearson), and the layers that moved most,
    each with its shift in standard errors: more than two of them isn't chance. A factor common to all layers changes no
    merge coefficient, so shifts are counted from the mean.

    Of two files that `fisher --factors` wrote, print how alike the factors of each layer's tensors are: 1 where they
    are the same but for a number.
    """
    from mergekit_fim.measurements.compare import render_comparison, render_factors
    from mergekit_fim.measurements.factors import FactorsFile, is_factors
    from mergekit_fim.measurements.store import read_measurement

    if is_factors(first) or is_factors(second):
        echo(render_factors(FactorsFile.open(first), FactorsFile.open(second)))
    else:
        echo(render_comparison(read_measurement(first), read_measurement(second), count))
