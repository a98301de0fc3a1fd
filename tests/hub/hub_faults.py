"""A hub that fails in one way, and what a load of one kind comes to; run as a program, it prints that as JSON."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

from tokenizers import Tokenizer, models

from tests.hub.hub_stand_in import REPOSITORIES, Hub, parquet

# A backbone beside the data set: the configuration is small, the weights are what breaks in the middle.
CONFIG = json.dumps({"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "num_attention_heads": 1,
                     "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 50}).encode()  # fmt: skip
REPOSITORIES["org/plain"]["main"]["small/train-00000-of-00001.parquet"] = parquet(20_000)
# And a tokenizer, which is loaded before the weights.
TOKENIZER = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]")).to_str().encode()
TOKENIZER_CONFIG = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}).encode()  # fmt: skip
MODEL = {
    "config.json": CONFIG,
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "model.safetensors": b"\0" * 200_000,
}


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Who asked has gone, which is what is tested."""


class Silent(Hub):
    """Accepts the request and sends no response; after `answers`, if there are any."""

    answers = 0

    def handle_one_request(self) -> None:
        super().handle_one_request() if Silent.take() else time.sleep(60)

    @classmethod
    def take(cls) -> bool:
        cls.answers -= 1
        return cls.answers >= 0


class Slow(Hub):
    def do_GET(self) -> None:
        if self.path != "/":
            time.sleep(20)
        super().do_GET()

    do_HEAD = do_POST = do_GET


class Failing(Hub):
    code = 500

    def do_GET(self) -> None:
        self.give(self.code)

    do_HEAD = do_POST = do_GET


class Missing(Failing):
    code = 404


class Dropping(Hub):
    """Half of each large file, and then the connection is closed, or with `stall` nothing more."""

    stall = False

    def give(self, code: int, body: bytes = b"", **more: Any) -> None:  # type: ignore[override]
        if len(body) < 10_000 or self.command == "HEAD":
            return super().give(code, body, **more)
        half = body[: len(body) // 2]
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{more.get("etag", "x")}"')
        self.end_headers()
        self.wfile.write(b"" if self.headers.get("Range") else half)
        self.wfile.flush()
        if self.stall:
            time.sleep(60)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


class Stalling(Dropping):
    stall = True


class Truncated(Hub):
    """Half of a file, as if it were all of it."""

    def give(self, code: int, body: bytes = b"", **more: Any) -> None:  # type: ignore[override]
        super().give(code, body if len(body) < 10_000 or self.command == "HEAD" else body[: len(body) // 2], **more)


def add_model(hub: type[Hub]) -> type[Hub]:
    class WithModel(hub):  # type: ignore[misc, valid-type]
        def do_GET(self) -> None:
            name = self.path.split("?")[0].rpartition("/")[2]
            if (
                type(self).__mro__[1] in (Silent, Dropping, Stalling, Truncated)
                and "/resolve/" in self.path
                and "/datasets/" not in self.path
            ):
                import hashlib

                if name not in MODEL:
                    return self.give(404, error="EntryNotFound", commit="c" * 40)
                return self.give(200, MODEL[name], commit="c" * 40, etag=hashlib.sha1(MODEL[name]).hexdigest())
            if "/api/models/" in self.path and type(self).__mro__[1] in (Dropping, Stalling, Truncated):
                if "/tree/" in self.path:  # of a folder with chat templates, which it does not have
                    return self.give(404, error="EntryNotFound")
                return self.give_json({"id": "org/model", "sha": "c" * 40, "private": False, "siblings": []})
            super().do_GET()

        do_HEAD = do_POST = do_GET

    return WithModel


FAULTS: dict[str, type[Hub]] = {
    "silent": Silent, "silent later": Silent, "slow": Slow, "500": Failing, "404": Missing, "dropping": Dropping,
    "stalling": Stalling, "truncated": Truncated, "dns": Hub,
}  # fmt: skip


def main(home: str, fault: str, kind: str) -> None:
    Silent.answers = {"silent": 0, "silent later": 2}.get(fault, 0)
    server = QuietServer(("localhost", 0), add_model(FAULTS[fault]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ.update(HF_HOME=home, HF_ENDPOINT=f"http://localhost:{server.server_port}", HF_HUB_DISABLE_XET="1")
    if fault == "dns":
        socket.getaddrinfo = lambda *_, **__: time.sleep(60)  # type: ignore[assignment]

    from fusion.backbones.load import load_backbone
    from fusion.config.data import DataConfig
    from fusion.config.task import TaskConfig
    from fusion.data.rows import load_rows
    from fusion.errors import UserError
    from fusion.hub.tokenizer import load_tokenizer
    from fusion.tasks.task import HubConfig

    started, message = time.monotonic(), "nothing: it was loaded"
    try:
        if kind == "data":
            hub = HubConfig("org/plain", "small", None, {"train": "train"})
            task = TaskConfig(name="pets", text="text", labels=["cat", "dog"], metrics=["accuracy"], hub=hub)
            load_rows(task, DataConfig(), "train")
        elif kind == "backbone":
            load_backbone("org/model")
        else:
            load_tokenizer("org/model")
    except UserError as error:
        message = str(error)
    print(json.dumps({"message": message, "seconds": time.monotonic() - started}), flush=True)
    os._exit(0)  # the server's threads may sleep on


if __name__ == "__main__":
    main(*sys.argv[1:])
