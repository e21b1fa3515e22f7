"""A server that does as it is told, in OpenAI's protocol."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mergekit_fim.evaluate.answers import server as module
from mergekit_fim.evaluate.answers.server import Server


@dataclass
class Stub:
    """A server that does as it is told.

    Attributes:
        answer: called with each POST's handler, path and body; sends the answer.
        models: the answer to GET /v1/models.
        seen: the POSTs: path, body and headers, each of whose words begins with a capital.
        mixes_up: it gives back what a model is asked.
    """

    answer: Callable[[BaseHTTPRequestHandler, str, dict], None]
    models: list[str] | None = field(default_factory=lambda: ["m"])
    seen: list[tuple[str, dict, dict]] = field(default_factory=list)
    mixes_up: bool = False
    url: str = ""
    die: Callable[[], None] = lambda: None

    def server(self, timeout: float = 60.0) -> Server:
        return Server(self.url, "m", timeout)


def say(handler: BaseHTTPRequestHandler, content: object, status: int = 200) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def chat(text: str | None = "4", finish: str | None = "stop", tokens: int = 3, **message) -> dict:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return {"id": "1", "choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}}


def good(handler: BaseHTTPRequestHandler, path: str, body: dict) -> None:
    """Answers a chat with its last message, and a prompt with itself."""
    if path.endswith("/chat/completions"):
        return say(handler, chat(body["messages"][-1]["content"]))
    choice = {"index": 0, "finish_reason": "length", "text": body["prompt"]}
    return say(handler, {"choices": [choice], "usage": {"completion_tokens": 7}})


@contextlib.contextmanager
def stubs() -> Iterator[Callable[..., Stub]]:
    """Starts servers, and ends them."""
    with contextlib.ExitStack() as stack:

        def start(answer=good, **options) -> Stub:
            made = Stub(answer, **options)

            class Handler(BaseHTTPRequestHandler):
                protocol_version = "HTTP/1.1"

                def do_GET(self) -> None:
                    if self.path != "/v1/models" or made.models is None:
                        return say(self, {"detail": "Not Found"}, 404)
                    return say(self, {"object": "list", "data": [{"id": name} for name in made.models]})

                def do_POST(self) -> None:
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    if module._PROBE in str(body):
                        return say(self, chat(module._PROBE if made.mixes_up else "f", "length", 1))
                    made.seen.append((self.path, body, {name.title(): value for name, value in self.headers.items()}))
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
                        made.answer(self, self.path, body)

                def log_message(self, *_) -> None:
                    pass

            class Listener(ThreadingHTTPServer):
                daemon_threads = True

                def handle_error(self, *_) -> None:
                    pass

            listener = Listener(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            thread.start()

            def die() -> None:
                listener.shutdown()
                listener.server_close()
                thread.join()

            made.url, made.die = f"http://127.0.0.1:{listener.server_address[1]}/v1", die
            stack.callback(die)
            return made

        yield start
