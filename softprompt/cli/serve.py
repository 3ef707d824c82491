"""`softprompt serve`: serve prompts over HTTP."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import add_command, positive_integer
from softprompt.cli.progress import Bar
from softprompt.errors import UserError

if TYPE_CHECKING:
    from softprompt.backbones.loading import Base
    from softprompt.methods.saved import SavedPrompt

_EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "serve",
        run,
        "serve prompts over HTTP, with an API compatible with OpenAI's",
        """\
One base model serves all prompts. The `model` of a request is the name of a prompt or of the base
model. Requests for different prompts run together in one batch. GET /health returns status 200 when
the server is ready. The command needs pip install 'softprompt[serve]'.

examples:
  softprompt serve sentiment=runs/sentiment summarize=runs/summarize
  softprompt serve --base smollm2-135m-instruct --prompts-dir runs --port 8000
  SOFTPROMPT_API_KEY=... softprompt serve --prompts-dir runs --host 0.0.0.0""",
    )
    command.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="NAME=RUN",
        help="serve the prompt of a run folder (or its prompt/) under this name",
    )
    command.add_argument(
        "--base", metavar="NAME", help="base model (default: the one recorded in the first prompt)"
    )
    command.add_argument(
        "--name",
        dest="model",
        metavar="NAME",
        help="name of the base model in requests (default: its own)",
    )
    command.add_argument(
        "--prompts-dir",
        type=Path,
        metavar="DIR",
        help="serve all finished runs and saved prompts in this folder, also those added later",
    )
    command.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    command.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="port (default: 8000; 0: a free one)"
    )
    _add_limits(command)
    _add_access(command)
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the base model (default: as recorded in the first prompt, or float32)",
    )
    command.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="quantize the base model (default: as recorded in the first prompt)",
    )


def _add_limits(command: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("slots", 16, "requests that generate at the same time"),
        ("max-tokens", 1024, "maximum tokens of a request: prefix, input and new tokens"),
        ("bank-tokens", 4096, "maximum tokens of all prefixes together"),
        ("max-waiting", 256, "maximum requests in the queue; further ones get status 429"),
        ("max-body-bytes", 2**20, "maximum size of a request's body"),
        ("timeout", 600, "seconds after which a request fails"),
        ("drain-seconds", 30, "seconds to finish running requests after SIGTERM"),
    ):
        command.add_argument(
            f"--{name}",
            type=positive_integer,
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )


def _add_access(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--api-key",
        metavar="KEY",
        help="require this key (default: $SOFTPROMPT_API_KEY, which other users cannot see)",
    )
    command.add_argument(
        "--admin-key",
        metavar="KEY",
        help="allow loading and removing prompts over HTTP with this key (default: "
        "$SOFTPROMPT_ADMIN_KEY)",
    )
    command.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="allow requests from web pages of this origin; can be repeated",
    )


def run(options: argparse.Namespace) -> None:
    """Serve until a signal arrives."""
    given = [_named_folder(word) for word in options.words]
    names = [name for name, _ in given]
    if len(set(names)) < len(names):
        raise UserError("two prompts have the same name")
    _require_extra()
    from softprompt.methods.saved import SavedPrompt
    from softprompt.serving.prompts import require_servable
    from softprompt.serving.server import Server, bind
    from softprompt.serving.service import Limits, Service
    from softprompt.serving.state import Options, State
    from softprompt.serving.watch import require_name

    for name in names:
        require_name(name)
    if options.prompts_dir is not None and not options.prompts_dir.is_dir():
        raise UserError(f"--prompts-dir {options.prompts_dir}: no such folder")
    settings = Options(
        api_key=options.api_key or os.environ.get("SOFTPROMPT_API_KEY") or None,
        admin_key=options.admin_key or os.environ.get("SOFTPROMPT_ADMIN_KEY") or None,
        prompts_dir=options.prompts_dir,
        max_body_bytes=options.max_body_bytes,
        timeout=options.timeout,
        drain_seconds=options.drain_seconds,
        cors_origins=tuple(options.cors_origin),
    )
    for name, key in (("API", settings.api_key), ("admin", settings.admin_key)):
        if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise UserError(
                f"the {name} key must consist of printable ASCII characters, without spaces at "
                "its ends"
            )
    with bind(options.host, options.port) as bound:
        saved = [SavedPrompt.read(folder) for _, folder in given]
        base = _base(options, saved)
        for _, folder in given:  # before compiling, which takes a minute
            require_servable(folder, base)
        limits = Limits(options.slots, options.max_tokens, options.bank_tokens, options.max_waiting)
        service = Service(base, options.model or base.name, limits)
        if service.name in names:
            raise UserError(
                f"{service.name} is the name of the base model; set another one with --name"
            )
        labels = settings.prompts_dir is not None or any(s.content.verbalizer for s in saved)
        Server(State(service, settings), given, labels=labels).run(bound, Bar)


def _require_extra() -> None:
    """Require the packages of the extra `serve`.

    Raises:
      UserError: if one is missing.
    """
    import importlib.util

    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve needs {missing[0]}: pip install 'softprompt[serve]'")


def _base(options: argparse.Namespace, saved: "Sequence[SavedPrompt]") -> "Base":
    """Load the base model, with the settings that the first prompt was trained with."""
    from softprompt.backbones.loading import load_base

    settings: dict[str, Any] = {}
    name = options.base
    if saved:
        trained = saved[0].content.base
        settings = trained.compute.model_dump(exclude={"mesh"})
        name = name or trained.name
    if name is None:
        raise UserError("give the base model with --base, or a prompt as NAME=RUN")
    for key in ("dtype", "quantize"):
        if getattr(options, key) is not None:
            settings[key] = getattr(options, key)
    return load_base(name, **settings)


def _named_folder(word: str) -> tuple[str, Path]:
    """Parse a prompt's name and folder."""
    name, equals, folder = word.partition("=")
    if not (name and equals and folder):
        raise UserError(f"{word!r}: give a prompt as NAME=RUN, such as sentiment=runs/sentiment")
    return name, Path(folder)


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError("must be a whole number from 0 to 65535")
    return int(text)
