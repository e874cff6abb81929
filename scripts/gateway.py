"""`matryoshka gateway`: an endpoint in front of the controller that records what agents do with it."""

import asyncio

from matryoshka.inference import server
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.gateway import open_gateway
from matryoshka.pilot.gateway_record import GatewayConfig
from matryoshka.scripts.serve import callers_key, log_requests


def gateway(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT; the address is printed when requests are answered."""
    log_requests()
    server.check_exposure(config.host, config.api_key_env or None, config.allow_anonymous)
    key = callers_key(config.api_key_env)

    def ready(port: int) -> None:
        print(f"http://{config.host}:{port}/v1", flush=True)

    with open_gateway(config, RUNS / config.name) as (engine, make):
        asyncio.run(server.serve(engine, config.host, config.port, key, ready, config.allow_anonymous, make))
