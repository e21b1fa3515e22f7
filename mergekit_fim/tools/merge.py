"""A whole merge by mergekit's own `run_merge`, of any method: a model that is there whole or not at all."""

import logging
import os

from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_fim.errors import FimError, check_own_code
from mergekit_fim.merging.output_folder import check_output, model_written_whole
from mergekit_fim.text import reason
from mergekit_fim.tools.plan import check

LOG = logging.getLogger("mergekit_fim")


def merge_whole(config: MergeConfiguration, text: str | None, out_path: str, options: MergeOptions) -> None:
    """Merge, and write the merged model to a folder; a model that is there already is replaced at the end.

    Args:
        config: the merge config.
        text: its YAML, which is kept beside the model; by default what mergekit makes of `config`.
        out_path: the folder.
        options: mergekit's. With a verbosity above 0, errors that aren't ours come as they are.

    Raises:
        FimError: the models can't be merged, or not written.
    """
    check_output(out_path, config)
    check(config, options)
    text = text or config.to_yaml()
    try:
        with model_written_whole(out_path) as folder:
            run_merge(config, folder, options.model_copy(update={"write_model_card": False}))
            if options.write_model_card and os.path.isdir(folder):
                _write_card(config, text, folder)
    except FimError:
        raise
    except Exception as error:  # mergekit, transformers and huggingface_hub each have their own
        if options.verbosity:
            raise
        check_own_code(error)
        full = "No space left" in str(error)
        remedy = "free some space, or write elsewhere" if full else "-v shows where it failed"
        raise FimError(f"mergekit can't do this merge ({reason(error)}); {remedy}") from error


def _write_card(config: MergeConfiguration, text: str, folder: str) -> None:
    """mergekit's model card. It asks the Hub about some names, which must not cost a merge that is done."""
    with open(os.path.join(folder, "mergekit_config.yml"), "w", encoding="utf-8") as file:
        file.write(text)
    try:
        card = generate_card(config=config, config_yaml=text, name=os.path.basename(folder))
    except Exception as error:
        LOG.warning("the merged model is whole, but its model card can't be made (%s)", reason(error))
        return
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(card)
