"""Merge by mergekit's `run_merge`: the model is there whole or not at all."""

import contextlib
import logging
import os

from mergekit import merge as mergekit_merge
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.errors import reason
from mergekit_fim.files import write_text
from mergekit_fim.merging.output_folder import check_output, model_written_whole
from mergekit_fim.models.checkpoint import explained
from mergekit_fim.processes import launched
from mergekit_fim.report.card import write_section
from mergekit_fim.tools.plan import check_config_and_models

LOG = logging.getLogger("mergekit_fim")


def merge_whole(config: MergeConfiguration, text: str | None, out_path: str, options: MergeOptions) -> None:
    """Merge by mergekit's `run_merge`, any method, and write the model to a folder: it is there whole or not at all.

    Args:
        config: the merge config, left as it is.
        text: its YAML, which is kept beside the model; by default what mergekit makes of `config`.
        out_path: the folder; a model that is there already is replaced at the end.
        options: mergekit's. With a verbosity above 0, errors that aren't ours keep their traceback.

    Raises:
        FimError: the models can't be merged, or not written.
    """
    text = text or config.to_yaml()

    def whole() -> None:
        check_output(out_path, config)
        check_config_and_models(config, options)
        one_line = explained("mergekit can't do this merge", "-v shows where it failed")
        with contextlib.nullcontext() if options.verbosity else one_line, model_written_whole(out_path) as folder:
            # mergekit normalises a config in place.
            own = options.model_copy(update={"write_model_card": False})
            mergekit_merge.run_merge(config.model_copy(deep=True), folder, own)
            if options.write_model_card and os.path.isdir(folder):
                _write_card(config, text, folder)

    launched.by_all(whole)


def _write_card(config: MergeConfiguration, text: str, folder: str) -> None:
    """Write mergekit's model card. It asks the Hub about some names, which must not cost a merge that is done."""
    write_text(os.path.join(folder, "mergekit_config.yml"), text)
    try:
        card = generate_card(config=config, config_yaml=text, name=os.path.basename(folder))
    except Exception as error:
        LOG.warning("the merged model is whole, but its model card can't be made (%s)", reason(error))
        return
    write_text(os.path.join(folder, "README.md"), card)
    if config.merge_method in METHODS:
        write_section(folder)
