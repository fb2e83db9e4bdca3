"""The fence: an nginx that stands before the SuperLink and lets only registered sites through, and only to what sites need.

Flower's Control and Runtime APIs have no authentication of their own and share the Fleet API's port, and a site signs the time
of its requests but not what is in them. So the fence asks for three things before it passes anything on: TLS 1.3 with a
certificate of the study's authority that is neither expired nor revoked; the Flower key that belongs to that very certificate;
and one of the few paths of the Fleet API that a registered SuperNode uses.
"""

import base64
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from fedseg.kit import Roster, RosterSite

SUPERLINK_PORT = 18000
"""Where the SuperLink listens on the loopback device, unless told otherwise."""
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "confirm-message-received",
)
"""What a registered SuperNode calls; registering itself is not among them."""
TRANSFERS = ("pull-object", "push-object")
"""The calls among them that carry pieces of arrays."""
TRANSFERS_AT_ONCE, TRANSFERS_EACH = 8, 3
"""So many of these are let through at one time, and of one site; a gate that comes in between is told to come again."""
LARGEST_REQUEST = "12m"
"""Flower sends arrays in pieces of 5 MiB."""
RATE, BURST, CONNECTIONS = 100, 400, 16
"""Requests per second, at once, and connections of one site."""

_TEMPLATE = """\
# The fence before the SuperLink. Written by `fedseg provision`; it is written anew when a site joins, is renewed or revoked.
# Check:  nginx -t -c {kit}/nginx.conf -p RUN_FOLDER        Start:  nginx -c {kit}/nginx.conf -p RUN_FOLDER
# RUN_FOLDER takes the log and the process id. Certificates are found beside this file.
worker_processes 1;
daemon off;
pid nginx.pid;
error_log stderr warn;

events {{
    worker_connections 1024;
}}

http {{
    server_tokens off;
    default_type application/octet-stream;
    client_body_temp_path unused-body;
    proxy_temp_path unused-proxy;
    fastcgi_temp_path unused-fastcgi;
    uwsgi_temp_path unused-uwsgi;
    scgi_temp_path unused-scgi;

    # certificate and Flower key belong together: SHA-1 of the certificate, then the key as Flower sends it
    map_hash_bucket_size 1024;
    map "$ssl_client_fingerprint $http_flwr_public_key" $fedseg_site {{
        default "";
{sites}    }}

    log_format fedseg '$time_iso8601 "$fedseg_site" $remote_addr $status $request_method $uri '
                      '$request_length $bytes_sent $request_time';
    access_log access.log fedseg;

    limit_req_zone $ssl_client_fingerprint zone=requests:10m rate={rate}r/s;
    limit_conn_zone $ssl_client_fingerprint zone=connections:10m;
    limit_conn_zone $server_name zone=transfers:1m;
    limit_req_status 429;
    limit_conn_status 429;

    upstream superlink {{
        server 127.0.0.1:{superlink_port};
        keepalive 16;
    }}

    server {{
        listen {listen}:{port} ssl;
        server_name {host};

        ssl_protocols TLSv1.3;
        ssl_certificate server.crt;
        ssl_certificate_key server.key;
        ssl_client_certificate ca.crt;
        ssl_crl crl.pem;
        ssl_verify_client on;
        ssl_verify_depth 1;
        ssl_session_tickets off;
        ssl_session_cache none;  # else a session could outlive the certificate that it was opened with

        client_max_body_size {largest};
        client_body_buffer_size {largest};  # whole requests in memory: nothing of an update touches this disk
        proxy_buffers 16 256k;
        proxy_buffer_size 256k;
        proxy_busy_buffers_size 512k;
        proxy_max_temp_file_size 0;
        client_body_timeout 120s;
        client_header_timeout 10s;
        large_client_header_buffers 4 8k;
        keepalive_timeout 75s;
        limit_req zone=requests burst={burst} nodelay;
        limit_conn connections {connections};

        error_page 400 495 496 497 = @closed;
        location @closed {{
            return 444;
        }}

        location / {{
            return 403;
        }}

        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host localhost;
        proxy_ssl_verify on;
        proxy_ssl_trusted_certificate ca.crt;
        proxy_ssl_name localhost;
        proxy_ssl_protocols TLSv1.2 TLSv1.3;
        proxy_connect_timeout 5s;
        proxy_read_timeout 300s;
        proxy_send_timeout 300s;
        proxy_next_upstream off;

        location ~ ^/v1/fleet/(?:{calls})$ {{
            if ($fedseg_site = "") {{
                return 403;
            }}
            limit_except POST {{
                deny all;
            }}
            proxy_pass https://superlink;
        }}

        # so many pieces of arrays at once, whatever the number of sites: each takes memory here and in the SuperLink
        location ~ ^/v1/fleet/(?:{transfers})$ {{
            if ($fedseg_site = "") {{
                return 403;
            }}
            limit_except POST {{
                deny all;
            }}
            limit_conn connections {transfers_each};
            limit_conn transfers {transfers_at_once};
            proxy_pass https://superlink;
        }}
    }}
}}
"""


def nginx_configuration(
    kit_folder: Path,
    roster: Roster,
    host: str,
    port: int,
    *,
    listen: str = "0.0.0.0",
    superlink_port: int = SUPERLINK_PORT,
    now: datetime | None = None,
) -> str:
    """The fence's configuration for the sites that may connect now.

    Args:
        kit_folder: the coordinator's kit, named in the comments.
        roster: the sites.
        host: name of the coordinator, as sites know it.
        port: on which sites connect.
        listen: address of the network device on which to listen.
        superlink_port: of the SuperLink on the loopback device.
        now: when; sites whose certificate has expired are left out.
    """
    admitted = roster.admitted(now or datetime.now(UTC))
    return _TEMPLATE.format(
        kit=kit_folder.name,
        sites="".join(f'        "{site.certificate_sha1} {flower_key(site)}" {site.name};\n' for site in admitted),
        host=host,
        port=port,
        listen=f"[{listen}]" if ":" in listen else listen,
        superlink_port=superlink_port,
        calls="|".join(FLEET_CALLS),
        transfers="|".join(TRANSFERS),
        transfers_each=TRANSFERS_EACH,
        transfers_at_once=TRANSFERS_AT_ONCE,
        rate=RATE,
        burst=BURST,
        connections=CONNECTIONS,
        largest=LARGEST_REQUEST,
    )


def public_pem(site: RosterSite) -> bytes:
    """A site's public key as Flower keeps it."""
    key = serialization.load_der_public_key(base64.b64decode(site.public_key))
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def flower_key(site: RosterSite) -> str:
    """A site's public key as it stands in the header of its requests."""
    return base64.b64encode(public_pem(site)).decode()
