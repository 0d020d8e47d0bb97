"""A SuperNode's session at the server: one that died without a word holds its key for a minute, unless it is closed."""

import contextlib

from sheepfold.flower import keys
from sheepfold.node.settings import NodeSettings


def close(settings: NodeSettings, node_id: int) -> None:
    """Tell the server that this machine's last SuperNode is gone; nothing comes of it where it knows, or is silent."""
    import httpx
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    key = keys.private_key(settings.key)
    client = FleetHttpClient.from_server_address(
        settings.server,
        False,
        settings.ca.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())],
    )
    with client, contextlib.suppress(httpx.HTTPError):
        client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
