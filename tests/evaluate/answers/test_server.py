"""Servers: stand-ins for everything that one can do wrong, and `transformers serve`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tokenizers
import torch
import transformers
from stub import chat, good, say

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.answers import server as module
from mergekit_fim.evaluate.answers.engine import Decoding
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.answers.server import Server, connect
from mergekit_fim.evaluate.records import LENGTH, STOP, Completion

KEPT = ["http://127.0.0.1:", "the answers so far are kept, and the same command goes on"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_RETRIES", 1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def asked(text: str = "2+2?", index: int = 0, **system: str) -> Prompt:
    messages = (*({"role": name, "content": said} for name, said in system.items()), {"role": "user", "content": text})
    return Prompt("p", index, 0, json.dumps(messages), False, messages)


def text(prompt: str, index: int = 0) -> Prompt:
    return Prompt("p", index, 0, prompt, False)


def ask(server: Server, *prompts: Prompt, tokens: int = 8, temperature: float = 0.0, seed: int = 0) -> list:
    return list(server.answers(prompts, Decoding(tokens, temperature, seed, 2)))


def given(server: Server, prompts: list[Prompt], parallel: int) -> Iterator[int]:
    """Which prompts are answered."""
    for prompt, _ in server.answers(prompts, Decoding(8, batch=parallel)):
        yield prompt.index


def refused(*words: str, **secrets: str):
    """One line with these words in it, and without these secrets."""

    @contextlib.contextmanager
    def check():
        with pytest.raises(FimError) as caught:
            yield
        line = str(caught.value)
        assert line.isprintable()
        assert len(line) < 800
        for word in words:
            assert word in line, line
        for secret in secrets.values():
            assert secret not in line

    return check()


# What works


def test_what_is_asked_and_what_comes_back(stub):
    served = stub()
    prompts = [asked("wörds", system="Be brief."), text("2+2=", 1)]
    assert dict(ask(served.server(), *prompts)) == {
        prompts[0]: Completion("wörds", 3, STOP),
        prompts[1]: Completion("2+2=", 7, LENGTH),
    }
    bodies = {path: body for path, body, _ in served.seen}
    common = {"model": "m", "max_tokens": 8, "temperature": 0.0, "stream": False}
    assert bodies == {
        "/v1/chat/completions": {"messages": list(prompts[0].messages), **common},
        "/v1/completions": {"prompt": "2+2=", **common},
    }


def test_seeds_are_of_the_answer_and_go_with_a_temperature_only(stub):
    served = stub()
    for seed, index, temperature in ((5, 1, 0.6), (5, 1, 0.6), (5, 2, 0.6), (6, 1, 0.6), (5, 1, 0.0)):
        ask(served.server(), asked(index=index), temperature=temperature, seed=seed)
    first, again, other, another, none = (body.get("seed") for _, body, _ in served.seen)
    assert first == again
    assert len({first, other, another}) == 3
    assert none is None


def test_several_at_a_time_and_no_more(stub):
    """The server gets as many at once as it may, and each once."""
    lock, now, most = threading.Lock(), 0, 0
    three = threading.Barrier(3)  # every answer waits for two others

    def answer(handler, path, body):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        three.wait(60)
        with lock:
            now -= 1
        good(handler, path, body)

    server = stub(answer).server()
    found = server.answers([asked(str(number), number) for number in range(30)], Decoding(8, batch=3))
    assert sorted((prompt.index, completion.text) for prompt, completion in found) == [(i, str(i)) for i in range(30)]
    assert most == 3


def test_answers_do_not_pile_up(stub):
    """A caller that is slower than the server has a few answers waiting, not all."""
    served, found = stub(), 0
    for _ in given(served.server(), [asked(str(number), number) for number in range(30)], 3):
        found += 1
        time.sleep(0.01)
        assert len(served.seen) <= found + 3
    assert found == 30


@pytest.mark.parametrize(
    ("content", "expected"),
    {
        "at a token that ends a turn": (chat("4", "stop", 3), Completion("4", 3, STOP)),
        "at the limit": (chat("4", "length", 8), Completion("4", 8, LENGTH)),
        "for another reason": (chat("4", "content_filter", 3), Completion("4", 3, STOP)),
        "for no reason": (chat("4", None, 3), Completion("4", 3, STOP)),
        "for another reason, at the limit": (chat("4", "tool_calls", 8), Completion("4", 8, LENGTH)),
        "with thoughts": (
            chat("\n\n4", reasoning_content="two and two"),
            Completion("<think>two and two</think>\n\n4", 3, STOP),
        ),
        "with thoughts by their other name": (chat("4", reasoning="hm"), Completion("<think>hm</think>4", 3, STOP)),
        "with no end of thoughts": (
            chat(None, "length", 8, reasoning_content="two and"),
            Completion("<think>two and", 8, LENGTH),
        ),
        "at the limit, after its thoughts": (
            chat("4", "length", 8, reasoning_content="hm"),
            Completion("<think>hm</think>4", 8, LENGTH),
        ),
        "with nothing after its thoughts": (
            chat("", "stop", 8, reasoning_content="two"),
            Completion("<think>two</think>", 8, STOP),
        ),
        "with thoughts given twice": (
            chat("<think>hm</think>4", reasoning_content="hm"),
            Completion("<think>hm</think>4", 3, STOP),
        ),
        "empty": (chat(None, "stop", 1), Completion("", 1, STOP)),
        "with half a character": (chat("4\ud800"), Completion("4?", 3, STOP)),
    }.values(),
)
def test_how_an_answer_ended_and_what_was_thought(content, expected, stub):
    served = stub(lambda handler, *_: say(handler, content))
    assert ask(served.server(), asked())[0][1] == expected


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status, stub):
    def answer(handler, path, body):
        if len(served.seen) < 2:
            return say(handler, {"error": "busy"}, status)
        return good(handler, path, body)

    served = stub(answer)
    assert ask(served.server(), asked("hello"))[0][1].text == "hello"
    assert len(served.seen) == 2


@pytest.mark.parametrize("how", ["before an answer", "within one"])
def test_a_broken_connection_is_made_again(how, stub):
    def answer(handler, path, body):
        if len(served.seen) > 1:
            return good(handler, path, body)
        handler.close_connection = True
        if how == "within one":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")
        return handler.connection.shutdown(socket.SHUT_RDWR)

    served = stub(answer)
    assert ask(served.server(), asked("hello"))[0][1].text == "hello"
    assert len(served.seen) == 2


def test_the_key_and_no_proxy(stub, monkeypatch):
    """The key goes along; what is on this machine isn't asked for by a proxy."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", " sk-1 ")
    served = stub()
    ask(connect(served.url, None), asked())
    assert served.seen[0][2]["Authorization"] == "Bearer sk-1"


def test_a_proxy_for_other_machines(monkeypatch, stub):
    """A server elsewhere is asked through the environment's proxy."""
    monkeypatch.setenv("HTTP_PROXY", stub(models=["m"]).url.removesuffix("/v1"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with refused("http://server.invalid/v1", "status 404"):  # of the stand-in, which knows no whole URLs
        connect("http://server.invalid", None)


# Finding a server


def test_connecting(stub):
    served = stub()
    expected = Server(served.url, "m")
    assert connect(served.url, None) == expected
    assert connect(served.url + "/", None) == expected
    assert connect(served.url.removesuffix("/v1"), None) == expected
    assert connect(served.url, "other") == Server(served.url, "other")


def test_which_model(stub):
    two = stub(models=["first", "second"])
    with refused(two.url, "found first, second (", "pass --server-model"):
        connect(two.url, None)
    assert connect(two.url, "second").model == "second"
    none = stub(models=[])
    with refused(none.url, "none listed", "pass --server-model"):
        connect(none.url, None)
    silent = stub(models=None)
    with refused(silent.url, "status 404", "pass --server-model"):
        connect(silent.url.removesuffix("/v1"), None)
    # Where nothing is listed, the endpoints are where most servers have them.
    assert connect(silent.url, "m") == connect(silent.url.removesuffix("/v1"), "m") == Server(silent.url, "m")


def test_a_password_is_used_and_not_shown(stub):
    served = stub()
    found = connect(served.url.replace("//", "//me:p%40ss@"), None)
    assert found.url == served.url
    assert "p@ss" not in repr(found)
    ask(found, asked())
    assert served.seen[0][2]["Authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss
    served.die()
    with refused(served.url, *KEPT, secret="ss@", user="me:"):
        ask(found, asked())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://me:secret@localhost",
        "http://",
        "http://me:secret@:80",
        "http://me:sec/ret@localhost",
        "http://me:secret@[::1",
        "http://localhost:123456",
        "http://localhost/v1?key=secret",
        "file:///etc/passwd",
        "http://é..b",
    ],
)
def test_no_url(url):
    with refused(
        "--server: expected a URL such as http://localhost:8000/v1", "correct it", secret="secret", user="me:"
    ):
        connect(url, None)


def test_nobody_there(stub):
    served = stub()
    served.die()
    with refused(served.url, "start the server, or check the URL"):
        connect(served.url, "m")


@pytest.mark.parametrize("key", ["sécret", "sk\ncret"])
def test_a_key_that_no_request_can_have(key, monkeypatch, stub):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with refused("OPENAI_API_KEY: expected printable ASCII", secret="cret"):
        connect(stub().url, None)


def test_a_proxy_that_is_none(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "nonsense://127.0.0.1:9")
    with refused("http://server.invalid/v1: the environment's proxy", "nonsense", "unset"):
        connect("http://server.invalid", None)


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with refused("pip install 'mergekit-fim[server]'"):
        connect("http://localhost", None)


# What goes wrong under way: one line, and what was answered before is there


def no_usage() -> dict:
    return {key: value for key, value in chat().items() if key != "usage"}


NONSENSE = {
    "no JSON": (b"<html>hello</html>", ["expected an answer as a JSON object", "<html>hello"]),
    "nothing": (b"", ["expected an answer as a JSON object"]),
    "no text": (b"\xff\xfe\xfd\x00", ["expected an answer as a JSON object"]),
    "deep JSON": (b"[" * 100_000, ["expected an answer as a JSON object"]),
    "another JSON": ([1, 2], ["expected an answer as a JSON object", "[1, 2]"]),
    "a number": ({"choices": [1], "usage": {"completion_tokens": 1}}, ["`choices[0]`"]),
    "no choices": ({**chat(), "choices": []}, ["`choices`", "at least 1"]),
    "no message": ({**chat(), "choices": [{"finish_reason": "stop"}]}, ["message is missing"]),
    "a text that is none": (chat(4), ["`choices[0].message.content`", "found 4"]),
    "no usage": (no_usage(), ["`usage` is missing"]),
    "usage without a count": ({**chat(), "usage": {}}, ["completion_tokens is missing"]),
    "a count that is none": (chat(tokens="3"), ["`usage.completion_tokens`", "'3'"]),
    "a count that is a truth": (chat(tokens=True), ["`usage.completion_tokens`"]),
    "a count below zero": (chat(tokens=-1), ["`usage.completion_tokens`", "-1"]),
    "a text of no tokens": (chat(tokens=0), ["1 characters of 0 tokens"]),
    "more than was asked for": (chat("words", tokens=10), ["at most 8 tokens", "of 10 tokens"]),
}


@pytest.mark.parametrize(("content", "words"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense(content, words, stub):
    def answer(handler, path, body):
        good(handler, path, body) if body["messages"][0]["content"] != "bad" else say(handler, content)

    served, found = stub(answer), []
    with refused(*words, *KEPT):
        found.extend(given(served.server(), [asked("a", 1), asked("bad", 2), asked("c", 3)], 1))
    assert found == [1]
    assert len(served.seen) == 2  # nonsense isn't asked for again, nor anything after it


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (400, {"error": {"message": "maximum length is 10"}}, ["status 400", "maximum length is 10", "change what"]),
        (400, {"object": "error", "message": "too long"}, ["status 400", "too long"]),
        (400, {"error": "too long"}, ["status 400", "too long"]),
        (404, {"detail": "no such model"}, ["status 404", "no such model"]),
        (422, {"detail": [{"msg": "bad field"}]}, ["status 422", "bad field"]),
        (403, b"<b>no</b>", ["status 403 (<b>no</b>)"]),
        (302, b"", ["status 302"]),
        (500, b"Internal Server Error", ["status 500 (Internal Server Error)", "start the server again"]),
        (429, {"error": {"message": "slow down"}}, ["status 429", "slow down", "start the server again"]),
    ],
)
def test_refusals(status, content, words, stub):
    with refused(*words, *KEPT):
        ask(stub(lambda handler, *_: say(handler, content, status)).server(), asked())


@pytest.mark.parametrize("key", ["", "sk-secret"])
def test_another_key(key, stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    served = stub(lambda handler, *_: say(handler, {"error": {"message": f"bad key {key}"}}, 401))
    with refused("OPENAI_API_KEY, found " + ("another" if key else "none"), "set it", secret="sk-secret"):
        ask(served.server(), asked())


def test_a_server_that_dies(stub):
    """What it answered before is yielded; then there is one error."""

    def answer(handler, path, body):
        if len(served.seen) < 8:
            good(handler, path, body)
        else:
            handler.close_connection = True
            if not dead.is_set():
                dead.set()
                threading.Thread(target=served.die).start()

    served, found, dead = stub(answer), [], threading.Event()
    with refused("start the server again", *KEPT):
        found.extend(given(served.server(), [asked(index=i) for i in range(99)], 3))
    assert 5 <= len(found) <= 7
    assert len(set(found)) == len(found)


def test_what_was_asked_before_an_error_is_yielded_first(stub):
    told = threading.Event()

    def answer(handler, path, body):
        if body["messages"][0]["content"] == "bad":
            say(handler, {"error": "bad"}, 400)
            told.set()
        else:
            told.wait(60)
            good(handler, path, body)

    found = []
    with refused("status 400 (bad)"):
        found.extend(given(stub(answer).server(), [asked("slow", 1), asked("bad", 2)], 2))
    assert found == [1]


def test_a_slow_server(stub):
    """Too late is too late, whether nothing comes or a byte now and then."""
    over = threading.Event()

    def answer(handler, path, body):
        if body["messages"][0]["content"] == "drop by drop":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")
            while not over.wait(0.02):
                handler.wfile.write(b" ")
        over.wait(60)

    served = stub(answer)
    for how in ("nothing", "drop by drop"):
        with refused("expected an answer within 1 s, found none", "give it more time", *KEPT):
            ask(served.server(timeout=1.0), asked(how))
    assert len(served.seen) == 2  # it would be no quicker the next time
    over.set()


@pytest.mark.parametrize("how", ["closed", "an error of the caller's", "Ctrl-C"])
def test_giving_up_waits_for_nothing(how, stub, monkeypatch):
    """Requests that nobody answers don't hold the caller, and no thread is left."""
    over = threading.Event()

    def answer(handler, path, body):
        if body["messages"][0]["content"] != "first":
            over.wait(60)
        good(handler, path, body)

    served = stub(answer)
    prompts = [asked("first"), *(asked("never", i) for i in range(1, 9))]
    answers = served.server(600.0).answers(prompts, Decoding(8, batch=4))
    assert next(answers)[0].index == 0
    if how == "closed":
        answers.close()
    elif how == "Ctrl-C":

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(answers)
    else:
        with pytest.raises(ValueError, match="the caller's"):
            answers.throw(ValueError("the caller's"))
    assert not over.is_set()  # so none of the others has been answered
    assert "asyncio-portal" not in str(threading.enumerate())
    over.set()


def test_a_server_that_gives_back_the_question(stub):
    """No question is asked of a server that mixes questions with answers; prompts are, as it has no part in them."""
    served = stub(mixes_up=True)
    with refused(served.url, "found what it was asked", "pass --template"):
        ask(served.server(), asked())
    assert served.seen == []
    assert ask(served.server(), text("2+2="))[0][1].text == "2+2="


def test_nothing_to_ask(stub):
    served = stub()
    served.die()
    assert ask(served.server()) == []


def test_a_prompt_that_is_no_text(stub):
    with refused("a prompt isn't Unicode", *KEPT):
        ask(stub().server(), asked("a\ud800"))


# A real one

WORDS = [chr(code) for code in range(32, 127)] + ["\n", "<think>", "</think>", "<end>"]
END = len(WORDS) - 1
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def talking_model(folder: Path, kind: str) -> Path:
    """A tiny model with a tokenizer of single characters, which ends its turn within some tokens."""
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "?"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokens.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<end>")
    tokenizer.add_tokens(["<think>", "</think>"])  # as reasoning models have them: tokens of their own, not special
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = tiny.build(tiny.config(kind, vocab_size=len(WORDS), eos_token_id=END, pad_token_id=END))
    model.generation_config = transformers.GenerationConfig(eos_token_id=END, pad_token_id=END)
    prompt = tokenizer.apply_chat_template(asked().messages, add_generation_prompt=True, return_tensors="pt")
    heads = model.get_output_embeddings().weight
    # Where it would write a certain token, it ends instead: the first such token that lets it write something before.
    for token in written(model, prompt["input_ids"], 32).unique().tolist():
        with torch.no_grad():
            heads[END] = 2 * heads[token]
        ids = written(model, prompt["input_ids"], 32)
        if 3 <= len(ids) < 32:
            break
    assert ids[-1] == END
    return tiny.save(model, folder)


def written(model: transformers.PreTrainedModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens that a model goes on with by transformers' own loop."""
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=count, do_sample=False)[0, prompt.shape[1] :]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[str]:
    """`transformers serve`, for whichever model it is asked for."""
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder / "log"
    environment = {**os.environ, "HF_HOME": str(folder / "hub")}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=output, stderr=output, env=environment
        )
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.2)
            else:
                pytest.fail(f"transformers serve didn't start: {log.read_text()[-2000:]}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def test_transformers_serve(served, tmp_path):
    """Its text and count of tokens are those of transformers' own loop; the token that ends a turn is counted."""
    folder = talking_model(tmp_path / "model", "llama")
    server = connect(served, str(folder))
    assert server.url == f"{served}/v1"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [asked(), asked("5-3?", 1), text("user: 7\n=", 2)]
    endings = set()
    for limit in (2, 32):
        found = dict(ask(server, *prompts, tokens=limit))
        assert set(found) == set(prompts)
        for prompt, completion in found.items():
            given = prompt.text
            if prompt.messages:
                given = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
            ids = written(model, tokenizer(given, return_tensors="pt")["input_ids"], limit)
            ended = bool(ids[-1] == END)
            assert completion.text == tokenizer.decode(ids[: -1 if ended else None])
            assert completion.tokens == len(ids) == len(tokenizer(completion.text)["input_ids"]) + ended
            assert completion.ended == (STOP if ended and len(ids) < limit else LENGTH)
            endings.add(completion.ended)
    assert endings == {STOP, LENGTH}
    with refused(f"{served}/v1: expected a server that lists one model", "status 500", "pass --server-model"):
        connect(served, None)  # what it would list is the Hub's cache, which there isn't
    with refused("status 500 (Internal Server Error)", *KEPT):
        ask(connect(served, str(tmp_path / "nothing")), asked())


def test_transformers_serve_gives_back_the_question(served, tmp_path):
    """It takes the prompt for the answer where a model's type is Qwen's, and its template isn't; not of a prompt."""
    server = connect(served, str(talking_model(tmp_path / "model", "qwen2")))
    with refused("found what it was asked"):
        ask(server, asked())
    assert "?" not in ask(server, text("2+2?"), tokens=1)[0][1].text
