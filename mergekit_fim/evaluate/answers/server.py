"""Prompts -> completions by a server that speaks OpenAI's protocol: vLLM, llama.cpp, `transformers serve`."""

import contextlib
import itertools
import os
import re
import zlib
from collections.abc import Awaitable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergekit_fim.errors import FimError, brief, reason, require
from mergekit_fim.evaluate.answers.address import address, is_here
from mergekit_fim.evaluate.answers.engine import Decoding, ModelFiles
from mergekit_fim.evaluate.answers.openai_format import completion, listed
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.records import Completion

if TYPE_CHECKING:
    import openai
    from anyio.from_thread import BlockingPortal

_KEY = "OPENAI_API_KEY"  # the environment variable that every client of this protocol reads
# Further tries, 16 seconds in all, which a busy server, or one that is being started again, may need.
_RETRIES = 5
# Seconds in which a connection must come about, and a list of models be there, however long an answer may take.
_REACHED, _LISTED = 10.0, 60.0
# Requests that a server has at a time, where nothing is said.
_PARALLEL = 8

# No token is as long as this, so that a model that writes one can't have written it.
_PROBE = "2b7e151628aed2a6abf7158809cf4f3c"

_KEPT = "the answers so far are kept, and the same command goes on"


@dataclass(frozen=True)
class Server:
    """The engine that is somebody else's: a server, and the model on it."""

    url: str  # of its endpoints, without a user's name or password: for requests, messages and records
    model: str
    timeout: float = 600.0  # seconds in which an answer must be there whole
    credentials: tuple[str, str] | None = field(default=None, repr=False)  # name and password in the URL as given

    def open(self, files: ModelFiles) -> dict[str, Any]:
        """Do nothing: the server has its model."""
        return {}

    def answers(self, prompts: Sequence[Prompt], decoding: Decoding) -> Generator[tuple[Prompt, Completion]]:
        """See `Engine`; what was asked before an error is waited for, and yielded first."""
        parallel = decoding.batch or _PARALLEL
        waiting, failure = iter(prompts), None
        pending: set[Future[tuple[Prompt, Completion]]] = set()
        with _client(self, retries=_RETRIES) as (portal, client):
            if any(prompt.messages for prompt in prompts):
                portal.call(_check, client, self)
            while True:
                free = parallel - len(pending) if failure is None else 0
                for prompt in itertools.islice(waiting, free):
                    pending.add(portal.start_task_soon(_answer, client, self, prompt, decoding))
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

    def close(self) -> None:
        """Do nothing: the server stays."""


def connect(url: str, model: str | None) -> Server:
    """Find the endpoints of a server, and which model it has.

    The URL may lack the `/v1` that most servers have their endpoints under; the model is the only one that the server
    lists, where none is named.

    Raises:
        FimError: it isn't such a URL, no server answers there, or it doesn't say which model is meant.
    """
    base, credentials = address(url)
    places = [base] if re.search(r"/v\d+[a-z0-9]*$", base) else [f"{base}/v1", base]
    servers = [Server(place, model or "", credentials=credentials) for place in places]
    statuses = []
    for server in servers:
        with _client(server, retries=0) as (portal, client):
            call = client.models.with_raw_response.list()
            status, said = portal.call(_sent, server, call, _LISTED, "start the server, or check the URL")
        statuses.append(status)
        names = listed(said)
        if names is not None:
            break
    else:
        server, names = servers[0], []
    if model is None and len(names) != 1:
        found = ", ".join(brief(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")
        raise FimError(
            f"{server.url}: expected a server that lists one model, found {found or 'none listed'} (status "
            f"{statuses[0]}); pass --server-model, or check the URL"
        )
    return replace(server, model=model or names[0])


async def _check(client: "openai.AsyncOpenAI", server: Server) -> None:
    """See that a server tells what a model wrote from what it was asked.

    `transformers serve` 5.23 doesn't, where a model's type is Qwen's and its chat template isn't, as of DeepSeek-R1's
    distillations: the prompt is in the content of all that it doesn't take for thoughts, whose end it so hides.
    """
    probe = Prompt("", 0, 0, "", special=False, messages=({"role": "user", "content": _PROBE},))
    _, found = await _answer(client, server, probe, Decoding(max_tokens=1))
    if _PROBE in found.text:
        raise FimError(
            f"{server.url}: expected what the model wrote, found what it was asked with it, which `transformers "
            "serve` mixes up for some chat templates; serve the model by another server, or pass --template"
        )


async def _answer(
    client: "openai.AsyncOpenAI", server: Server, prompt: Prompt, decoding: Decoding
) -> tuple[Prompt, Completion]:
    options: dict[str, Any] = {"model": server.model, "max_tokens": decoding.max_tokens, "stream": False}
    options["temperature"] = decoding.temperature
    if decoding.temperature > 0:
        options["seed"] = zlib.crc32(repr((decoding.seed, *prompt.key)).encode()) >> 1  # servers take 31 bits
    messages: Any = prompt.messages
    if messages is not None:
        call = client.chat.completions.with_raw_response.create(messages=messages, **options)
    else:
        call = client.completions.with_raw_response.create(prompt=prompt.text, **options)
    try:
        status, said = await _sent(server, call, server.timeout, f"start the server again: {_KEPT}")
    except UnicodeEncodeError as error:
        raise FimError(f"{server.url}: a prompt isn't Unicode ({reason(error)}); correct it: {_KEPT}") from None
    if status != 200:
        remedy = "start the server again" if status >= 500 or status in (408, 429) else "change what it complains of"
        raise FimError(f"{server.url}: expected an answer, found status {status} ({said}); {remedy}: {_KEPT}")
    try:
        return prompt, completion(said, decoding.max_tokens, is_chat=messages is not None)
    except FimError as error:
        raise FimError(
            f"{server.url}: {error}; serve the model by another server, or another version: {_KEPT}"
        ) from None


def _said(body: Any) -> str:
    """What a server says of an error, in the ways in which servers do, in one short line."""
    found = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or found
    return " ".join(str(found or "").split())[:300] or "without a word"


async def _sent(server: Server, call: Awaitable[Any], timeout: float, advice: str) -> tuple[int, str]:
    """Wait for what a server answers, and tell its status. Where that isn't 200, tell what the server says of it."""
    import anyio
    import openai

    try:
        with anyio.fail_after(timeout):
            return 200, str((await call).text)
    except TimeoutError:
        raise FimError(
            f"{server.url}: expected an answer within {timeout:g} s, found none; give it more time, or fewer requests "
            f"at once, or {advice}"
        ) from None
    except openai.AuthenticationError:
        found = "another" if os.environ.get(_KEY) else "none"
        raise FimError(f"{server.url}: expected a key that it knows in {_KEY}, found {found}; set it") from None
    except openai.APIStatusError as error:  # where the server is busy or failed, of the last try
        return error.status_code, _said(error.body)
    except openai.APIConnectionError as error:
        why = reason(error.__cause__ or error)
        raise FimError(f"{server.url}: expected an answer, found none ({why}); {advice}") from None


@contextlib.contextmanager
def _client(server: Server, *, retries: int) -> Iterator[tuple["BlockingPortal", "openai.AsyncOpenAI"]]:
    """Open a client, and an event loop in a thread of its own.

    Requests so go on while their answers are graded, whether or not the caller has a loop of its own, and can be
    given up at any moment, which a thread that waits for a socket can't.
    """
    require("openai", "server")
    import openai
    from anyio.from_thread import start_blocking_portal

    key = os.environ.get(_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise FimError(f"{_KEY}: expected printable ASCII, found other characters; set that variable anew")
    try:
        client = openai.AsyncOpenAI(
            base_url=server.url,
            api_key=key or "none",  # the client insists on one, and servers without keys don't look at it
            max_retries=retries,
            http_client=openai.DefaultAsyncHttpxClient(
                auth=server.credentials,  # in place of a key
                timeout=openai.Timeout(None, connect=_REACHED),
                follow_redirects=False,
                trust_env=not is_here(server.url),  # no proxy leads back to this machine
            ),
        )
    except (ImportError, ValueError, OSError) as error:  # a proxy that isn't one, certificates that aren't there
        raise FimError(
            f"{server.url}: the environment's proxy or certificates can't be used ({reason(error)}); correct or unset "
            "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE"
        ) from None
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
        yield portal, client
