"""The command serve: takes backups on request, over HTTP."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from attuned_store import MissingDependencyError, snapshot_app, snapshot_on_start

from .backups import DIRECTORY, KEEP
from .showing import CommandError, show
from .states import open_existing, target_of, whole

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator

    from starlette.requests import Request

    from .states import Add


def _is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is this machine and can be reached from no other."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_local(request: Request) -> bool:
    """Authorizes, without a token, requests to this machine by name, and none that a page sent from a browser.

    A page may send requests here, or give its own host the address 127.0.0.1: neither gets past this.
    """
    host = re.fullmatch(r"\[?(.*?)\]?(?::\d+)?", request.headers.get("host", ""))
    own = request.headers.get("sec-fetch-site", "none") in {"none", "same-origin"}
    return host is not None and _is_loopback(host[1].lower()) and own and "origin" not in request.headers


def authorization(host: str) -> Callable[[Request], bool]:
    """Chooses who may ask: who knows the token, or, where there is none, who is on this machine."""
    token = os.environ.get("ATTUNED_STORE_TOKEN")
    if token is None:
        if not _is_loopback(host):
            reach = f"{host} may be reached from other machines"
            raise CommandError(f"{reach}: set ATTUNED_STORE_TOKEN to a secret, or serve on 127.0.0.1", 2)
        return _is_local
    if not re.fullmatch(r"[!-~]+", token):
        raise CommandError("ATTUNED_STORE_TOKEN is empty, or holds blanks or what is not ASCII", 2)

    def knows_token(request: Request) -> bool:  # a function shows its variables to nobody
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())

    return knows_token


@contextlib.contextmanager
def _ended_by_signals() -> Generator[None]:
    """Lets SIGTERM and Ctrl-C end the block: that is how it is meant to end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def _logged_to_stderr() -> Generator[None]:
    """Shows what happens while nobody looks: the snapshots that were taken, and what went wrong."""
    logger, handler = logging.getLogger("attuned_store"), logging.StreamHandler()
    level = logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _serve(args: argparse.Namespace) -> int:
    try:
        import uvicorn
    except ImportError as error:
        raise MissingDependencyError("serve needs uvicorn: pip install starlette uvicorn") from error

    authorize = authorization(args.host)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        stack.enter_context(_logged_to_stderr())
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        try:  # the port is taken before anything else is done
            listener = stack.enter_context(socket.create_server((args.host, args.port), family=family))
        except OSError as error:
            reason = f"cannot listen on {args.host}, port {args.port}: {error.strerror}"
            raise CommandError(reason) from error
        store = stack.enter_context(open_existing(args))
        app = snapshot_app(store, authorize=authorize, directory=args.directory, keep=args.keep)
        snapshot_on_start(store, keep=args.keep)
        host = f"[{args.host}]" if ":" in args.host else args.host
        url, target = f"http://{host}:{listener.getsockname()[1]}", target_of(args)
        show(args, {"url": url, "store": target}, f"serving {target} on {url}")
        getattr(sys.stdout, "flush", int)()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0


_NOTES = """
POST /api/snapshot takes a snapshot; GET /api/health, /api/ready and (where prometheus_client
is installed) /metrics. With ATTUNED_STORE_TOKEN set, requests but those for /api/ready need the
header "Authorization: Bearer" with it; without, only this machine is served. On start a snapshot
is taken if QDRANT_SNAPSHOT_ON_START is true. SIGTERM and Ctrl-C end it, and are no failure.
"""


def add_commands(add: Add) -> None:
    """Adds the command serve."""
    text = "take backups on request, over HTTP"
    parser = add(_serve, "serve", text, "serve --directory backups", _NOTES)
    text = "default: 127.0.0.1; others need $ATTUNED_STORE_TOKEN"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    text = "default: 8080; 0: one that is free"
    parser.add_argument("--port", type=whole(0, 65535), default=8080, metavar="N", help=text)
    parser.add_argument("--directory", metavar="DIRECTORY", help=f"of the snapshots; {DIRECTORY}")
    parser.add_argument("--keep", type=whole(1), metavar="N", help=KEEP)
