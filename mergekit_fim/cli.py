"""The command line: `mergekit-fim`, the same as `python -m mergekit_fim`.

Whatever is heavy is imported when a command runs, so that help and shell completion are quick. mergekit's own options
come from mergekit.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.core import ParameterSource

# OpenMP reads it when torch is loaded. Threads that spin while they wait take the cores that others could use.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import mergekit_fim
from mergekit_fim.config.parameters import FACTORS, FLOAT_DTYPES, LABELS, PARAMETERS, FisherSettings
from mergekit_fim.errors import FimError, reason
from mergekit_fim.files import REPORT_NAME, check_writable, copy_whole, write_json, write_text
from mergekit_fim.text import echo, size, wrapped

_PATH = click.Path(readable=False)  # for completion; what it must be is checked where it is read
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_CONTEXT)
@click.version_option(mergekit_fim.__version__, prog_name="mergekit-fim")
def main() -> None:
    """Merge coefficients from Fisher information, for mergekit's merge methods fim_ties, fim_ta and fim_kron.

    Merges themselves are made by mergekit-yaml as ever. These commands measure a base model once, to be kept or
    published; show what a merge will do before it is made; write its coefficients as a config for stock mergekit; and
    draw and compare measurements.

    Completion, in bash and likewise in zsh and fish:

    \b
    eval "$(_MERGEKIT_FIM_COMPLETE=bash_source mergekit-fim)"
    """


@contextlib.contextmanager
def _one_line_of_options() -> Iterator[None]:
    """Errors of pydantic, torch and mergekit about the value of an option, in one line."""
    try:
        yield
    except (click.exceptions.Exit, click.Abort):  # RuntimeErrors of click's, as after --help
        raise
    except (ValueError, RuntimeError) as error:
        raise FimError(f"one of the options has a value that can't be used ({reason(error)}); change it") from error


class _MergekitCommand(click.Command):
    """A command with all of mergekit-yaml's options, which it hands on as `options`, mergekit's MergeOptions."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, and mergekit's as soon as they are asked for."""
        if "merge_options" not in self.__dict__:
            from mergekit.options import MergeOptions, add_merge_options

            def make(merge_options: MergeOptions) -> MergeOptions:
                return merge_options

            self.merge_options: Any = add_merge_options(make)
            own = {parameter.name for parameter in self.params}
            theirs = reversed(self.merge_options.__click_params__)
            self.mergekit_params = [parameter for parameter in theirs if parameter.name not in own]
        return [*super().get_params(ctx)[:-1], *self.mergekit_params, *super().get_params(ctx)[-1:]]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As in click; mergekit's own types have errors of their own."""
        with _one_line_of_options():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with mergekit's options made one, and with threads, seeds and logging as they say."""
        mergekit_fim.install(always=True)
        given = {parameter.name: ctx.params.pop(parameter.name) for parameter in self.mergekit_params}
        with _one_line_of_options():
            options = self.merge_options(**given)
            options.apply_global_options()
        ctx.params["options"] = options
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """mergekit's options in the sections of mergekit-yaml's help."""
        from mergekit.options import OPTION_CATEGORIES

        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                is_own = parameter not in self.mergekit_params
                title = "Options" if is_own else OPTION_CATEGORIES.get(parameter.name or "", "Miscellaneous")
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _no_cache(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--no-cache", is_flag=True, help="Measure anew, and don't keep the measurement for the next merge."
    )(command)


def _config(path: str, no_cache: bool) -> tuple[Any, str]:
    """The merge config in a file, and its text."""
    from mergekit_fim.config.file import read_config

    config, text = read_config(path)
    if no_cache:
        config.parameters = {**(config.parameters or {}), "fisher_cache": False}
    return config, text


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for the parameters of a measurement."""
    for name in ("labels", "seed", "seq_len", "samples"):
        parameter = PARAMETERS[f"fisher_{name}"]
        command = click.option(
            f"--{name.replace('_', '-')}",
            default=parameter.default,
            show_default=True,
            type=click.Choice(LABELS) if name == "labels" else parameter.type,
            help=f"{parameter.meaning[:1].upper()}{parameter.meaning[1:]}.",
            callback=_accepted,
        )(command)
    return command


_LOADING = (
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


def _loading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for what reads checkpoints and doesn't merge."""
    for option in reversed(_LOADING):
        command = option(command)
    return command


def _accepted(_context: click.Context, option: click.Parameter, value: Any) -> Any:
    parameter = PARAMETERS[f"fisher_{option.name}"]
    if not parameter.accepts(value):
        raise click.BadParameter(f"expected {parameter.expected}, found {value}.")
    return value


@main.command(short_help="Measure a model's Fisher information, once.")
@click.argument("model", type=_PATH)
@click.option(
    "-o", "--output", required=True, type=click.Path(), help="The file to write: JSON, or with --factors safetensors."
)
@click.option(
    "--factors",
    type=click.Choice(FACTORS),
    help="Record Kronecker factors instead, for fim_kron: what the linear layers are given, or also the gradients at "
    "their outputs.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    help="With --factors: how many tokens the random ones are drawn from; for models of different vocabularies the "
    "smallest. By default this model's.",
)
@_settings
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@_no_cache
@_loading
def fisher(
    model: str,
    output: str,
    factors: str | None,
    vocab_size: int | None,
    samples: int,
    seq_len: int,
    seed: int,
    labels: str,
    dtype: str | None,
    revision: str | None,
    no_cache: bool,
    **options: Any,
) -> None:
    """Measure the Fisher information of MODEL's decoder layers on random tokens, and write it to a file.

    With --factors it is the Kronecker factors of each linear layer that are written, some numbers for each token; of
    fim_kron's own default number of samples, 2, unless --samples is given.

    MODEL is a folder or a model on the Hub, with an adapter as in mergekit: model+adapter. A merge uses the file
    instead of measuring with `parameters: {fisher: FILE}` in its config.

    Weights are read from the checkpoint as they are needed: the memory of one decoder layer will do. A measurement that
    an earlier command or merge has kept is used again; --no-cache measures anew.

    Several processes share the work: start them by

    \b
    accelerate launch --num_processes K -m mergekit_fim fisher MODEL -o FILE
    torchrun --nproc_per_node K -m mergekit_fim fisher MODEL -o FILE    (on CPUs)
    """
    from mergekit_fim.fisher.samples import draw_samples
    from mergekit_fim.measurements.file import model_files, write_measurement
    from mergekit_fim.models.inputs import InputModel, open_model
    from mergekit_fim.prepass.factors import measured_factors
    from mergekit_fim.prepass.measured import measured
    from mergekit_fim.processes.together import SharedError, processes

    if vocab_size is not None and factors is None:
        raise click.UsageError("--vocab-size goes with --factors")
    with processes() as state:
        is_main = state is None or state.is_main_process
        merge_options = _options_of_process(options, state)

        def open_base() -> InputModel:
            if is_main:
                check_writable(output, *model_files(model))
            return open_model(model, revision, merge_options)

        try:
            default = click.get_current_context().get_parameter_source("samples") is ParameterSource.DEFAULT
            if factors is not None and default:
                samples = PARAMETERS["fisher_samples"].default_for("fim_kron")
            settings = FisherSettings(samples, seq_len, seed, labels)
            wanted: Any = (open_base, settings, dtype, merge_options)
            found: Any = None
            if factors is None:
                found = measured(*wanted, cache=not no_cache, state=state)
            else:
                drawn = None if vocab_size is None else draw_samples(settings, vocab_size)
                found = measured_factors(*wanted, kind=factors, samples=drawn, cache=not no_cache, state=state)
        except SharedError:
            if is_main:
                raise
            sys.exit(1)
        if not is_main:
            return
        if factors is None:
            write_measurement(found.measurement, output)
        else:
            copy_whole(found.file.path, output)
    if factors is None:
        warnings, its = found.measurement.fisher.warnings, found.measurement.fisher
        what = f"{found.measurement.model.num_layers} decoder layers of {model}, in {its.dtype}"
    else:
        warnings, its = found.file.warnings, found.file
        if its.not_reached:
            warnings += (f"no token reached {len(its.not_reached)} tensors of experts, such as {its.not_reached[0]}",)
        what = f"factors of {len(its.names)} tensors of {model}, in {its.settings.dtype}, {size(its.size)}"
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)
    if not options["quiet"]:
        click.echo(f"{output}: {what}{f', {found.origin}' if found.origin else ''}")


@main.command(short_help="Show what a task vector looks like.")
@click.argument("base", type=_PATH)
@click.argument("model", type=_PATH)
@click.option("--json", "json_file", type=click.Path(), help="Write the figures as JSON, too.")
@_loading
def delta(base: str, model: str, json_file: str | None, dtype: str | None, **options: Any) -> None:
    """Measure the task vector of MODEL, what fine-tuning changed in BASE: in a minute, before any merge.

    Prints for every kind of tensor in the decoder layers, for all of them, and for what is outside: the share of exact
    zeros, the norm, the kurtosis, the share of the squared norm in the largest 2 % of the entries, and the first
    singular value beside that of noise. BASE and MODEL are folders or models on the Hub, with an adapter as in
    mergekit: model+adapter, and with a revision: user/model@revision.

    Tensors are read one after the other: the memory of the largest one, of both models, will do.
    """
    from mergekit_fim.measurements.file import model_files
    from mergekit_fim.tools.delta import measure_names, render

    if json_file is not None:
        check_writable(json_file, *model_files(base), *model_files(model))
    found = measure_names(base, model, dtype, _options_of_process(options, None))
    echo(render(found))
    if json_file is not None:
        write_json(json_file, found.as_json())


def _options_of_process(options: dict[str, Any], state: Any) -> Any:
    """mergekit's own options, with the device that accelerate gave this process unless the user chose one."""
    from mergekit.options import MergeOptions

    own = "cuda" if options["cuda"] else "cpu" if state is None else str(state.device)
    device = options.pop("device") or own
    quiet = options["quiet"] or (state is not None and not state.is_main_process)
    return MergeOptions(**(options | {"quiet": quiet, "device": device}))


@main.command(cls=_MergekitCommand, short_help="Show what a merge will do, and its coefficients.")
@click.argument("config_file", type=_PATH)
@click.option("--json", "json_file", type=click.Path(), help="Write the report that the merge would write, as JSON.")
@click.option("--plot", "figure", type=click.Path(), help="Draw the coefficients into a .png or .svg file.")
@_no_cache
def plan(config_file: str, json_file: str | None, figure: str | None, no_cache: bool, options: Any) -> None:
    """Run everything of the merge in CONFIG_FILE up to its coefficients, and merge nothing.

    Prints the table that the merge prints, and what the merge will do that can't be seen in the config: densities,
    gate protection, output heads, config keys in which the models differ, and what it will read, write and hold.
    """
    from mergekit_fim.report.figure import check_figure, write_figure

    if json_file is not None:
        check_writable(json_file, config_file)
    if figure is not None:
        check_writable(figure, config_file, *([json_file] if json_file else []))
        check_figure(figure)
    config, _ = _config(config_file, no_cache)
    from mergekit_fim.report.record import as_json
    from mergekit_fim.report.table import render
    from mergekit_fim.tools.explain import explain
    from mergekit_fim.tools.plan import plan_fim_merge

    planned, pre_pass = plan_fim_merge(config, options)
    echo(render(pre_pass) + explain(planned, options))
    for warning in pre_pass.warnings:
        click.echo(f"Warning: {warning}", err=True)
    content = as_json(pre_pass)
    if json_file is not None:
        write_json(json_file, content)
    if figure is not None:
        write_figure(content, config_file, figure)


@main.command(cls=_MergekitCommand, short_help="Write a merge as a config for stock mergekit.")
@click.argument("config_file", type=_PATH)
@click.option("-o", "--output", required=True, type=click.Path(), help="The YAML file to write.")
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Merge every tensor both ways, without writing any, and say how far apart they are.",
)
@_no_cache
def export(config_file: str, output: str, check: bool, no_cache: bool, options: Any) -> None:
    """Write the merge in CONFIG_FILE as one that needs no plug-in: with mergekit's `ties` or `task_arithmetic`.

    The coefficients become filtered weights, gate protection included. What stock mergekit can't do the same way is
    said, and by how much the result differs: the largest difference of a merged tensor, which takes as long as two
    merges (--no-check leaves it out).
    """
    check_writable(output, config_file)
    config, _ = _config(config_file, no_cache)
    from mergekit_fim.tools import export as exporting
    from mergekit_fim.tools.plan import plan_fim_merge

    exporting.check_exportable(config.merge_method)
    planned, pre_pass = plan_fim_merge(config, options)
    exported = exporting.export(planned, options)
    for warning in pre_pass.warnings:
        click.echo(f"Warning: {warning}", err=True)
    said = [f"not the same as {config.merge_method}: {loss}" for loss in exported.losses]
    if check:
        said.append(exporting.summary(exporting.compare(planned, exported.config, options)))
    else:
        said.append("how far apart the two merges are was not measured (--check does)")
    comment = [f"# {line}" for note in said for line in wrapped(note, 100)]
    instead = f"{exported.config.merge_method} in place of {config.merge_method}"
    head = f"# {instead}, by mergekit-fim {mergekit_fim.__version__}"
    write_text(output, "\n".join([head, *comment, exported.config.to_yaml()]) + "\n")
    if not options.quiet:
        click.echo(f"{output}: {instead}")
    for note in said:
        click.echo("\n".join(wrapped(f"- {note}")), err=bool(exported.losses))


@main.command(cls=_MergekitCommand, short_help="Merge, as mergekit-yaml does.")
@click.argument("config_file", type=_PATH)
@click.argument("out_path", type=_PATH)
@_no_cache
def merge(config_file: str, out_path: str, no_cache: bool, options: Any) -> None:
    """Do the merge in CONFIG_FILE, and write the merged model to the folder OUT_PATH.

    The same as mergekit-yaml, but that the model is in OUT_PATH whole or not at all. Also for places where Python reads
    no .pth files, so that mergekit-yaml doesn't know the methods: `python -S`, and installs by `pip install --target`.

    A model that is in OUT_PATH already is replaced when the new one is complete; until then both are on the disk.
    """
    config, text = _config(config_file, no_cache)
    from mergekit_fim.tools.whole import merge_whole

    merge_whole(config, text, out_path, options)


@main.command(cls=_MergekitCommand, short_help="Accuracy against length: which merge to keep.")
@click.argument("config_file", type=_PATH)
@click.argument("out", type=_PATH)
@click.option(
    "--problems",
    multiple=True,
    required=True,
    metavar="SOURCE",
    help="A JSONL file of `question` and `answer`, reasoning-gym:TASK[:JSON], or hf:DATASET[:CONFIG][:SPLIT]; again "
    "for several.",
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
    show_default=True,
    metavar="N",
    help="N further merges of each method, at strengths between those where accuracy and length change most.",
)
@click.option(
    "--compare",
    multiple=True,
    metavar="METHOD",
    help="The same merges by another method, such as task_arithmetic, too; again for several.",
)
@click.option("--also", multiple=True, metavar="MODEL", help="A further model as it is; again for several.")
@click.option("--n", default=100, show_default=True, help="Problems of each source; 0 for all.")
@click.option("--seed", default=0, show_default=True, help="Of problems, sampling and bootstrap.")
@click.option("--system", help="What the models are told before the question.")
@click.option("--question-field", metavar="NAME", help="The question's field in files and data sets.")
@click.option("--answer-field", metavar="NAME", help="The answer's field in files and data sets.")
@click.option(
    "--template",
    type=_PATH,
    metavar="FILE",
    help="A prompt in Jinja, given `question` and `system`, in place of the models' chat templates.",
)
@click.option("--max-tokens", default=1024, show_default=True, help="Tokens that an answer may have.")
@click.option("--temperature", default=0.0, show_default=True, help="0 for greedy decoding.")
@click.option("--samples", default=1, show_default=True, help="Answers to each problem.")
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
    show_default=True,
    help="What runs the models; auto is vLLM where it is installed and has a class of its own for each model.",
)
@click.option("--engine-args", metavar="NAME=VALUE,...", help="vLLM's own options, such as tensor_parallel_size=4.")
@click.option("--mix-engines", is_flag=True, help="Let OUT have answers of several engines, or versions of them.")
@click.option(
    "--keep",
    type=click.Choice(("none", "front", "all")),
    default="none",
    show_default=True,
    help="Which merges to keep in OUT/models: those that no other run is better than, or all.",
)
@click.option(
    "--margin",
    default=0.05,
    show_default=True,
    help="How much less accurate than the long model the run to keep may be, by the interval of their difference.",
)
@_no_cache
def sweep(config_file: str, out: str, no_cache: bool, options: Any, **wanted: Any) -> None:
    """Let the base, the fine-tuned models and merges of CONFIG_FILE answer problems, and write to the folder OUT what
    they answered, accuracy against length, and which merge to keep.

    Stopped at any moment, the same command goes on where it was; with other values of --set, --compare or --also it
    adds to what is there, and with another --margin it concludes anew. Any number of the same command, on one machine
    or several, work on one sweep. The measurement and the task vectors are made once. docs/sweep.md says how to read a
    front, and how many problems tell two methods apart.
    """
    from mergekit_fim.evaluate.folder import SweepFolder
    from mergekit_fim.evaluate.front.findings import render
    from mergekit_fim.evaluate.sweep import sweep as run_sweep
    from mergekit_fim.evaluate.wanted import Wanted

    config, _ = _config(config_file, no_cache)
    try:
        findings = run_sweep(config, out, Wanted(**wanted), options)
    except KeyboardInterrupt:
        raise FimError("stopped; the answers so far are kept, and the same command goes on") from None
    if findings is not None:
        echo(render(SweepFolder(out), findings))


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
@click.option("--layers", "count", default=5, show_default=True, type=click.IntRange(min=0), help="How many to list.")
def compare(first: str, second: str, count: int) -> None:
    """Compare two measurements or two files of factors, FIRST and SECOND, made with other settings or of other models.

    Prints the correlation of their ranks (Spearman) and of their logarithms (Pearson), and the layers that moved most,
    each with its shift in standard errors: what is beyond two of them isn't chance. A factor common to all layers
    changes no merge coefficient, so shifts are counted from the mean.

    Of two files that `fisher --factors` wrote: how alike the factors of each layer's tensors are, 1 where they are the
    same but for a number.
    """
    from mergekit_fim.measurements.compare import render_comparison
    from mergekit_fim.measurements.factors import FactorsFile, is_factors, render_factors
    from mergekit_fim.measurements.store import read_measurement

    if is_factors(first) or is_factors(second):
        echo(render_factors(FactorsFile.open(first), FactorsFile.open(second)))
    else:
        echo(render_comparison(read_measurement(first), read_measurement(second), count))
