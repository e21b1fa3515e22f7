"""Make S³ (arXiv 2609.37976): take the base within its top singular directions, the long model outside of them."""

from pathlib import Path

import torch
import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pairs.training import layer_of


def without_top_directions(pair: Path, share: float) -> str:
    """Make a model, or find it, and return the name of its folder in the pair's folder.

    Every matrix of the decoder layers becomes W = W0 + ΔW − U_k(U_kᵀ ΔW V_k)V_kᵀ, with W0 = UΣVᵀ and
    k = ⌈share · min(m, n)⌉. All else comes from the long model.

    Args:
        pair: the folder of base and long.
        share: ρ, the share of the directions that are the base's.
    """
    name = f"s3-{share:.4f}"
    if (pair / name).exists():
        return name
    base, long = (AutoModelForCausalLM.from_pretrained(pair / part, dtype=torch.float32) for part in ("base", "long"))
    own = dict(base.named_parameters())
    with torch.no_grad():
        for tensor, weight in tqdm.tqdm(list(long.named_parameters()), desc=f"{pair.name}: {name}"):
            if weight.ndim < 2 or layer_of(tensor) is None:
                continue
            within = own[tensor]
            # A mixture's experts are one tensor [expert, row, column].
            u, _, vh = torch.linalg.svd(within, full_matrices=False)
            k = -int(-share * min(within.shape[-2:]) // 1)
            u, vh = u[..., :k], vh[..., :k, :]
            weight -= u @ (u.mT @ (weight - within) @ vh.mT) @ vh
    long.save_pretrained(pair / f"{name}.part")
    AutoTokenizer.from_pretrained(pair / "long").save_pretrained(pair / f"{name}.part")
    (pair / f"{name}.part").rename(pair / name)
    return name
