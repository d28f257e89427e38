"""The subcommand that serves a bundle over HTTP."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from .common import RUNTIME, open_pipeline, quiet
from .group import main


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another needs --api-key-file.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Keys that clients must send, one a line."
)
@click.option("--insecure", is_flag=True, help="Serve other machines without a key.")
@click.option("--name", help="The model's name for clients. [default: the bundle's folder's]")
@click.option(
    "--max-batch",
    type=int,
    default=8,
    show_default=True,
    help="Images of a micro-batch, of whichever requests: a power of two.",
)
@click.option("--max-wait-ms", type=float, default=10, show_default=True, help="How long an image waits for company.")
@click.option("--queue", type=int, default=256, show_default=True, help="Images that may wait; more are refused (429).")
@click.option("--timeout", type=float, default=300, show_default=True, help="Seconds that a request may take (504).")
@click.option(
    "--no-trial",
    is_flag=True,
    help="Do not try at start whether pictures depend on what is beside them (their last bits then may), and in how small "
    "micro-batches they are the same.",
)
@RUNTIME
def serve(
    bundle: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    insecure: bool,
    name: str | None,
    max_batch: int,
    max_wait_ms: float,
    queue: int,
    timeout: float,
    no_trial: bool,
    **options: Any,
) -> None:
    """Serve a bundle over HTTP: OpenAI's routes, and a page to try it.

    Ctrl-C ends it when what was begun is finished; a second one at once.

    \b
    Example:  arinar serve bundle/
              arinar serve bundle/ --host 0.0.0.0 --port 80 --api-key-file keys.txt
    """
    from arinar.serve import logs
    from arinar.serve.app import create_app
    from arinar.serve.keys import Keys
    from arinar.serve.server import LOOPBACK, Server, address_of, listen
    from arinar.serve.service import Options, Service

    keys = Keys.read(api_key_file) if api_key_file else None
    local = host in LOOPBACK
    if not local and keys is None and not insecure:
        raise ValueError(
            f"--host {host} lets other machines in: give --api-key-file (`openssl rand -hex 24 > keys.txt` makes one), or "
            f"--insecure where everyone may use it"
        )
    asked = Options(name, max_batch, max_wait_ms, queue, timeout, trial=not no_trial)
    with listen(host, port) as listening:  # before the long work: the port may be taken
        service = Service(open_pipeline(bundle, **RUNTIME.of(options), tell=quiet), asked)
        logs.set_up()
        app = create_app(service, keys=keys, hosts=LOOPBACK if local and keys is None else None)
        _greet(address_of(listening), keys is not None, service)
        with contextlib.suppress(KeyboardInterrupt):  # told again once everything has come to its end
            Server(app, service).run(sockets=[listening])
    click.echo("stopped")


def _greet(address: str, locked: bool, service: Any) -> None:
    pipeline = service.pipeline
    click.echo(f"{service.name} ({pipeline.precision}, {pipeline.backend.name}) on {address}   Ctrl-C stops it")
    key = " -H 'Authorization: Bearer KEY'" if locked else ""
    click.echo(
        f"  curl {address}/v1/images/generations{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"prompt": "3", "seed": 0}}\' | python3 -c '
        f"\"import base64, json, sys; open('3.png', 'wb').write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))\""
    )
