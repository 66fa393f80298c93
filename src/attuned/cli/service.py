"""The command serve: a store over HTTP."""

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
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attuned_store import MissingDependencyError, service_app, snapshot_on_start

from .arguments import Command, argument, open_target, target_of, whole
from .files import IN_PLACE, KEEP
from .showing import CommandError, show

if TYPE_CHECKING:
    from starlette.requests import Request


def _is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is this machine and can be reached from no other."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def authorization(host: str) -> Callable[["Request"], bool] | None:
    """Chooses who may ask: who knows the token, or, where there is none, None for who is on this machine."""
    token = os.environ.get("ATTUNED_STORE_TOKEN")
    token = token and token.strip()  # the line end of a file that it was read from is no part of it
    if token is None and _is_loopback(host):
        return None
    if token is None:
        reach = f"{host} may be reached from other machines"
        raise CommandError(f"{reach}: set ATTUNED_STORE_TOKEN to a secret, or serve on 127.0.0.1", 2)
    if not re.fullmatch(r"[!-~]+", token):
        raise CommandError("ATTUNED_STORE_TOKEN is empty, or holds blanks or what is not ASCII", 2)

    def knows_token(request: "Request") -> bool:  # a function shows its variables to nobody
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())

    return knows_token


def _serve(args: Namespace) -> int:
    try:
        import uvicorn
    except ImportError as error:
        raise MissingDependencyError("serve needs uvicorn: pip install starlette uvicorn") from error

    authorize = authorization(args.host)
    logger, handler = logging.getLogger("attuned_store"), logging.StreamHandler()
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # both signals are how it is meant to end
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            stack.callback(signal.signal, signal.SIGTERM, before or signal.SIG_DFL)
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        # To stderr go the snapshots that were taken, and what went wrong.
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        stack.callback(logger.setLevel, logger.level)
        stack.callback(logger.removeHandler, handler)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)

        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        try:  # the port is taken before anything else is done
            listener = stack.enter_context(socket.create_server((args.host, args.port), family=family))
        except OSError as error:
            raise CommandError(f"cannot listen on {args.host}, port {args.port}: {error.strerror}") from None
        store, target = stack.enter_context(open_target(args)), target_of(args)
        app = service_app(store, authorize=authorize, directory=args.directory, keep=args.keep)
        snapshot_on_start(store, keep=args.keep)
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        show(args, {"url": url, "store": target}, f"serving {target} on {url}")
        getattr(sys.stdout, "flush", int)()
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
        config = uvicorn.Config(app, proxy_headers=False, lifespan="off", ws="none", **quiet)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


_NOTES = """
So several programs share one directory: GET, PUT, PATCH and DELETE /api/states/USER, its
/history, GET /api/states, POST /api/search; POST /api/snapshot takes a backup; GET /api/health,
/api/ready and (where prometheus_client is installed) /metrics. GET /docs, which a browser shows,
describes them. With ATTUNED_STORE_TOKEN set, requests but those for /docs and /api/ready need the
header "Authorization: Bearer" with it, and may do everything; without, every user of this machine
may, and nobody else. On start a snapshot is taken if QDRANT_SNAPSHOT_ON_START is true. SIGTERM
and Ctrl-C end it, and are no failure.
"""
_HOST = "default: 127.0.0.1; others need $ATTUNED_STORE_TOKEN"
_PORT = "default: 8080; 0: one that is free"
_SERVE = (
    argument("--host", default="127.0.0.1", help=_HOST),
    argument("--port", type=whole(0, 65535), default=8080, metavar="N", help=_PORT),
    argument("--directory", metavar="DIRECTORY", help=f"of the snapshots; {IN_PLACE}"),
    KEEP,
)
_ABOUT = "share the store over HTTP: states, searches, backups"
SERVE = Command("serve", _serve, _ABOUT, "--port 8080", _SERVE, notes=_NOTES)
