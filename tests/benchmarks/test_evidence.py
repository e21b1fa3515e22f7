"""What the evidence rests on: benchmarks/pairs and benchmarks/evidence, on tiny models."""

import functools
import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import torch
from environments import ROOT
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from benchmarks import fidelity
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import directions, entries, mappings, over_pairs, summary, tables
from benchmarks.evidence.answers import MODELS, Answers, load_answers, save_answers
from benchmarks.evidence.directions import Directions, power, share
from benchmarks.evidence.fronts import Pair, distance, quickly
from benchmarks.evidence.signals import BASE, LONG, Inputs, Signals, signals
from benchmarks.evidence.subspace import without_top_directions
from benchmarks.evidence.summary import Difference, Found, ends, file_of, load, rows, save, widest_gap
from benchmarks.evidence.variants import EXPLORED, LISTED, VARIANTS, Variant
from benchmarks.pages import put
from benchmarks.pairs.recipes import KINDS, core_seconds, make, note, noted, seconds
from benchmarks.pairs.tasks import characters, columns, gym, words
from benchmarks.pairs.training import Training
from example_configs.demo import prompt_ids
from mergekit_fim.evaluate.front.bootstrap import Outcomes
from mergekit_fim.evaluate.problems import grader
from mergekit_fim.evaluate.records import Grade, Problem
from mergekit_fim.tools.whole import merge_whole

FEW = Inputs(samples=3, length=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair as benchmarks/pairs leaves it."""
    path = tmp_path_factory.mktemp("evidence")
    base = tiny.build(tiny.config("llama", num_hidden_layers=3))
    for name, model in (("base", base), ("long", tiny.tuned(base, 1, scale=0.02))):
        tiny.save(model, path / name)
        tiny.tokenizer(chat_template="{{ messages[0].content }}").save_pretrained(path / name)
    return path


def test_signals_are_those_of_autograd(folder):
    found = signals(folder, FEW)
    assert found.squares.shape == found.dots.shape == (2, 3, len(found.tensors))
    # The package's own measurement is of the same tokens.
    layers = mappings.groups_by(found.tensors, mappings.whole)
    expected = [np.mean(squares) / count for count, squares in reference.fisher(folder / "base", 3, 12, 0)]
    assert found.grouped(layers).fisher(BASE) == pytest.approx(expected, rel=1e-4)
    # ⟨∇L, δ⟩ of all tensors together is how fast the loss changes along δ.
    ids = torch.randint(0, tiny.VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    models = [AutoModelForCausalLM.from_pretrained(folder / name).double() for name in ("base", "long")]
    ends = [dict(model.named_parameters()) for model in models]
    for at, model in enumerate(models):
        moved = {name: (ends[LONG][name] - ends[BASE][name]).detach() for name in ends[at]}
        losses = []
        for step in (-1e-4, 1e-4):
            weights = {name: value.detach() + step * moved[name] for name, value in ends[at].items()}
            logits = torch.func.functional_call(model, weights, (ids,)).logits[:, :-1]
            losses.append(
                [torch.nn.functional.cross_entropy(x, y[1:]).item() for x, y in zip(logits, ids, strict=True)]
            )
        slope = (np.array(losses[1]) - np.array(losses[0])) / 2e-4
        assert found.dots[at].sum(axis=1) == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_fidelity_is_measured_where_only_the_moved_part_differs(folder, monkeypatch):
    (folder / "answers").mkdir(exist_ok=True)
    for name, text in (("base", "a b c"), ("long", "d e f g")):
        line = json.dumps({"prompt": "x y", "text": text})
        (folder / "answers" / f"{name}.jsonl").write_text(f"{line}\n{line}\n")
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(folder / "base").named_parameters()]
    # What doesn't move is as it was, after a move, too.
    found = fidelity.measured(folder, BASE, [dict.fromkeys(names, 1.0), {}, dict.fromkeys(names, 0.1)], 2)
    everything, nothing, little = found.T
    assert (nothing < 1e-3 * little).all()
    assert (little < everything).all()
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("base", "long")]
    for kl, name in zip(everything, ("base", "long"), strict=True):
        ids = fidelity.texts(folder, name, 1)[0]
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in models)
        assert kl == pytest.approx(
            torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-3
        )
    monkeypatch.setattr(fidelity, "INPUTS", (FEW,))
    its = fidelity.rows(folder, 2)
    assert set(its) == {"ceiling", "‖δ‖²", f"F · ‖δ‖², {FEW}", f"E[⟨∇L, δ⟩²], {FEW}"}
    assert all(len(ends) == 2 and max(map(abs, ends)) <= 1 + 1e-9 for whats in its.values() for ends in whats.values())


def test_the_distance_is_of_the_decoder_layers(folder):
    base, long = (reference.load(folder / name) for name in ("base", "long"))
    layers = [name for name in base if ".layers." in name]
    moved = sum(np.square(long[name] - base[name]).sum() for name in layers)
    size = sum(np.square(base[name]).sum() for name in layers)
    assert distance(folder) == pytest.approx(np.sqrt(moved / size), rel=1e-4)


def test_what_a_pair_took_is_noted(tmp_path):
    assert seconds(tmp_path) == 0
    note(tmp_path, run="training of base", seconds=1.5, nats=None)
    note(tmp_path, run="base", seconds=2.0, nats=4.25)
    assert seconds(tmp_path) == 3.5
    assert [line["nats"] for line in noted(tmp_path)] == [None, 4.25]


def test_what_a_run_took_counts_its_threads(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 12.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert core_seconds(10.0) == 6.0


def test_a_long_model_that_was_trained_otherwise_is_no_one_sided_one(tmp_path):
    note(tmp_path, run="training of long", seconds=1.0, nats=None, one_sided=60)
    with pytest.raises(ValueError, match="expected a long model of one_sided 300, found 60"):
        make(KINDS["words"], "words", 0, tmp_path, 300)


def test_a_kind_without_a_parent_starts_from_the_base(tmp_path):
    kind = replace(KINDS["scratch-llama"], parent=None, child=Training(9, 2, 1e-3, layers_alone=True))
    with pytest.raises(ValueError, match="has no parent: expected --one-sided STEPS"):
        make(kind, "orphan", 0, tmp_path)
    torch.manual_seed(0)
    untrained, _ = kind.start(0)
    torch.manual_seed(0)
    make(kind, "orphan", 0, tmp_path, 2)
    assert not (tmp_path / "parent").exists()
    assert [line["run"] for line in noted(tmp_path)] == ["training of base", "training of long"]
    start, base, long = (untrained.state_dict(), *(reference.load(tmp_path / name) for name in ("base", "long")))
    assert all((base[name] == start[name].numpy()).all() for name in base)
    moved = {name for name in base if (base[name] != long[name]).any()}
    assert moved == {name for name in base if ".layers." in name}  # the embeddings, the head and the last norm stay


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair of untrained models under test, with a parent, of four problems."""
    path = tmp_path_factory.mktemp("pair")
    kind = replace(KINDS["scratch-llama"], max_tokens=6)
    torch.manual_seed(0)
    for seed, name in enumerate(("base", "long", "parent")):
        for part in kind.start(seed):
            part.save_pretrained(path / name)
    return Pair(path, kind, 4)


def test_a_merge_in_memory_answers_as_one_on_disk(pair):
    def merged(folder: Path, strength: float):
        ends = [AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("base", "long")]
        with torch.no_grad():
            for own, other in zip(*(end.parameters() for end in ends), strict=True):
                own += strength * (other - own)
        return ends[0]

    expected = pair.front("task_arithmetic", VARIANTS["task_arithmetic"], 3)
    found = pair.front("in memory", Variant(merged), 3)
    assert len(found) == 3
    for one, other in zip(expected, found, strict=True):
        assert one.settings == other.settings
        assert (one.tokens == other.tokens).all()
        texts = [[its.text for its in pair._answered(run.run).values()] for run in (one, other)]
        assert texts[0] == texts[1]
    assert (
        len({text for run in (*MODELS, expected[1].run) for text in (its.text for its in pair._answered(run).values())})
        > 4
    )


def test_answers_are_kept_and_read_again(pair):
    expected = pair.front("task_arithmetic", VARIANTS["task_arithmetic"], 3)
    again = Pair(pair.folder, pair.kind, 4)
    known = again.known("task_arithmetic", VARIANTS["task_arithmetic"], 3)
    assert [run.run for run in known] == [run.run for run in expected]
    assert again.known("fim_ta", VARIANTS["fim_ta"], 3) == []
    answers = again.answers({"task_arithmetic": known})
    assert tuple(answers.models) == MODELS
    assert ends(answers)["parent"] is not None


@pytest.mark.parametrize("expected", ["12", "-7", "0", "105"])
def test_whole_numbers_are_graded_as_by_the_process_that_grades(expected):
    def ask(problem: Problem, answer: str) -> Grade:
        return grader.grade("math", expected=problem.answer, answer=answer)

    problem = Problem("problems.jsonl", 0, "?", expected)
    for answer in ("12", "\n12", "-12", "7", "-7", "0", "-0", "105", "0105", "12.", "12+3=15", "", "=", "1050 "):
        assert quickly(ask)(problem, answer) == ask(problem, answer)


def test_an_answer_is_graded_once():
    asked = []

    def ask(problem: Problem, answer: str) -> Grade:
        asked.append(answer)
        return Grade(True, answer)

    graded = quickly(ask)
    first, second = (Problem("reasoning-gym:legs", index, "?", "4") for index in range(2))
    assert [graded(problem, "4").correct for problem in (first, first, second)] == [True] * 3
    assert asked == ["4", "4"]


def some_signals(groups: int = 5, sequences: int = 12) -> Signals:
    rng = np.random.default_rng(0)
    dots = rng.normal(size=(2, sequences, groups)) * np.exp(rng.normal(size=groups))
    squares = np.square(dots) * np.exp(rng.normal(size=groups)) + 0.1
    return Signals(tuple(map(str, range(groups))), squares, dots, np.full(groups, 7.0), np.exp(rng.normal(size=groups)))


@pytest.mark.parametrize(
    "found",
    [
        mappings.sigmoid_of(1.0),
        mappings.sigmoid_of(-1.0),
        mappings.two_endpoints(quadratic=True),
        mappings.two_endpoints(quadratic=False),
        mappings.together,
    ],
)
def test_a_mapping_goes_from_the_base_to_the_long_model(found):
    its = some_signals()
    assert found(1e-9, its) == pytest.approx(np.zeros(5), abs=1e-3)
    assert found(1 - 1e-9, its) == pytest.approx(np.ones(5), abs=1e-3)
    middle = found(0.5, its)
    assert ((middle >= 0) & (middle <= 1)).all()
    assert middle.std() > 0.01


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_the_quadratic_programme_has_the_least_of_what_it_minimises(strength):
    its = some_signals()

    def cost(alphas: np.ndarray) -> float:
        low, high = (np.square(its.dots[at] @ x).sum() for at, x in ((BASE, alphas), (LONG, 1 - alphas)))
        pull = 1e-3 * (np.square(its.dots[0]).sum() * (1 - strength) + np.square(its.dots[1]).sum() * strength) / 5
        return (1 - strength) * low + strength * high + pull * np.square(alphas - strength).sum()

    best = mappings.together(strength, its)
    rng = np.random.default_rng(1)
    for _ in range(200):
        other = np.clip(best + rng.normal(size=5) * rng.choice([1e-3, 0.1]), 0, 1)
        assert cost(other) >= cost(best) * (1 - 1e-9)


def test_anchored_is_half_of_the_strength_at_the_largest_score():
    its = some_signals()
    alphas = mappings.anchored(0.7, adapted=False)(0.8, its)
    assert alphas[mappings.score(its).argmax()] == pytest.approx(0.4)
    assert alphas.min() == pytest.approx(0.4)


def test_the_top_directions_stay_the_bases(folder):
    base, long = (reference.load(folder / name) for name in ("base", "long"))
    assert reference.load(folder / without_top_directions(folder, 0.0)).keys() == long.keys()
    none, half, whole = (reference.load(folder / without_top_directions(folder, share)) for share in (0.0, 0.5, 1.0))
    for name, value in none.items():
        assert value == pytest.approx(long[name], abs=1e-6)
    name = "model.layers.1.mlp.up_proj.weight"
    u, _, vt = np.linalg.svd(base[name], full_matrices=False)
    k = -(-min(base[name].shape) // 2)
    inside = u[:, :k].T @ (half[name] - base[name]) @ vt[:k].T
    assert inside == pytest.approx(np.zeros((k, k)), abs=1e-5)
    assert np.abs(half[name] - base[name]).max() > 1e-3
    square = "model.layers.1.self_attn.o_proj.weight"
    assert whole[square] == pytest.approx(base[square], abs=1e-5)
    assert half["model.embed_tokens.weight"] == pytest.approx(long["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["fim_ta attention and MLP", "fim_ta per tensor", "fim_ta outside own", "together"])
def test_a_variants_config_has_the_mappings_coefficients(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.evidence.variants.signals", lambda pair, _inputs: signals(pair, FEW))
    config = VARIANTS[name].merged(folder, 0.4)
    assert isinstance(config, MergeConfiguration)
    merge_whole(config, None, str(tmp_path / "out"), MergeOptions(quiet=True, copy_tokenizer=False))
    base, long, merged = (reference.load(path) for path in (folder / "base", folder / "long", tmp_path / "out"))
    its = signals(folder, FEW)
    part = {"fim_ta attention and MLP": mappings.block, "fim_ta per tensor": mappings.itself}.get(name, mappings.whole)
    groups = mappings.groups_by(its.tensors, part)
    others = [i for i, tensor in enumerate(its.tensors) if "layers" not in tensor]
    own = name.endswith("own")
    found = mappings.together if name == "together" else mappings.sigmoid_of(1.0)
    alphas = found(0.4, its.grouped([*groups, others] if own else groups))
    expected = {its.tensors[i]: a for group, a in zip(groups, alphas, strict=False) for i in group}
    for tensor, value in merged.items():
        alpha = expected.get(tensor, alphas[-1] if own else alphas.mean())
        assert value == pytest.approx(base[tensor] + alpha * (long[tensor] - base[tensor]), abs=1e-6)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of cellpylib, which reasoning-gym imports, if not compiled yet
def test_every_way_ends_in_the_answer():
    for examples in (
        words(random.Random(0), held=False),
        words(random.Random(0), held=True),
        characters(random.Random(0), held=True),
        gym(random.Random(0), seed=0),
    ):
        for _ in range(40):
            example = next(examples)
            assert all(text.rpartition("\n")[2] == example.answer for text in example.ways.values())
            lengths = [len(example.ways[way]) for way in ("short", "middle", "long")]
            assert lengths == sorted(lengths)


@pytest.mark.parametrize(("a", "b", "sign"), [(345, 289, "+"), (812, 377, "-"), (905, 7, "*"), (100, 99, "-")])
def test_columns_are_right(a, b, sign):
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    digits = []
    for line in columns(a, b, sign).splitlines():
        work, _, found = line.partition("=")
        assert eval(work) == int(found)
        digits.append(found)
    assert int(digits[-1] + "".join(digit[-1] for digit in reversed(digits[:-1]))) == value


def test_no_problem_was_trained_on():
    asked = {next(examples).question for examples in [characters(random.Random(1), held=True)] for _ in range(200)}
    taught = characters(random.Random(0), held=False)
    assert not asked & {next(taught).question for _ in range(5000)}


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("scratch")])
def test_the_tokenizer_of_models_from_scratch_keeps_every_character(name):
    kind = KINDS[name]
    model, tokenizer = kind.start(0)
    text = "<think>\n13-9=4\n</think>\n4"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(prompt_ids(tokenizer, "13-9")) == 6
    assert sum(p.numel() for p in model.parameters()) > 1e6


def test_the_stock_methods_that_are_left_out(folder, tmp_path):
    """With one fine-tuned model `linear` is task arithmetic, and `sce` the long model or the base."""
    base, long = (reference.load(folder / name) for name in ("base", "long"))

    def merged(method: str, weights: tuple[float | None, float | None], **shared) -> dict[str, np.ndarray]:
        models = [
            {"model": str(folder / name), "parameters": {"weight": weight} if weight is not None else {}}
            for name, weight in zip(("base", "long"), weights, strict=True)
            if method == "linear" or name == "long"
        ]
        content = {"merge_method": method, "models": models, "parameters": shared, "dtype": "float32"}
        if method != "linear":
            content["base_model"] = str(folder / "base")
        out = tmp_path / f"{method}{shared}"
        config = MergeConfiguration.model_validate(content)
        merge_whole(config, None, str(out), MergeOptions(quiet=True, copy_tokenizer=False))
        return reference.load(out)

    linear = merged("linear", (0.7, 0.3), normalize=False)
    arithmetic = merged("task_arithmetic", (None, 0.3), normalize=False)
    for name in base:
        assert linear[name] == pytest.approx(arithmetic[name], abs=1e-6)
        assert arithmetic[name] == pytest.approx(base[name] + 0.3 * (long[name] - base[name]), abs=1e-6)
    for topk, end in ((1.0, long), (0.5, base)):
        found = merged("sce", (None, None), select_topk=topk)
        assert all(found[name] == pytest.approx(end[name], abs=1e-6) for name in base)


# By entries and directions


def task_vector_of(model, folder: Path) -> dict[str, torch.Tensor]:
    base, _ = entries.weights(folder)
    return {name: tensor.detach() - base[name] for name, tensor in model.named_parameters()}


def test_merges_by_entries(folder):
    _, deltas = entries.weights(folder)
    matrix = next(name for name in deltas if name.endswith("down_proj.weight"))
    pair = entries.top_singular_pair(folder)[matrix]
    left, values, right = np.linalg.svd(deltas[matrix].numpy())
    assert pair.numpy() == pytest.approx(values[0] * np.outer(left[:, 0], right[0]), abs=1e-5)
    few = entries.top_singular_pair(folder, density=0.05)[matrix]
    assert few.count_nonzero() == int(0.05 * few.numel())
    assert few.abs()[few != 0].min() >= pair.abs()[few == 0].max()
    fisher = entries.diagonal_fisher(folder, FEW)[BASE]
    kept = entries.by_saliency(folder, FEW, 0.1)
    by = {name: delta.square() / (fisher[name] + fisher[name].mean() + 1e-30) for name, delta in deltas.items()}
    for name, values in kept.items():
        assert ((values == 0) | (values == deltas[name])).all()
        assert by[name][values != 0].min() >= by[name][values == 0].max()
    fused = entries.arcee_fusion(folder)
    assert all(((d.abs() < 1e-7) | ((d - deltas[name]).abs() < 1e-6)).all() for name, d in fused.items())
    half = task_vector_of(entries.scaled(entries.top_singular_pair)(folder, 0.5), folder)
    assert half[matrix].numpy() == pytest.approx(pair.numpy() / 2, abs=1e-6)


def test_fisher_merging_goes_from_base_to_long(folder):
    _, deltas = entries.weights(folder)
    low, high = entries.diagonal_fisher(folder, FEW)
    for strength, expected in ((0.0, 0.0), (1.0, 1.0)):
        found = task_vector_of(entries.diagonal_fisher_merge(folder, strength, FEW), folder)
        assert all(found[name].numpy() == pytest.approx(expected * d.numpy(), abs=1e-6) for name, d in deltas.items())
    found = task_vector_of(entries.diagonal_fisher_merge(folder, 0.3, FEW, damping=0.5), folder)
    for name, delta in deltas.items():
        if not high[name].any():
            continue
        ends = [(f[name] + 0.5 * f[name].mean()).double() for f in (low, high)]
        alpha = 0.3 * ends[1] / (0.7 * ends[0] + 0.3 * ends[1])
        assert found[name].numpy() == pytest.approx((alpha * delta).numpy(), abs=1e-5)


@pytest.mark.parametrize("by", ["mean", "input", "drift"])
def test_merging_by_inputs_is_regmean_with_weights(by, folder):
    _, deltas = entries.weights(folder)
    low, high = directions.recorded(folder, FEW)
    found = task_vector_of(Directions(FEW, damping=0.01, by=by)(folder, 0.3), folder)
    for name, delta in deltas.items():
        expected = 0.3 * delta.double().numpy()
        if name in low:
            ends = low[name].numpy(), high[name].numpy()
            a0, a1 = (x.T @ x / len(x) for x in ends)
            same = (a0 + a1).diagonal() / 2 if by == "input" else np.mean((ends[1] - ends[0]) ** 2) * np.ones(len(a0))
            added = [np.full(len(a), a.diagonal().mean()) if by == "mean" else same for a in (a0, a1)]
            a0, a1 = (a + 0.01 * np.diag(more) for a, more in zip((a0, a1), added, strict=True))
            expected = delta.double().numpy() @ (0.3 * a1) @ np.linalg.inv(0.7 * a0 + 0.3 * a1)
        assert found[name].numpy() == pytest.approx(expected, abs=1e-5)
    assert len(low) == 3 * 7


def test_in_an_orthonormal_basis_no_direction_grows(folder):
    _, deltas = entries.weights(folder)
    low, high = directions.recorded(folder, FEW)
    found = task_vector_of(Directions(FEW, basis="sum")(folder, 0.3), folder)
    for name in low:
        a0, a1 = (x.T @ x / len(x) for x in (low[name].numpy(), high[name].numpy()))
        a0, a1 = (a + 1e-3 * a.diagonal().mean() * np.eye(len(a)) for a in (a0, a1))
        basis = np.linalg.eigh(a0 + a1)[1]
        alphas = [0.3 * u @ a1 @ u / (0.7 * u @ a0 @ u + 0.3 * u @ a1 @ u) for u in basis.T]
        expected = deltas[name].double().numpy() @ basis * alphas @ basis.T
        assert found[name].numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", EXPLORED)
def test_what_is_explored_goes_from_base_to_long(folder, name):
    _, deltas = entries.weights(folder)
    merged = EXPLORED[name].merged
    made = replace(merged, inputs=replace(merged.inputs, samples=4, length=12))
    for strength in (0.0, 1.0):
        found = task_vector_of(made(folder, strength), folder)
        assert all(found[n].numpy() == pytest.approx(strength * d.numpy(), abs=1e-5) for n, d in deltas.items())


def test_coefficients_of_directions():
    ratios = torch.tensor([0.5, 4.0, 1.0, 2.0], dtype=torch.float64)
    assert share(ratios, 0.5).tolist() == [0.0, 1.0, 0.0, 1.0]
    odds = power(3.0)(ratios, 0.2) / (1 - power(3.0)(ratios, 0.2))
    assert odds.tolist() == pytest.approx((0.25 * ratios**3).tolist())
    assert sorted(directions.permuted(ratios).tolist()) == sorted(ratios.tolist())


# Over pairs


@pytest.mark.parametrize("skewness", [0, 1, -1])
def test_the_interval_over_lineages_covers_the_mean(skewness):
    rng = np.random.default_rng(0)
    draws = rng.gamma(4, 0.5, (20_000, 9)) - 2 if skewness else rng.normal(size=(20_000, 9))  # gamma of 4: skewness 1
    low, high = over_pairs.t_interval(draws * (skewness or 1) + 0.25)
    assert 0.93 <= np.mean((low <= 0.25) & (high >= 0.25)) <= 0.96


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_without_effect_hardly_any_family_has_one_that_is_significant(shared):
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(2_000, 10, 9)) + shared * rng.normal(size=(2_000, 1, 9))  # [family, method, lineage]
    assert (over_pairs.holm(over_pairs.sign_flip(draws)) < 0.05).any(axis=1).mean() <= 0.06


def test_an_effect_is_found():
    rng = np.random.default_rng(2)
    found = over_pairs.family({"none": rng.normal(size=9), "large": rng.normal(3, 1, size=9)})
    assert found["none"].adjusted > 0.05
    assert found["large"].adjusted == 2 * found["large"].p == 2 * 2 / 2**9
    low, high = found["large"].interval
    assert low < 3 < high


def test_signs_are_changed_in_all_ways():
    # Of the eight sums ±1 ±2 ±4 those of 5 and 7, on either side, are as large as 1 − 2 − 4 = −5.
    assert over_pairs.sign_flip(np.array([1.0, -2.0, -4.0])) == 4 / 8
    assert over_pairs.sign_flip(np.array([0.1, 0.2, 0.3])) == 2 / 8
    values = np.random.default_rng(3).normal(0.3, 1, size=18)
    signs = 1 - 2 * (np.arange(1 << 18)[:, None] >> np.arange(18) & 1)
    exact = np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-9)
    assert over_pairs.sign_flip(values) == pytest.approx(exact, abs=0.01)
    assert over_pairs.sign_flip(np.full(18, 0.1)) > 0  # what was observed is one of the draws


def test_holms_correction():
    assert over_pairs.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert over_pairs.holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0]


def test_pairs_of_one_lineage_count_once():
    assert over_pairs.of_lineages([("a", 1.0), ("b", 5.0), ("a", 2.0)]).tolist() == [1.5, 5.0]
    alone = over_pairs.mean(np.array([0.25]))
    assert (alone.value, alone.interval, alone.p, alone.lineages) == (0.25, None, 1.0, 1)


# What a pair shows


def outcomes(run: str, method: str | None, strength: float | None, right: int, tokens: int) -> Outcomes:
    """Of twenty problems, of which the first are answered right, at one length."""
    correct = (np.arange(20) < right)[:, None]
    settings = {} if strength is None else {"strength": strength}
    return Outcomes(run, method, settings, correct, np.full((20, 1), tokens))


FRONTS = {
    "task_arithmetic": [outcomes("task_arithmetic @0.50000", "task_arithmetic", 0.5, 12, 30)],
    "ties density 0.2": [outcomes("ties density 0.2 @1.00000", "ties density 0.2", 1.0, 16, 30)],
    "fim_ties": [outcomes("fim_ties @1.00000", "fim_ties", 1.0, 18, 30)],
}
ANSWERS = Answers(
    {"base": outcomes("base", None, None, 4, 10), "long": outcomes("long", None, None, 20, 50)},
    FRONTS,
    {"base": 3.0, "long": 3.25, "task_arithmetic @0.50000": 3.125, "fim_ties @1.00000": 3.5},
)
rows_of = functools.cache(rows)
WITH_PARENT = replace(ANSWERS, models={**ANSWERS.models, "parent": outcomes("parent", None, None, 19, 25)})


def pair_of(seed: int, answers: Answers = ANSWERS, **others) -> Found:
    """What a pair of those outcomes shows."""
    found = {
        "kind": "words",
        "one_sided": None,
        "ends": ends(answers),
        "rows": rows_of(answers),
        "prose": {name: answers.prose[name] for name in ("base", "long")},
        "distance": 0.0125,
        "hours": 0.75,
        "source": "a test",
        "fidelity": {},
    } | others
    return Found(seed=seed, **found)


def one_sided(seed: int, steps: int = 60, **others) -> Found:
    """The same of a one-sided pair."""
    return pair_of(seed, WITH_PARENT, **({"kind": "scratch-gpt2", "one_sided": steps} | others))


def without_answers(seed: int, **others) -> Found:
    """What is left of a pair whose answers weren't kept."""
    return pair_of(seed, rows=tuple(replace(row, gain=None) for row in pair_of(seed).rows), **others)


def test_a_variant_is_laid_beside_the_chord_uniform_and_trimming_alone():
    uniform, ties, ours = pair_of(7).rows
    # At 30 of 10 to 50 tokens each front has a corner, which is as high above the chord as half of its area says.
    assert [row.area for row in (uniform, ties, ours)] == pytest.approx([0.6, 0.7, 0.75])
    assert uniform.against is None
    assert uniform.trimmed is None
    assert ties.against is not None
    assert ties.trimmed is None
    assert ties.against.value == pytest.approx(0.1)
    assert ours.against is not None
    assert ours.against.value == pytest.approx(0.15)
    assert ours.trimmed is not None
    assert ours.trimmed.value == pytest.approx(0.05)
    assert [row.prose for row in (uniform, ties, ours)] == [3.125, None, 3.5]
    assert [row.points for row in (uniform, ours)] == [((0.5, 0.6, 30.0),), ((1.0, 0.9, 30.0),)]
    assert [row.gap for row in (uniform, ours)] == [0.5, 0.5]
    assert (ours.against.sign, ours.trimmed.sign) == (1, 0)
    low, high = ours.trimmed.interval
    assert low <= 0 <= 0.05 <= high


def test_a_gain_in_the_sample_has_no_interval():
    pair = without_answers(7)
    assert pair.above(pair.rows[2]) == Difference(0.15, None, None)
    kept = pair_of(7)
    assert kept.above(kept.rows[2]) is kept.rows[2].gain


def test_the_widest_gap_is_in_parts_of_the_way():
    assert widest_gap(10, 50, [30, 20]) == pytest.approx(0.5)
    assert widest_gap(10, 50, [20, 48, 34]) == pytest.approx(0.35)
    assert widest_gap(10, 50, [5, 60]) == 1.0
    assert widest_gap(10, 50, []) == 1.0


def test_what_a_pair_shows_is_kept(tmp_path):
    path = tmp_path / "words-7.json"
    fidelity = {"‖δ‖²": {"layers": [0.5, 0.7]}}
    its = pair_of(7, fidelity=fidelity, rows=(*pair_of(7).rows[:2],))
    save(path, its)
    assert load(path) == its
    # More answers don't cost what was measured of fidelity.
    save(path, pair_of(7))
    assert load(path) == pair_of(7, fidelity=fidelity)
    for other in (without_answers(7), one_sided(7)):
        save(path, replace(other, fidelity=fidelity))
        assert load(path) == replace(other, fidelity=fidelity)


def noisy(seed: int) -> Answers:
    """Answers that differ from problem to problem, some of them longer than a byte holds."""
    rng = np.random.default_rng(seed)

    def run(name: str, variant: str | None, strength: float | None, right: float, tokens: int) -> Outcomes:
        its = [rng.random((30, 1)) < right, rng.integers(tokens // 2, tokens * 2, (30, 1))]
        its += [rng.random((30, 1)) < 0.5 for _ in range(3)]
        return Outcomes(
            run=name,
            method=variant,
            settings={} if strength is None else {"strength": strength},
            **dict(zip(("correct", "tokens", "truncated", "unclosed", "empty"), its, strict=True)),
        )

    models = {
        name: run(name, None, None, *its) for name, its in zip(MODELS, ((0.2, 10), (0.9, 400), (0.8, 90)), strict=True)
    }
    fronts = {
        variant: [
            run(f"{variant} @{s:.5f}", variant, s, 0.2 + 0.6 * s, round(10 + 300 * s)) for s in (0.25, 0.5, 0.8125)
        ]
        for variant in ("task_arithmetic", "fim_ties", "ties density 0.2")
    }
    return Answers(models, fronts, {"base": 3.0, "long": 3.5, "fim_ties @0.50000": 3.75})


def test_rows_follow_from_the_answers_that_are_kept(tmp_path, monkeypatch):
    answers = noisy(0)
    path = tmp_path / f"{file_of('scratch-gpt2', 0, 60)}.npz"
    assert path.name == "scratch-gpt2-0-one-sided-60.npz"
    save_answers(path, answers)
    kept = load_answers(path)
    expected = rows(answers)
    assert rows(kept) == expected
    assert ends(kept) == ends(answers)
    assert kept.prose == answers.prose
    runs = [run for its in answers.fronts.values() for run in its] + list(answers.models.values())
    again = [run for its in kept.fronts.values() for run in its] + list(kept.models.values())
    for run, its in zip(runs, again, strict=True):
        assert (run.run, run.method, run.settings) == (its.run, its.method, its.settings)
        assert (run.correct == its.correct).all()
        assert (run.tokens == its.tokens).all()
        assert its.truncated is None
    with np.load(path, allow_pickle=False) as file:
        assert file["tokens"].dtype == np.uint16
    # Whatever the JSON says, it is made anew of the answers, without any model.
    its = one_sided(0, rows=(), ends={"base": (0, 0), "long": (0, 0), "parent": None}, fidelity={"‖δ‖²": {}})
    save(path.with_suffix(".json"), its)
    monkeypatch.setattr(sys, "argv", ["summary", str(path)])
    summary.main()
    assert load(path.with_suffix(".json")) == replace(its, rows=expected, ends=ends(answers))


@pytest.mark.parametrize("path", sorted((ROOT / summary.KEPT).glob("*.npz")), ids=lambda path: path.stem)
def test_what_is_kept_follows_from_its_answers(path):
    """A JSON in docs/evidence/ says what its answers say: the ends, and one variant's row, as each takes a while."""
    its, answers = load(path.with_suffix(".json")), load_answers(path)
    assert path.stem == file_of(its.kind, its.seed, its.one_sided)
    assert its.ends == ends(answers)
    assert [row.variant for row in its.rows] == list(answers.fronts)
    row = its.rows[its.seed % len(its.rows)]
    assert row == summary.row(answers, row.variant), "python -m benchmarks.evidence.summary makes it anew"


def put_tables(tmp_path: Path, pairs: list[Found], developed: list[Found] = ()) -> str:
    """A page with the tables of some pairs."""
    page = tmp_path / "page.md"
    command = f"<!-- {tables.COMMAND}: "
    page.write_text(f"Before.\n{command}begin -->\nold\n{command}end -->\nAfter.\n")
    put(page, tables.COMMAND, list(tables.page(tables.sides(pairs), developed)))
    return page.read_text()


def test_the_tables_say_which_variant_is_above_the_chord(tmp_path):
    pair = pair_of(7, fidelity={"ceiling": {"layers": [0.5, 0.75], "blocks": [1.0, 1.0], "all at once": [0.25, 0.25]}})
    text = put_tables(tmp_path, [pair])
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    assert "one-sided" not in text
    assert "luck" not in text
    assert "| pair | base | long | uniform" in text
    assert "| words 7 | 0.20 @ 10.0 | 1.00 @ 50.0 | 0.50: 0.60 @ 30 | 0.013 | 3 | 0.75 |" in text
    assert "| words 7 | 0.750, fim_ties | " in text
    assert ", 80.0% | " in text
    assert "\n| task_arithmetic | 0 | 80.0%, 80.0% (1) | 0.50 |\n" in text
    assert "\n| fim_ties | +0.150, 1 up | 100.0%, 100.0% (1) | 0.50 |\n" in text
    assert "\n| fim_ties | +0.050 |\n" in text
    assert "\n| ceiling | 0.62 / 1.00 / 0.25 |\n" in text
    missing = text.rpartition("\nNot run: ")[2].partition(".\n\n")[0].split("; ")
    assert missing == [name for name in VARIANTS if name not in FRONTS]
    assert "| base | 3.0000 |\n| long | 3.2500 |\n| task_arithmetic | 3.1250 |" in text
    tables.draw(tables.sides([pair]), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_tables_count_the_pairs_whose_interval_is_known(tmp_path):
    old = pair_of(6)
    ours = replace(old.rows[2], trimmed=Difference(0.03, -1, None), against=Difference(-0.05, None, None))
    pairs = [replace(old, rows=(*old.rows[:2], ours)), pair_of(7), replace(old, seed=8, rows=old.rows[:2])]
    text = put_tables(tmp_path, pairs)
    assert "\n| ties density 0.2 | +0.100 ± 0.000 | 93.3%, 95.6% (3) | 0.50 |\n" in text
    assert "\n| fim_ties | +0.050 ± 0.141 of 2, 1 of 1 up | 100.0%, 100.0% (2) | 0.50 |\n" in text
    assert "\n| fim_ties | +0.040 ± 0.014 of 2, 1 down |\n" in text
    gain = f"{ours.gain.value:+.3f}"
    assert f"\n| fim_ties | {gain} | {gain} | not run | {gain} ± 0.000 | " in text


def test_the_tables_say_that_a_gain_in_the_sample_has_luck_in_it(tmp_path):
    text = put_tables(tmp_path, [without_answers(6), without_answers(7)])
    assert "| variant | seed 6 | seed 7 | mean ± spread (luck included) | above 0 |" in text
    assert "\n| fim_ties | +0.150 | +0.150 | +0.150 ± 0.000 | not known |\n" in text
    assert "\n| words 6 (luck included) | 0.750, fim_ties | +0.000, 80.0% | " in text


def test_one_sided_pairs_come_first(tmp_path):
    pairs = [pair_of(0), one_sided(0, 300), one_sided(0, 60), one_sided(1, 60)]
    text = put_tables(tmp_path, pairs)
    found = [line for line in text.splitlines() if line.startswith("### ")]
    assert found[:2] == ["### Over the one-sided pairs", "### The pairs, one-sided"]
    assert found.index("### The pairs, two-sided") > found.index("### Above the chord: scratch-gpt2, one-sided")
    assert "| pair | base | parent | long | uniform" in text
    assert "\n| scratch-gpt2 0, one-sided 60 | 0.20 @ 10.0 | 0.95 @ 25.0 | 1.00 @ 50.0 | " in text
    assert "| variant | seed 0, 60 steps | seed 0, 300 steps | seed 1, 60 steps | mean ± spread | above 0 |" in text
    # Three pairs of two lineages, all alike.
    assert "\n| fim_ties | +0.150 [+0.150, +0.150], p 1.000 (2) | not run | not run | +0.050 " in text
    assert "\n| task_arithmetic | – | not run | not run | -0.100 " in text
    assert "\n| S3 | not run | not run | not run | not run |\n" in text
    short = "\n".join(tables.short_table(tables.sides(pairs)))
    assert "|  | GPT-2, one-sided (3) | SmolLM2, sums in words, two-sided (1) |" in short
    tables.draw(tables.sides(pairs), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_short_table_is_bold_where_every_pair_is_up():
    first, second = pair_of(7), pair_of(8)
    text = "\n".join(tables.short_table(tables.sides([first, second])))
    assert "|  | SmolLM2, sums in words, two-sided (2) |" in text
    assert "\n| `fim_ties`, density 0.2, the default | **+0.150** |" in text
    assert "\n| mergekit's `ties`, density 0.2 | +0.100 |" in text
    assert "\n| S³ (arXiv 2609.37976) | not run |" in text
    ours = replace(second.rows[2], against=Difference(0.05, 0, None))
    text = "\n".join(tables.short_table(tables.sides([first, replace(second, rows=(ours,))])))
    assert "\n| `fim_ties`, density 0.2, the default | +0.100 |" in text
    assert "\n| mergekit's `ties`, density 0.2 | +0.100 (1) |" in text


def test_what_is_developed_has_a_table_of_its_own(tmp_path):
    developed = replace(
        one_sided(7, 60), rows=(*pair_of(7).rows[:1], replace(pair_of(7).rows[1], variant=next(iter(EXPLORED))))
    )
    text = put_tables(tmp_path, [pair_of(0)], [developed])
    assert text.index("### Exploration, on pairs of development") > text.index("### The pairs, two-sided")
    assert text.count(f"\n| {next(iter(EXPLORED))} | ") == 1
    assert "### Over the one-sided pairs" not in text


def test_what_is_listed_and_drawn_is_there():
    assert set(LISTED) <= set(VARIANTS)
    assert set(tables.DRAWN) <= set(LISTED)
    assert len(tables.DRAWN) <= 6


def test_what_can_no_longer_be_answered_says_since_when(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evidence", "scratch-llama", "0", str(tmp_path), "fim_kron both factors"])
    with pytest.raises(SystemExit):
        evidence.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert "fim_kron both factors can't be answered any more: it was answered at commit 3019a90" in said
    assert not list(tmp_path.iterdir())


def test_the_pages_are_of_what_is_kept(loaded, tmp_path):
    """docs/evidence.md and README.md have been made anew since docs/evidence/ changed."""
    pages = {"--write": ROOT / "docs/evidence.md", "--short": ROOT / "README.md"}
    copies = {option: tmp_path / page.name for option, page in pages.items()}
    for option, page in pages.items():
        shutil.copy(page, copies[option])
    options = [str(part) for pair in copies.items() for part in pair]
    loaded.run("-m", "benchmarks.evidence.tables", *options, cwd=ROOT)
    for option, page in pages.items():
        assert copies[option].read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
