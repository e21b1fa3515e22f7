"""A measurement, made up."""

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.measurements.record import FisherMeasurement, LayerFisher, Measurement, ModelIdentity

IDENTITY = ModelIdentity("user/model", "main", "LlamaForCausalLM", 2, 97, "a" * 32 + "-" + "b" * 16)


def measurement(**changes) -> Measurement:
    layers = (LayerFisher(0, 10, (1.0, 2.5e-7)), LayerFisher(1, 12, (0.0, 3.0)))
    fisher = FisherMeasurement(97, "float32", FisherSettings(2, 12, 5, "sampled"), layers, ("a warning " * 30,))
    return Measurement(**{"model": IDENTITY, "fisher": fisher, "versions": {"torch": "2"}} | changes)
