"""A process that has imported what the stages need and forks victims, as it is told line by line on its stdin."""

from __future__ import annotations

import json
import os
import runpy
import selectors
import sys
from pathlib import Path
from typing import Any, NoReturn

_POLL = 0.05


def main() -> None:
    import datasets  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.bert  # noqa: F401

    import fusion.analysis.initialization
    import fusion.model.build
    import fusion.training.stage  # noqa: F401

    children: dict[int, Path] = {}
    ears = selectors.DefaultSelector()
    ears.register(sys.stdin.fileno(), selectors.EVENT_READ)
    heard = b""
    while True:
        if ears.select(_POLL):
            more = os.read(sys.stdin.fileno(), 1 << 16)
            if not more:
                return
            heard += more
            while b"\n" in heard:
                line, _, heard = heard.partition(b"\n")
                asked = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _be(asked)
                children[pid] = Path(asked["ended"])
        _reap(children)


def _reap(children: dict[int, Path]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            path = children.pop(pid)
            part = path.with_name(f".{path.name}")
            part.write_text(str(os.waitstatus_to_exitcode(status)), encoding="utf-8")
            os.replace(part, path)


def _be(asked: dict[str, Any]) -> NoReturn:
    """Becomes a victim: as nearly as can be what `python -m MODULE` is in a process of its own."""
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(file, number)
        from pipelines.chaos.fate import install

        fate = install()
        module, *sys.argv[1:] = asked["words"]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if fate is not None:
            fate.write_counts()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
