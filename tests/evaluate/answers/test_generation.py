"""Completions by transformers: the same whatever is beside them in a batch, and none lost or given twice."""

import copy
import dataclasses
import functools
import gc
import math
import weakref
from collections.abc import Callable, Sequence

import pytest
import tiny
import torch
import transformers
from mergekit.options import MergeOptions
from tokenizers.processors import TemplateProcessing

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.answers import draws, generation
from mergekit_fim.evaluate.answers.batches import Row
from mergekit_fim.evaluate.answers.engine import Decoding
from mergekit_fim.evaluate.answers.generation import complete
from mergekit_fim.evaluate.answers.loading import LanguageModel, load_model
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.answers.tokens import load_tokenizer
from mergekit_fim.evaluate.records import LENGTH, STOP, Completion

TEXTS = [
    *("3 + 4 = ", "what?", "a", "The quick brown fox jumps", "x" * 20, "12 apples and 7", "zz top", "hello world"),
    *(" ~", "Q: 1", "[]{}", "ABCDEFGHIJKLMNOP", "no", "0.125 * 8", "Paris is the", "!"),
]
PROMPTS = [Prompt("p", i, 0, text, False) for i, text in enumerate(TEXTS)]
COUNT = 40
# Their caches: keys and values alone; also with learned positions; windows; windows and not; states; states and not.
SHAPES = {
    "llama": {},
    "gpt2": {},
    "mistral": {},
    "gemma2": {"sliding_window": 6},
    "mamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]},
    "recurrent_gemma": {},  # reads its padding
}


def shape(kind: str) -> transformers.PretrainedConfig:
    if kind == "recurrent_gemma":
        sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "lru_width": 32}
        return transformers.RecurrentGemmaConfig(**sizes, **heads, **ids, attention_window_size=16)
    return tiny.config(kind, **SHAPES[kind])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[..., LanguageModel]:
    """A model of a kind, with changes of its config, loaded from a folder; the same one if asked again."""

    @functools.cache
    def make(kind: str = "llama", **changes) -> LanguageModel:
        folder = tmp_path_factory.mktemp(kind)
        cfg = shape(kind)
        cfg.update(changes)
        tiny.save(tiny.build(cfg), folder)
        tiny.tokenizer().save_pretrained(folder)
        tokenizer = load_tokenizer(kind, str(folder), None, False)
        return load_model(kind, str(folder), tokenizer, MergeOptions(), None)

    return make


@pytest.fixture(scope="module")
def llama(models) -> LanguageModel:
    return models()


Pick = Callable[[Prompt, int, torch.Tensor], tuple[int, float]]


def likeliest(prompt: Prompt, step: int, scores: torch.Tensor) -> tuple[int, float]:
    best = scores.topk(2)
    return int(best.indices[0]), float(best.values[0] - best.values[1])


def drawn(seed: int, temperature: float) -> Pick:
    def pick(prompt: Prompt, step: int, scores: torch.Tensor) -> tuple[int, float]:
        ends = torch.softmax(scores.double() / temperature, -1).cumsum(-1)
        ends /= ends[-1].clone()
        at = draws.uniform(seed, prompt.key, step)
        return int((ends <= at).sum()), float((ends - at).abs().min())

    return pick


def logits(network: torch.nn.Module, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """For the token after each, without a cache. Rows are padded at their ends, which no token before them sees."""
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    with torch.no_grad():
        found = network(padded, use_cache=False).logits
    return [scores[: len(row)] for scores, row in zip(found, rows, strict=True)]


def written(model: LanguageModel, prompts: Sequence[Prompt], pick: Pick = likeliest) -> dict[Prompt, list[int] | None]:
    """What the model writes by itself; None where a choice is so close that rounding may turn it.

    All prompts go on at the same time. Then every choice is made again from its row alone.
    """
    given = {p: model.tokenizer.encode(p.text, add_special_tokens=p.special) for p in prompts}
    rows = {prompt: list(ids) for prompt, ids in given.items()}
    going = list(prompts)
    for step in range(COUNT):
        going = [p for p in going if model.context is None or len(rows[p]) < model.context]
        if not going:
            break
        for prompt, scores in zip(going, logits(model.model, [rows[p] for p in going]), strict=True):
            rows[prompt].append(pick(prompt, step, scores[-1])[0])
        going = [p for p in going if rows[p][-1] not in model.stop]

    def alone(prompt: Prompt) -> list[int] | None:
        start, ids = len(given[prompt]), rows[prompt]
        (scores,) = logits(model.model, [ids[:-1]])
        for step, token in enumerate(ids[start:]):
            chosen, margin = pick(prompt, step, scores[start + step - 1])
            if margin < 1e-4:
                return None
            assert chosen == token
        return ids[start:]

    return {prompt: alone(prompt) for prompt in prompts}


def completion(model: LanguageModel, ids: Sequence[int]) -> Completion:
    ended = STOP if ids[-1] in model.stop else LENGTH
    text = "".join(tiny.CHARACTERS[i] for i in ids[: len(ids) - (ended == STOP)])
    return Completion(text, len(ids), ended)


def expected(model: LanguageModel, prompts: Sequence[Prompt] = PROMPTS, pick: Pick = likeliest) -> dict:
    """The prompts whose answers don't hang on rounding, with those."""
    clear = {prompt: completion(model, ids) for prompt, ids in written(model, prompts, pick).items() if ids}
    assert len(clear) >= 0.6 * len(prompts)
    return clear


def stopping(model: LanguageModel, *, count: int = 3) -> LanguageModel:
    """The same model, whose answers end with tokens that it really writes, at various steps."""
    answers = [ids or [] for ids in written(model, PROMPTS).values()]
    first = sorted({token: i for row in answers for i, token in reversed(list(enumerate(row)))}.items(), key=str)
    late = [token for token, at in first if at >= 4][:count]
    return dataclasses.replace(model, stop=tuple(sorted({*model.stop, *late})))


def answered(model: LanguageModel, prompts: Sequence[Prompt], **options) -> dict[Prompt, Completion]:
    pairs = list(complete(model, prompts, Decoding(**{"max_tokens": COUNT} | options)))
    assert len(pairs) == len({prompt for prompt, _ in pairs}) == len(prompts)  # each once
    return dict(pairs)


def watch(monkeypatch, model: LanguageModel, look: Callable[[torch.Tensor], None]) -> None:
    """Look at the tokens that go into the model, before they do."""
    forward = model.model.forward

    @functools.wraps(forward)
    def watched(input_ids, *arguments, **options):
        look(input_ids)
        return forward(input_ids, *arguments, **options)

    monkeypatch.setattr(model.model, "forward", watched)


# The answers


@pytest.mark.parametrize("kind", SHAPES)
def test_answers_are_what_the_model_writes_alone(kind, models):
    model = stopping(models(kind))
    assert model.joins == (kind in ("llama", "gpt2"))
    assert model.pads == (kind != "recurrent_gemma")
    # transformers' recurrent_gemma goes on from its last prompt where the next is one token
    right = expected(model, PROMPTS if model.pads else [prompt for prompt in PROMPTS if len(prompt.text) > 1])
    assert {c.ended for c in right.values()} == {STOP, LENGTH}
    assert len({c.tokens for c in right.values()}) >= 3
    for batch, count in ((1, 5), (3, None), (8, None), (None, None)):
        some = dict(list(right.items())[:count])
        assert answered(model, list(some), batch=batch) == some, f"batch {batch}"


def test_and_what_generate_writes(llama):
    right = expected(llama)
    for prompt, found in answered(llama, list(right)).items():
        ids = llama.tokenizer(prompt.text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        plain = llama.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=COUNT,
            eos_token_id=list(llama.stop),
            pad_token_id=0,
        )
        assert found == completion(llama, plain[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_draws_depend_on_the_prompt_alone(kind, models):
    model = stopping(models(kind))
    prompts = [dataclasses.replace(prompt, sample=sample) for prompt in PROMPTS[:8] for sample in (0, 1)]
    right = expected(model, prompts, drawn(5, 0.8))
    for batch in (1, 3, None):
        found = answered(model, list(right), batch=batch, temperature=0.8, seed=5)
        assert found == right, f"batch {batch}"
    assert answered(model, list(right)[::-1], temperature=0.8, seed=5, batch=3) == right
    texts = {prompt.text: {c.text for p, c in right.items() if p.text == prompt.text} for prompt in right}
    assert any(len(both) == 2 for both in texts.values())  # samples differ
    others = answered(model, list(right), temperature=0.8, seed=6)
    assert sum(others[prompt] != right[prompt] for prompt in right) > len(right) / 2


def test_draws_follow_the_model_s_distribution(llama):
    count, temperature = 4000, 1.3
    prompts = [Prompt("p", i, sample, "1 + 1", False) for i in range(count // 4) for sample in range(4)]
    found = answered(llama, prompts, max_tokens=1, temperature=temperature, seed=3, batch=1000)
    ids = llama.tokenizer.encode("1 + 1", add_special_tokens=False)
    likely = torch.softmax(logits(llama.model, [ids])[0][-1].double() / temperature, -1) * count
    counts = torch.zeros(tiny.VOCAB, dtype=torch.float64)
    for c in found.values():
        counts[tiny.CHARACTERS.index(c.text) if c.text else tiny.VOCAB - 1] += 1
    often = likely >= 5
    assert often.sum() > 10
    squares = float(((counts - likely)[often] ** 2 / likely[often]).sum())
    degrees = int(often.sum()) - 1
    assert squares < degrees + 6 * math.sqrt(2 * degrees)
    assert squares > degrees - 6 * math.sqrt(2 * degrees)  # nor is it evener than chance


def test_a_low_temperature_is_greedy(llama):
    right = expected(llama)
    assert answered(llama, list(right), temperature=1e-6) == right


def test_settings_of_the_model_don_t_leak_in(models, tmp_path):
    """What its generation config asks for would change the answers, and be something else for each model of a sweep."""
    changed = tiny.build(tiny.config("llama"))
    changed.generation_config = transformers.GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[1, 2, 3], do_sample=True, top_k=3, max_length=9
    )
    tiny.save(changed, tmp_path)
    tokenizer = tiny.tokenizer()
    model = load_model("m", str(tmp_path), tokenizer, MergeOptions(), None)
    right = expected(model)
    assert answered(model, list(right)) == right
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    penalized = stock.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT)
    assert penalized[0, ids.shape[1] :].tolist() != written(model, PROMPTS[:1])[PROMPTS[0]]


def test_special_tokens_where_they_are_wanted(llama, monkeypatch):
    model = dataclasses.replace(llama, tokenizer=copy.deepcopy(llama.tokenizer))
    bos = TemplateProcessing(single="<think> $A", special_tokens=[("<think>", tiny.VOCAB - 2)])
    model.tokenizer.backend_tokenizer.post_processor = bos
    seen: list[list[int]] = []
    watch(monkeypatch, model, lambda ids: seen.append(ids[0].tolist()))
    plain = model.tokenizer.encode("ab", add_special_tokens=False)
    list(complete(model, [Prompt("p", 0, 0, "ab", True)], Decoding(max_tokens=1)))
    list(complete(model, [Prompt("p", 0, 0, "ab", False)], Decoding(max_tokens=1)))
    assert seen == [[tiny.VOCAB - 2, *plain], plain]


def test_tags_stay_in_the_text_and_the_end_token_is_counted(llama):
    row = Row(PROMPTS[0], [5], 9)
    think = tiny.CHARACTERS.index("<think>")
    row.take([think, 33, 0, 12, 0, 33, llama.stop[0], 50, 50], llama.stop)
    found = llama.completion(row.ids, row.written)
    assert found == Completion("<think>A , A", 7, STOP)
    assert found.prompt_tokens == 1


# Where answers end

CHAT = "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}END\n{% endfor %}"
ENDS = {
    "a token of its own": (CHAT.replace("END", "<turn>"), {"<turn>"}),
    "after a space": (CHAT.replace("END", " <turn>"), {"<turn>"}),
    "the tokenizer's": (CHAT.replace("END", "{{ eos_token }}"), set()),
    "words": (CHAT.replace("END", "\nUser:"), set()),
    "nothing": (CHAT.replace("END\n", ""), set()),
    "raises": ("{{ raise_exception('only one turn') }}", set()),
    "leaves the answer out": ("{{ messages[0].content }}<turn>", set()),
    "none": (None, set()),
}


@pytest.mark.parametrize("case", ENDS)
def test_stop_tokens(case, tmp_path):
    template, found = ENDS[case]
    cfg = tiny.config("llama", eos_token_id=40, vocab_size=110)
    model = tiny.build(cfg)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[41, 42])
    tiny.save(model, tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "<start>", "<turn>"]})
    tokenizer.chat_template = template
    loaded = load_model("m", str(tmp_path), tokenizer, MergeOptions(), None)
    names = {"<end>"} | found
    assert loaded.stop == tuple(sorted([40, 41, 42, *tokenizer.convert_tokens_to_ids(sorted(names))]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_the_context_limits_answers(kind, models):
    """gpt2 has no embedding for a position beyond it, so that a row that went on would end in an error."""
    model = models(kind, **{"n_positions" if kind == "gpt2" else "max_position_embeddings": 32})
    assert model.context == 32
    model = dataclasses.replace(model, stop=())
    right = {prompt: ids for prompt, ids in written(model, PROMPTS).items() if ids}
    found = answered(model, list(right), batch=5)
    assert {c.ended for c in found.values()} == {LENGTH}
    assert {p: c.tokens for p, c in found.items()} == {p: 32 - len(p.text) for p in right}
    assert {p: c.text for p, c in found.items()} == {p: completion(model, ids).text for p, ids in right.items()}


def test_without_stop_tokens_answers_end_at_the_limit(llama):
    model = dataclasses.replace(llama, stop=(), context=None)
    assert {(c.tokens, c.ended) for c in answered(model, PROMPTS, max_tokens=7).values()} == {(7, LENGTH)}


# Memory


def failing(monkeypatch, model: LanguageModel, fits: Callable[[int, int], bool]) -> list[int]:
    """Let memory run out where (rows, calls so far) don't fit; the rows of all calls."""
    seen: list[int] = []

    def look(ids: torch.Tensor) -> None:
        seen.append(len(ids))
        if not fits(len(ids), len(seen)):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    watch(monkeypatch, model, look)
    return seen


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("case", ["too many rows", "once in a while"])
def test_where_memory_runs_out_batches_halve(case, kind, models, monkeypatch):
    model = stopping(models(kind))
    right = expected(model)
    fits = {
        "too many rows": lambda rows, calls: rows <= 3,
        "once in a while": lambda rows, calls: rows == 1 or calls % 25,
    }[case]
    seen = failing(monkeypatch, model, fits)
    assert answered(model, list(right), batch=8) == right
    if case == "too many rows":
        assert sum(rows > 3 for rows in seen) <= 3  # and it doesn't try again
        assert max(rows for rows in seen if rows <= 3) > 1


def test_memory_that_runs_out_between_answers_loses_none(llama, monkeypatch):
    model = stopping(llama)
    right = expected(model)
    seen = failing(monkeypatch, model, lambda rows, calls: rows < 5 or calls < 20)
    given = []
    for pair in complete(model, list(right), Decoding(max_tokens=COUNT, batch=8)):
        given.append((pair, len(seen)))
    assert dict(pair for pair, _ in given) == right
    assert len(given) == len(right)
    assert given[0][1] < 20 < given[-1][1]


def test_a_row_that_doesn_t_fit_alone(llama, monkeypatch):
    failing(monkeypatch, llama, lambda rows, calls: calls < 4)
    with pytest.raises(FimError, match=r"llama: memory ran out at the \d+ tokens of p, problem 3, alone; lower"):
        list(complete(llama, PROMPTS, Decoding(max_tokens=COUNT, batch=1)))


def test_other_errors_aren_t_taken_for_memory(llama, monkeypatch):
    def look(ids: torch.Tensor) -> None:
        raise RuntimeError("a bug")

    watch(monkeypatch, llama, look)
    with pytest.raises(RuntimeError, match="a bug"):
        list(complete(llama, PROMPTS, Decoding(max_tokens=COUNT)))


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_rows_at_once_follow_from_the_free_memory(kind, models, monkeypatch):
    model = stopping(models(kind))
    right = expected(model)
    cost = model.row_bytes + model.token_bytes * (25 + COUNT)  # of the longest prompt, at the end
    monkeypatch.setattr(generation, "_free_memory", lambda model: 2 * 3.5 * cost)
    seen: list[int] = []
    watch(monkeypatch, model, lambda ids: seen.append(len(ids)))
    assert answered(model, list(right)) == right
    assert 3 <= max(seen) <= 10  # shorter ones are cheaper


def test_rows_that_outgrow_the_memory_wait(llama, monkeypatch):
    """And go on later from what they wrote."""
    model = stopping(llama)
    right = expected(model)
    budget = model.token_bytes * 2 * (25 + COUNT)  # for two that are written to the end, or more that are not
    monkeypatch.setattr(generation, "_PIECE", 4)
    monkeypatch.setattr(generation, "_free_memory", lambda model: 2 * budget)
    held: list[tuple[int, float]] = []
    advanced = generation._advanced

    def watched(*arguments):
        batch = advanced(*arguments)
        rows, _, seen, _ = batch.cache.layers[0].keys.shape
        held.append((rows, rows * (seen + 1) * model.token_bytes))
        return batch

    monkeypatch.setattr(generation, "_advanced", watched)
    assert answered(model, list(right)) == right
    assert max(size for rows, size in held if rows > 1) <= budget
    assert max(rows for rows, _ in held) >= 4


def test_the_cache_s_size_is_found_by_trying(models):
    sizes = {kind: models(kind) for kind in ("llama", "mamba", "lfm2")}
    attention = 2 * 2 * 8 * 4  # keys and values, two heads of 8, float32
    assert (sizes["llama"].row_bytes, sizes["llama"].token_bytes) == (0, 5 * attention)
    assert (sizes["mamba"].row_bytes > 0, sizes["mamba"].token_bytes) == (True, 0)
    assert (sizes["lfm2"].row_bytes > 0, sizes["lfm2"].token_bytes) == (True, 2 * attention)


# Order


def test_answers_come_as_they_end_and_others_join(llama, monkeypatch):
    model = stopping(llama)
    right = expected(model)
    calls: list[tuple[int, int]] = []
    watch(monkeypatch, model, lambda ids: calls.append(tuple(ids.shape)))
    given = [(prompt, len(calls)) for prompt, _ in complete(model, list(right), Decoding(max_tokens=COUNT, batch=4))]
    assert given[0][1] < len(calls) / 3
    total = sum(c.tokens for c in right.values())
    assert sum(rows for rows, width in calls if width == 1) <= total  # in so few rows, none goes on after its end
    assert len(calls) < total / 2  # and most batches are full
    firsts = [width for rows, width in calls if width > 1]
    assert firsts == sorted(firsts, reverse=True)  # the longest prompts first


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_an_iterator_that_is_closed_lets_go(kind, models, monkeypatch):
    model = stopping(models(kind))
    held = []
    generate = model.model.generate

    @functools.wraps(generate)
    def kept(*arguments, **options):
        out = generate(*arguments, **options)
        held.append(weakref.ref(out.past_key_values))
        return out

    monkeypatch.setattr(model.model, "generate", kept)
    answers = complete(model, PROMPTS, Decoding(max_tokens=COUNT, batch=4))
    assert torch.is_grad_enabled()
    next(answers)
    assert torch.is_grad_enabled()  # what is asked for in between isn't touched
    assert held
    answers.close()
    gc.collect()
    assert [ref() for ref in held if ref() is not None] == []


def test_torch_s_own_random_numbers_are_left_alone(llama):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    answered(llama, PROMPTS[:2], max_tokens=3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


# What is wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p, problem 7: the prompt is empty; .* llama"),
        ("x" * 128, r"p, problem 7: the prompt has 128 tokens, .* llama takes 128"),
        ("x" * 1000, r"p, problem 7: the prompt has 1000 tokens, .* llama takes 128"),
    ],
)
def test_prompts_that_can_t_be_answered(text, message, llama):
    with pytest.raises(FimError, match=message):  # before any other is answered
        complete(llama, [*PROMPTS, Prompt("p", 7, 0, text, False)], Decoding(max_tokens=5))


def test_a_tokenizer_of_another_model(models):
    model = models(vocab_size=50)
    with pytest.raises(FimError, match=r"p, problem 0: the tokenizer gives token \d\d, but llama knows 50"):
        complete(model, [Prompt("p", 0, 0, "zebra", False)], Decoding(max_tokens=5))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_aren_t_numbers(temperature, llama):
    model = dataclasses.replace(llama, model=copy.deepcopy(llama.model))
    with torch.no_grad():
        model.model.model.norm.weight[3] = float("nan")
    with pytest.raises(FimError, match="llama: some logits aren't numbers; try another dtype"):
        list(complete(model, PROMPTS, Decoding(max_tokens=5, temperature=temperature)))


def test_text_that_is_no_text(llama):
    with pytest.raises(FimError, match="p, problem 0: the tokenizer of llama can't read the prompt"):
        complete(llama, [Prompt("p", 0, 0, "a\ud800", False)], Decoding(max_tokens=5))


def test_no_prompts(llama):
    assert list(complete(llama, [], Decoding(max_tokens=5))) == []


# Loading


def test_dtypes(tmp_path):
    tiny.save(tiny.build(tiny.config("llama")), tmp_path, torch.float16)
    for wanted in (torch.float64, torch.bfloat16):
        loaded = load_model("m", str(tmp_path), tiny.tokenizer(), MergeOptions(), wanted)
        assert loaded.model.dtype is wanted
    own = load_model("m", str(tmp_path), tiny.tokenizer(), MergeOptions(), None)
    assert own.model.dtype is torch.float16
    assert not own.model.training
    assert len(answered(own, PROMPTS[:3], max_tokens=3)) == 3


def test_models_that_can_t_be_loaded(tmp_path, monkeypatch):
    tokenizer = tiny.tokenizer()
    with pytest.raises(FimError, match=r"long: expected a causal language model that can be loaded, found none"):
        load_model("long", str(tmp_path), tokenizer, MergeOptions(), None)
    with pytest.raises(FimError, match=r"long: expected a model with a tokenizer, found none that can be loaded"):
        load_tokenizer("long", str(tmp_path), None, False)
    cfg = tiny.config("llama")
    tiny.save(tiny.build(cfg), tmp_path)
    with pytest.raises(FimError, match=r"long: expected a model with a tokenizer, found none that can be loaded"):
        load_tokenizer("long", str(tmp_path), None, False)
    cfg.num_hidden_layers = 6
    cfg.save_pretrained(tmp_path)
    with pytest.raises(FimError, match=r"long: the checkpoint lacks 9 of the model's tensors, such as model.layers.5"):
        load_model("long", str(tmp_path), tokenizer, MergeOptions(), None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(FimError, match="torch sees none"):
        load_model("long", str(tmp_path), tokenizer, MergeOptions(cuda=True), None)
    message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"

    def full(*arguments, **options):
        raise RuntimeError(message)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(FimError, match="long: expected memory for its weights, found none"):
        load_model("long", str(tmp_path), tokenizer, MergeOptions(), None)


def test_nothing_is_printed(pair, capfd):
    shown = transformers.utils.logging
    shown.enable_progress_bar()
    try:
        model = load_model("m", str(pair.base), tiny.tokenizer(), MergeOptions(), None)
        assert shown.is_progress_bar_enabled()  # for what others load
    finally:
        shown.disable_progress_bar()
    answered(model, [*PROMPTS, Prompt("p", 99, 0, "y" * 100, False)])
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
