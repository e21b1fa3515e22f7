"""Draw the random tokens on which a model is measured, and compute the loss on them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mergekit_fim.config.parameters import FisherSettings


@dataclass(frozen=True)
class Samples:
    """What the model is measured on."""

    input_ids: torch.Tensor  # [sequence, position], int64, on the CPU
    # [sequence, position − 1] in [0, 1), float64: the quantiles at which labels are drawn from the model's own
    # distribution; None where the next input token is the label.
    uniforms: torch.Tensor | None

    def part(self, start: int, end: int) -> "Samples":
        """The sequences from `start` up to `end`."""
        return Samples(self.input_ids[start:end], None if self.uniforms is None else self.uniforms[start:end])


def draw_samples(settings: FisherSettings, vocab_size: int) -> Samples:
    """Draw the random tokens: each uniform over the vocabulary, from a generator of their own on the CPU.

    The tokens depend on nothing but `settings` and `vocab_size`. The quantiles for sampled labels come after them from
    the same generator.
    """
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    # By name: within `with torch.device(...)` they would be drawn there.
    cpu = torch.device("cpu")
    count, length = settings.samples, settings.seq_len
    ids = torch.randint(0, vocab_size, (count, length), generator=generator, dtype=torch.int64, device=cpu)
    uniforms = None
    if settings.labels == "sampled":
        uniforms = torch.rand((count, length - 1), generator=generator, dtype=torch.float64, device=cpu)
    return Samples(ids, uniforms)


def sequence_loss(logits: torch.Tensor, input_ids: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Compute L_n, the mean negative log-likelihood of the T − 1 next tokens, in float32 or better.

    Args:
        logits: [position, vocabulary], all T positions.
        input_ids: [position].
        uniforms: [position − 1] quantiles at which labels are sampled, or None for the next input token as label.
    """
    logits = logits[:-1]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    labels = input_ids[1:] if uniforms is None else sample_labels(logits.detach(), uniforms)
    return F.cross_entropy(logits, labels.to(logits.device))


def sample_labels(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Choose the first tokens at which the cumulative probability exceeds the quantiles.

    Args:
        logits: [position, vocabulary].
        uniforms: [position].
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(cumulative, uniforms.to(logits.device)[:, None], right=True)[:, 0]
    # The rounded total may fall short of 1, hence of a quantile next to it.
    return labels.clamp_(max=logits.shape[-1] - 1)
