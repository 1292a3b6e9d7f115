"""A run -> an HTTP server of its model, until it is told to stop; everything given is checked before torch loads."""

import logging
import os
import signal
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from rewardmodel.errors import InputError
from rewardmodel.inference.battles import single_model
from rewardmodel.run_folder import load_run_recipe
from rewardmodel.serving.limits import Limits

logger = logging.getLogger(__name__)

KEY_VARIABLE = "REWARDMODEL_API_KEY"
"""Environment variable of the key that requests must carry."""

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
"""What the server needs beside rewardmodel's own dependencies."""


def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    limits: Limits | None = None,
    overrides: Sequence[str] = (),
    log_texts: bool = False,
) -> None:
    """Answer HTTP requests with a run's model until SIGINT or SIGTERM, and finish what was started then.

    With the environment variable REWARDMODEL_API_KEY, requests must carry its value as a bearer token.

    Args:
        run: a run folder, or an export.
        host: address to listen on.
        port: 0 for any that is free.
        name: what requests may call the model, beside the run's folder and its name.
        limits: what is accepted; default: `Limits()`.
        overrides: keys of the run's recipe, as typed: `["--model.device", "cpu"]`.
        log_texts: log the bodies of requests.

    Raises:
        InputError: no trained run, a package that is missing, or an address that cannot be listened on.
    """
    folder, limits = Path(run), limits or Limits()
    _check_limits(limits)
    single_model(folder)
    recipe = load_run_recipe(folder, overrides)
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise InputError(f"the server needs {missing[0]}; install it with: pip install 'rewardmodel[serve]'")
    listening = _listen(host, port)
    key = os.environ.get(KEY_VARIABLE)
    if not key and not _is_loopback(host):
        logger.warning("anyone who reaches %s can ask this server: set %s to ask for a key", host, KEY_VARIABLE)

    import uvicorn

    from rewardmodel.inference.judge import load_judge
    from rewardmodel.serving.app import build_app

    judge = load_judge(folder, recipe)
    for module in ("rewardmodel.inference.predict", "rewardmodel.predictions"):  # would say the same at each request
        logging.getLogger(module).setLevel(logging.ERROR)
    names = list(dict.fromkeys(filter(None, (name, folder.resolve().name, str(run), str(folder.resolve())))))
    app = build_app(judge, names, limits, key=key, log_texts=log_texts)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=65))
    place = f"[{host}]" if ":" in host else host
    logger.info("%s is served at http://%s:%d", names[0], place, listening.getsockname()[1])
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn stops, then sends itself the signal again
    try:
        server.run([listening])
    except KeyboardInterrupt:  # the same for SIGINT
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    logger.info("stopped; every request that was started has been answered")


def _check_limits(limits: Limits) -> None:
    for name, value in vars(limits).items():
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')}: {value:g}; give a number above 0")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"--port: {host}:{port} cannot be listened on ({error}); name another") from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
