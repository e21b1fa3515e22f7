"""Requests to a server that speaks OpenAI's protocol -> completions: vLLM, llama.cpp, `transformers serve`."""

import contextlib
import ipaddress
import itertools
import json
import os
import re
from collections.abc import Awaitable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, Field, ValidationError

from mergekit_fim.errors import FimError, brief, misfit, reason, require
from mergekit_fim.evaluate.records import LENGTH, STOP, Completion

if TYPE_CHECKING:
    import openai
    from anyio.from_thread import BlockingPortal

KEY = "OPENAI_API_KEY"  # the environment variable that every client of this protocol reads

# Further tries, 16 seconds in all, which a busy server, or one that is being started again, may need.
_RETRIES = 5
# Seconds in which a connection must come about, and a list of models be there, however long an answer may take.
_REACHED, _LISTED = 10.0, 60.0

# No token is as long as this, so that a model that writes one can't have written it.
_PROBE = "2b7e151628aed2a6abf7158809cf4f3c"

_KEPT = "the answers so far are kept, and the same command goes on"


@dataclass(frozen=True)
class Server:
    """A server, and the model on it.

    Attributes:
        url: where its endpoints are, without a user's name or password: for requests, messages and records.
        model: by the name that the server knows it by.
        timeout: seconds in which an answer must be there whole.
        credentials: the name and password in the URL as it was given, if any.
    """

    url: str
    model: str
    timeout: float
    credentials: tuple[str, str] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Request:
    """What a model is to go on from: either messages, for the server's chat template, or a prompt's text.

    Attributes:
        key: whatever tells the caller which request it is.
        messages: with `role` and `content`.
        prompt: the text.
        seed: sent where the temperature is above 0.
    """

    key: Hashable
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    seed: int | None = None


class _Usage(BaseModel):
    completion_tokens: Annotated[int, Field(ge=0)]


class _Message(BaseModel):
    content: str | None = None
    # How servers call what the model thought, where they take it out of the content.
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    finish_reason: str | None = None


class _ChatChoice(_Choice):
    message: _Message


class _TextChoice(_Choice):
    text: str


class _ChatAnswer(BaseModel):
    choices: Annotated[list[_ChatChoice], Field(min_length=1)]
    usage: _Usage


class _TextAnswer(BaseModel):
    choices: Annotated[list[_TextChoice], Field(min_length=1)]
    usage: _Usage


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


def connect(url: str, model: str | None, *, timeout: float = 600.0) -> Server:
    """Find the endpoints of a server, and which model it has.

    Args:
        url: the server's, with or without the `/v1` that most servers have their endpoints under.
        model: the model's name there; None for the only one that the server lists.
        timeout: seconds that any answer may take.

    Raises:
        FimError: it isn't such a URL, no server answers there, or it doesn't say which model is meant.
    """
    base, credentials = _address(url)
    bases = [base] if re.search(r"/v\d+[a-z0-9]*$", base) else [f"{base}/v1", base]
    statuses = []
    for place in bases:
        server = Server(place, model or "", timeout, credentials)
        status, listed = _models(server)
        if listed is not None:
            return Server(place, model or _only(listed, place), timeout, credentials)
        statuses.append(status)
    if model is None:
        raise FimError(
            f"{bases[0]}: expected a list of the server's models, found none (status {statuses[0]}); pass "
            "--server-model, or check the URL"
        )
    return Server(bases[0], model, timeout, credentials)


def _models(server: Server) -> tuple[int, list[str] | None]:
    """Ask for the list of models: the status, and the names if it is such a list."""
    with _client(server, 1, retries=0) as (portal, client):
        import openai

        try:
            call = client.models.with_raw_response.list
            text = portal.call(
                _sent, server, call(), min(_LISTED, server.timeout), "start the server, or check the URL"
            )
        except openai.APIStatusError as error:
            return error.status_code, None
    try:
        return 200, [model.id for model in _Models.model_validate_json(text).data]
    except ValidationError:
        return 200, None


def complete(
    server: Server, requests: Iterable[Request], *, max_tokens: int, temperature: float, parallel: int
) -> Iterator[tuple[Hashable, Completion, str]]:
    """Have requests answered, several at a time.

    Args:
        server: as `connect` found it.
        requests: taken one by one, as the server gets through with them.
        max_tokens: that an answer may have.
        temperature: 0 for the likeliest token always.
        parallel: how many requests the server has at a time.

    Yields:
        A request's key, its completion, and what the model was given: the prompt, or the messages as JSON. In the
        order in which they finish.

    Raises:
        FimError: the server can't be reached, refuses a request, is too slow, answers something else, or gives what
            a model was asked for what it wrote. What it has been asked by then is waited for, and yielded before.
    """
    if parallel < 1:
        raise FimError(f"expected at least one request at a time, found {parallel}; raise it")
    waiting, failure = iter(requests), None
    pending: set[Future[tuple[Hashable, Completion, str]]] = set()
    first = next(waiting, None)
    if first is None:
        return
    waiting = itertools.chain([first], waiting)
    with _client(server, parallel, retries=_RETRIES) as (portal, client):
        if first.messages is not None:
            portal.call(_check, client, server)
        while True:
            # Answers that the caller hasn't come to yet don't keep the server idle, but must not pile up either.
            free = min(parallel - sum(not future.done() for future in pending), 2 * parallel - len(pending))
            for request in itertools.islice(waiting, free if failure is None else 0):
                pending.add(portal.start_task_soon(_complete, client, server, request, max_tokens, temperature))
            if not pending:
                break
            # Windows hears Ctrl-C only between waits.
            done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in itertools.islice(done, 1):
                pending.remove(future)
                if (error := future.exception()) is None:
                    yield future.result()
                failure = failure or error
    if failure is not None:
        raise failure


async def _check(client: "openai.AsyncOpenAI", server: Server) -> None:
    """See that a server tells what a model wrote from what it was asked.

    `transformers serve` 5.23 doesn't, where a model's type is Qwen's and its chat template isn't, as of DeepSeek-R1's
    distillations: the prompt is in the content of all that it doesn't take for thoughts, whose end it so hides.

    Raises:
        FimError: it doesn't, or the request fails.
    """
    probe = Request(None, messages=({"role": "user", "content": _PROBE},))
    _, completion, _ = await _complete(client, server, probe, 1, 0.0)
    if _PROBE in completion.text:
        raise FimError(
            f"{server.url}: expected what the model wrote, found what it was asked with it, which `transformers "
            "serve` mixes up for some chat templates; serve the model by another server, or pass --template"
        )


async def _complete(
    client: "openai.AsyncOpenAI", server: Server, request: Request, max_tokens: int, temperature: float
) -> tuple[Hashable, Completion, str]:
    import openai

    options: dict[str, Any] = {"model": server.model, "max_tokens": max_tokens, "temperature": temperature}
    if temperature > 0 and request.seed is not None:
        options["seed"] = request.seed
    if request.messages is not None:
        prompt = json.dumps(request.messages, ensure_ascii=False)
        call = client.chat.completions.with_raw_response.create(messages=request.messages, stream=False, **options)
    else:
        prompt = request.prompt or ""
        call = client.completions.with_raw_response.create(prompt=prompt, stream=False, **options)
    try:
        text = await _sent(server, call, server.timeout, f"start the server again: {_KEPT}")
    except openai.APIStatusError as error:
        is_busy = error.status_code >= 500 or error.status_code in (408, 429)
        raise FimError(
            f"{server.url}: expected an answer, found status {error.status_code} ({_message(error.response.text)}); "
            f"{'start the server again' if is_busy else 'change what it complains of'}: {_KEPT}"
        ) from None
    except UnicodeEncodeError as error:
        raise FimError(f"{server.url}: a prompt isn't Unicode ({reason(error)}); correct it: {_KEPT}") from None
    return request.key, _completion(text, server, max_tokens, is_chat=request.messages is not None), prompt


def _completion(response: str, server: Server, max_tokens: int, *, is_chat: bool) -> Completion:
    """What a server answered, checked."""
    advice = f"serve the model by another server, or another version: {_KEPT}"
    content = _json(response)
    if not isinstance(content, dict):
        raise FimError(f"{server.url}: expected an answer as a JSON object, found {brief(response)!r}; {advice}")
    try:
        # As JSON, where no type is taken for another, but without halves of characters, which no file can have.
        checked = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
        answer = (_ChatAnswer if is_chat else _TextAnswer).model_validate_json(checked, strict=True)
    except ValidationError as error:
        raise FimError(f"{server.url}: not an answer in OpenAI's format: {misfit(error, content)}; {advice}") from None
    tokens, choice = answer.usage.completion_tokens, answer.choices[0]
    if choice.finish_reason in ("stop", "length"):
        ended = STOP if choice.finish_reason == "stop" else LENGTH
    else:
        ended = LENGTH if tokens >= max_tokens else STOP
    text = _whole(choice.message, ended) if isinstance(choice, _ChatChoice) else choice.text
    if tokens > max_tokens + 1 or (text and not tokens):  # one more: a server may not count the one that ends a turn
        raise FimError(
            f"{server.url}: expected an answer of at most {max_tokens} tokens, and their number, found {len(text)} "
            f"characters of {brief(tokens)} tokens; {advice}"
        )
    return Completion(text, tokens, ended)


def _whole(message: _Message, ended: str) -> str:
    """A message's text as the model wrote it, its thinking put back in its place."""
    thought, content = message.reasoning_content or message.reasoning, message.content or ""
    if not thought or content.lstrip().startswith("<think>"):  # some servers give it in both places
        return content
    return f"<think>{thought}" if not content and ended == LENGTH else f"<think>{thought}</think>{content}"


async def _sent(server: Server, call: Awaitable[Any], timeout: float, advice: str) -> str:
    """Wait for what a server answers.

    Raises:
        FimError: there is no answer in time or none at all, or it wants another key.
        openai.APIStatusError: it has another status than 200; where the server is busy or failed, at every try.
    """
    import anyio
    import openai

    try:
        with anyio.fail_after(timeout):
            return str((await call).text)
    except TimeoutError:
        raise FimError(
            f"{server.url}: expected an answer within {timeout:g} s, found none; give it more time, or fewer requests "
            f"at once, or {advice}"
        ) from None
    except openai.AuthenticationError:
        found = "another" if os.environ.get(KEY) else "none"
        raise FimError(f"{server.url}: expected a key that it knows in {KEY}, found {found}; set it") from None
    except openai.APIConnectionError as error:
        why = reason(error.__cause__ or error)
        raise FimError(f"{server.url}: expected an answer, found none ({why}); {advice}") from None


@contextlib.contextmanager
def _client(server: Server, parallel: int, *, retries: int) -> Iterator[tuple["BlockingPortal", "openai.AsyncOpenAI"]]:
    """Open a client, and an event loop in a thread of its own.

    Requests so go on while their answers are graded, whether or not the caller has a loop of its own, and can be
    given up at any moment, which a thread that waits for a socket can't.
    """
    require("openai", "server")
    import openai
    from anyio.from_thread import start_blocking_portal

    try:
        client = openai.AsyncOpenAI(
            base_url=server.url,
            api_key=_key() or "none",  # the client insists on one, and servers without keys don't look at it
            max_retries=retries,
            http_client=openai.DefaultAsyncHttpxClient(
                auth=server.credentials,  # in place of a key
                timeout=openai.Timeout(None, connect=_REACHED),
                follow_redirects=False,
                trust_env=not _is_here(server.url),  # no proxy leads back to this machine
            ),
        )
    except (ImportError, ValueError, OSError) as error:  # a proxy that isn't one, certificates that aren't there
        raise FimError(
            f"{server.url}: the environment's proxy or certificates can't be used ({reason(error)}); correct or unset "
            "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE"
        ) from None
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
        yield portal, client


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise FimError(f"{KEY}: expected printable ASCII, found other characters; set that variable anew")
    return key


def _address(url: str) -> tuple[str, tuple[str, str] | None]:
    """A URL without what is secret in it, nor a slash at its end; and the secret.

    Raises:
        FimError: it isn't a server's.
    """
    try:
        parts = urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and (parts.port or 1) > 0
        good = good and bool((parts.hostname or "").encode("idna"))
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        # Whatever is wrong, a password stands before the one, and a key behind the other.
        shown = re.sub(r"\?.*", "?...", url.rsplit("@", 1)[-1], flags=re.DOTALL)
        raise FimError(f"--server: expected a URL such as http://localhost:8000/v1, found {brief(shown)!r}; correct it")
    credentials = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
    return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path.rstrip('/')}", credentials


def _is_here(url: str) -> bool:
    """Whether a URL is of this machine."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def _only(names: list[str], url: str) -> str:
    if len(names) != 1:
        found = ", ".join(brief(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")
        raise FimError(f"{url}: expected a server of one model, found {found or 'none listed'}; pass --server-model")
    return names[0]


def _json(text: str) -> Any:
    """A response's content; None if it isn't JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _message(response: str) -> str:
    """What a server says of an error, in the ways in which servers do, in one short line."""
    content = _json(response)
    found = content if isinstance(content, dict) else {}
    found = found.get("error", found)
    text = found if isinstance(found, str) else None
    if isinstance(found, dict):
        text = found.get("message") or found.get("detail")
    return " ".join(str(text or response).split())[:300] or "without a word"
