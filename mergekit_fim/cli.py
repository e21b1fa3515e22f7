"""The command line: `python -m mergekit_fim`."""

import sys
from typing import Any

import click

import mergekit_fim


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mergekit_fim.__version__, prog_name="mergekit-fim")
def main() -> None:
    """Fisher information of language models, for mergekit's merge methods fim_ties and fim_ta."""


@main.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(), help="The JSON file to write.")
@click.option("--samples", default=8, show_default=True, type=click.IntRange(min=1), help="Number of sequences.")
@click.option("--seq-len", default=64, show_default=True, type=click.IntRange(min=2), help="Tokens per sequence.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of the tokens.")
@click.option(
    "--labels",
    default="inputs",
    show_default=True,
    type=click.Choice(["inputs", "sampled"]),
    help="Predict the next random token, or one drawn from the model's own distribution.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32", "float64"]),
    help="Read the weights in this type, as a merge with this `dtype` does.  [default: the checkpoint's]",
)
@click.option("--cuda", is_flag=True, help="Measure on the GPU.")
@click.option("--device", help="Measure on this torch device.")
@click.option("--multi-gpu", is_flag=True, help="Spread the model over all accelerators.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--lora-merge-cache", type=click.Path(), help="Where merged LoRA models are kept.")
@click.option("--transformers-cache", type=click.Path(), help="Where models of the Hub are kept.")
@click.option("--lazy-unpickle", is_flag=True, help="Read .bin checkpoints tensor by tensor.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def fisher(
    model: str,
    output: str,
    samples: int,
    seq_len: int,
    seed: int,
    labels: str,
    dtype: str | None,
    revision: str | None,
    **options: Any,
) -> None:
    """Measure the Fisher information of MODEL's decoder layers on random tokens.

    MODEL is a folder or a model on the Hub, with an adapter as in mergekit: model+adapter.

    Weights are read from the checkpoint as they are needed: the memory of one decoder layer will do.

    Several processes share the work: start them by `accelerate launch --num_processes K -m mergekit_fim fisher MODEL -o
    FILE`, or, on CPUs, by `torchrun --nproc_per_node K -m mergekit_fim fisher MODEL -o FILE`.
    """
    # Imported here, so that --help is quick.
    from mergekit_fim import fisher as fishing
    from mergekit_fim.inputs import open_model
    from mergekit_fim.measurement import as_json, check_writable, write_json
    from mergekit_fim.placement import placement, running_dtype
    from mergekit_fim.processes import SharedError, in_all, processes, shared_engine
    from mergekit_fim.settings import FisherSettings

    settings = FisherSettings(samples, seq_len, seed, labels)
    with processes() as state:
        is_main = state is None or state.is_main_process
        merge_options = _merge_options(options, state)
        try:
            opened = []

            def prepare() -> None:
                if is_main:
                    check_writable(output)
                opened.append(open_model(model, revision, merge_options))
                fishing.check_measurable(opened[0], settings)

            in_all(state, prepare)
            (base,) = opened
            # Timed, so that two machines might choose differently.
            wanted = fishing.reading_dtype(base, dtype)
            running = in_all(state, lambda: running_dtype(wanted, placement(merge_options).device))[0]
            measured = fishing.measure_base(
                base, settings, dtype, merge_options, engine=shared_engine(state), running=running
            )
            if is_main:
                write_json(output, as_json(measured, base))
        except SharedError:
            if is_main:
                raise
            sys.exit(1)
    if is_main and not options["quiet"]:
        click.echo(f"{output}: {len(measured.layers)} decoder layers of {base}, in {measured.dtype}")


def _merge_options(options: dict[str, Any], state: Any) -> Any:
    """mergekit's own options, with the device that accelerate gave this process unless the user chose one."""
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    device = options.pop("device") or ("cuda" if options["cuda"] else None)
    if device is None:
        device = "cpu" if state is None else str(state.device)
    quiet = options["quiet"] or (state is not None and not state.is_main_process)
    merge_options = MergeOptions(**(options | {"quiet": quiet, "device": device}))
    LoaderCache().setup(merge_options)
    return merge_options
