"""What the user sees of a pre-pass of `fim_kron`: what the directions of each layer's matrices get."""

import math
from collections.abc import Iterator
from typing import Any

from mergekit_fim.prepass.result import Kron, KronLayer
from mergekit_fim.text import size, wrapped

PARTS = ("attention", "mlp")


def table(kron: Kron) -> Iterator[str]:
    """Which factors were used, and one table per fine-tuned model."""
    for model, file in kron.factors.items():
        its = file.settings
        yield from wrapped(
            f"Kronecker factors of {model} on {its.samples} × {its.seq_len} random tokens (seed {its.seed}, in "
            f"{its.dtype}), {size(file.size)}"
        )
        if file.origin:
            yield from wrapped(f"({file.origin})")
    for its_model in kron.models:
        yield ""
        if len(kron.models) > 1:
            yield from wrapped(f"{its_model.model} into {its_model.base}")
        yield f"{'':>8}{'':>9}{'':>7}" + "".join(f"{f'{part}: coefficients of the directions':>38}" for part in PARTS)
        yield f"{'layer':>8}{'‖δ‖':>9}{'α':>7}" + f"{'mean':>9}{'±':>7}{'least':>7}{'most':>7}{'number':>8}" * 2
        for layer in its_model.layers:
            line = f"{layer.pair.base_layer:>8}{math.sqrt(layer.sq_norm):>9.3g}{layer.alpha:>7.3f}"
            for its_part in map(layer.spreads.get, PARTS):
                line += (
                    "{:>9.3f}{:>7.3f}{:>7.3f}{:>7.3f}{:>8.0f}".format(*vars(its_part).values())
                    if its_part
                    else " " * 38
                )
            yield line
        yield f"{'outside':>8}{'':>9}{its_model.alpha_other:>7.3f}"


def notes(kron: Kron) -> Iterator[str]:
    """In words, what the table's columns are, and what has no factors."""
    yield (
        "of the directions that the tokens take (here at most 128 tokens of each model): the mean coefficient, its "
        "standard deviation, the least and the largest, and how many directions are told apart; all else in the "
        "layers, such as biases and norms, gets α × the model's share of the weights, and so do the other directions "
        "where both models' inputs are equally large"
    )
    for model, file in kron.factors.items():
        if file.without:
            yield f"{model}: {len(file.without)} matrices such as {file.without[0]} have no factors"


def as_json(kron: Kron) -> dict[str, Any]:
    """The section `kron` of the report."""
    return {
        "factors": [
            {
                "model": str(model),
                "fingerprint": file.model.fingerprint,
                "bytes": file.size,
                **file.model_dump(mode="json", include={"settings", "not_reached", "without"}),
            }
            for model, file in kron.factors.items()
        ],
        "models": [
            {
                "model": str(its.model),
                "base_model": str(its.base),
                "alpha_other": its.alpha_other,
                "layers": [_layer(layer) for layer in its.layers],
            }
            for its in kron.models
        ],
    }


def _layer(layer: KronLayer) -> dict[str, Any]:
    found = {
        "index": layer.pair.source_layer,
        "task_vector_sq_norm": layer.sq_norm,
        "alpha": layer.alpha,
        "beta": layer.beta,
        "parts": {part: dict(vars(spread)) for part, spread in layer.spreads.items()},
    }
    shifted = layer.pair.source_layer != layer.pair.base_layer
    return found | ({"base_index": layer.pair.base_layer} if shifted else {})
