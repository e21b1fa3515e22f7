"""A kept merge's results as the Hub reads them."""

import pytest
from huggingface_hub import ModelCard

from mergekit_fim.evaluate.front.eval_results import eval_results
from mergekit_fim.evaluate.front.findings import find
from mergekit_fim.evaluate.front.gathered import gather
from mergekit_fim.evaluate.records import Row
from mergekit_fim.report.card import write_section

HEAD = {"base_model": ["some/base"], "library_name": "transformers", "tags": ["mergekit", "merge"]}
CARD = "---\nbase_model:\n- some/base\nlibrary_name: transformers\ntags:\n- mergekit\n- merge\n\n---\n# merged\n"
PROBLEMS = [
    {"source": "hf:openai/gsm8k:main:test", "problems": 2, "kind": "hf", "dataset": "openai/gsm8k", "config": "main",
     "split": "test", "rows": 9},
    {"source": "reasoning-gym:chain_sum", "problems": 2, "kind": "reasoning-gym", "task": "chain_sum", "seed": 3},
    {"source": "reasoning-gym:gcd", "problems": 2, "kind": "reasoning-gym", "task": "gcd", "seed": 3},
    {"source": "/home/me/sums.jsonl", "problems": 2, "kind": "file", "path": "/home/me/sums.jsonl", "sha256": "ab"},
    {"source": "other:thing", "problems": 2, "kind": "other"},
]  # fmt: skip


def findings(problems):
    methods = {"base": None, "long": None, "m": "m"}
    rows = [
        Row(run, methods[run], {}, its["source"], str(problem), 0, (i + problem) % 2, 10 * i + tokens)
        for run, tokens in (("base", 5), ("long", 50), ("m", 20))
        for i, its in enumerate(problems)
        for problem in range(2)
    ]
    return find(gather({"a": rows}), ("base", ["long"]), seed=0, margin=0.05)


@pytest.mark.parametrize("problems", [PROBLEMS, PROBLEMS[:1]])
def test_the_card_is_read_back(problems, tmp_path):
    found = findings(problems)
    (tmp_path / "README.md").write_text(CARD)
    for _ in range(2):  # the second time they take the place of the first
        write_section(str(tmp_path), measured="| m |", results=eval_results(found, "m", problems))
    card = ModelCard.load(tmp_path / "README.md")
    assert {name: card.data.to_dict()[name] for name in HEAD} == HEAD
    assert card.text.startswith("\n# merged\n") or card.text.startswith("# merged\n")
    assert "### Measured\n\n| m |" in card.text
    results = card.data.eval_results
    assert card.data.model_name == tmp_path.name
    assert len(results) == 2 * len(problems)
    for its, accuracy, tokens in zip(problems, results[::2], results[1::2], strict=True):
        shown = found.by_source.get(its["source"], found.summary)["m"]
        assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", shown.accuracy.value)
        assert (tokens.metric_type, tokens.metric_value) == ("mean_answer_tokens", shown.tokens_mean)
        assert accuracy.source_url is None  # the package is on no index yet
        assert accuracy.dataset_args["problems"] == 2
    first = results[0]
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == ("openai/gsm8k", "main", "test")


def test_no_path_of_this_machine_is_in_a_card(tmp_path):
    (tmp_path / "data").mkdir()
    problems = [PROBLEMS[3], {**PROBLEMS[0], "source": f"hf:{tmp_path}/data", "dataset": f"{tmp_path}/data"}]
    results = list(eval_results(findings(problems), "m", problems))
    assert [its.dataset_type for its in results[::2]] == ["sums.jsonl", "data"]
    assert "/home" not in str(results)
    assert str(tmp_path) not in str(results)
