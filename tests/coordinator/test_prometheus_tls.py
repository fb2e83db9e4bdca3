"""The real Prometheus is let in with a password, a token or a certificate over TLS, and is kept out without them."""

import shutil
import ssl
import subprocess
import time
import urllib.request
from hashlib import sha256

import bcrypt
import pytest
import yaml

from fedseg.coordinator.exporter import serve
from tests.certificates import Issuer
from tests.federated.toys import run_toy, toy_experiment
from tests.prometheus import DEPLOYED, Prometheus

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian's package) is not installed"),
]

PASSWORD, TOKEN = "correct horse", "drawn-at-random"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The example configurations of deploy/prometheus, and the files that they name."""
    issuer = Issuer(tmp_path_factory.mktemp("prometheus"))
    issuer.server()
    issuer.site("prometheus")
    issuer.site("danube")
    example = yaml.safe_load((DEPLOYED / "web-config.yml").read_text())
    example["basic_auth_users"]["prometheus"] = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    (issuer.folder / "web-config.yml").write_text(yaml.safe_dump(example))
    tokens = {"bearer_tokens": {"prometheus": sha256(TOKEN.encode()).hexdigest()}}
    (issuer.folder / "with-tokens.yml").write_text(yaml.safe_dump(example | tokens))
    certificates = {
        "client_auth_type": "RequireAndVerifyClientCert",
        "client_ca_file": "ca.crt",
        "client_allowed_sans": ["urn:fedseg:study:prometheus"],
    }
    tls = {"tls_server_config": example["tls_server_config"] | certificates}
    (issuer.folder / "certificates.yml").write_text(yaml.safe_dump(tls))
    for name, text in {"password": PASSWORD, "token": TOKEN, "wrong": "wrong"}.items():
        (issuer.folder / name).write_text(f"{text}\n")
    run_toy(toy_experiment(rounds=2), issuer.folder / "run")
    return issuer.folder


def job(port, *, certificate=None, **credentials):
    """The example's scrape configuration with other credentials."""
    (example,) = yaml.safe_load((DEPLOYED / "prometheus-tls.yml").read_text())["scrape_configs"]
    example.pop("basic_auth")
    if certificate is not None:
        example["tls_config"] |= {"cert_file": f"{certificate}.crt", "key_file": f"{certificate}.key"}
    return example | {"static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} | credentials


@pytest.mark.timeout(120)
def test_prometheus_is_let_in_with_what_is_right_and_with_nothing_else(folder):
    endpoints = [serve(folder / "run", web_config=folder / name) for name in ("with-tokens.yml", "certificates.yml")]
    asks, certified = (server.server_port for server, _ in endpoints)
    user = {"username": "prometheus"}
    jobs = {
        "password": job(asks, basic_auth=user | {"password_file": "password"}),
        "token": job(asks, authorization={"credentials_file": "token"}),
        "certificate": job(certified, certificate="prometheus"),
        "wrong-password": job(asks, basic_auth=user | {"password_file": "wrong"}),
        "wrong-token": job(asks, authorization={"credentials_file": "wrong"}),
        "nothing": job(asks),
        "no-certificate": job(certified, basic_auth=user | {"password_file": "password"}),
        "another-certificate": job(certified, certificate="danube"),
    }
    prometheus = Prometheus(folder, {name: job | {"job_name": name} for name, job in jobs.items()}, rules=())
    try:
        end = time.monotonic() + 60
        while len(prometheus.query("up")) < len(jobs) or not prometheus.scrapes(3):
            assert time.monotonic() < end, prometheus.log()
            time.sleep(0.1)
        targets = {target["labels"]["job"]: target for target in prometheus.ask("targets")["activeTargets"]}
        up = {sample["metric"]["job"] for sample in prometheus.query("up == 1")}
        rounds = prometheus.query('fedseg_rounds_finished{job="token"}')
    finally:
        prometheus.close()
        for server, thread in endpoints:
            server.shutdown()
            server.server_close()
            thread.join(10)
    assert up == {"password", "token", "certificate"}
    assert [sample["value"][1] for sample in rounds] == ["2"]
    for name in ("wrong-password", "wrong-token", "nothing"):
        assert "401 Unauthorized" in targets[name]["lastError"]
    assert all(targets[name]["health"] == "down" for name in ("no-certificate", "another-certificate"))


def test_a_browser_that_knows_a_password_sees_the_page(folder):
    server, thread = serve(folder / "run", web_config=folder / "web-config.yml")
    try:
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, server.url, "prometheus", PASSWORD)
        tls = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=folder / "ca.crt"))
        browser = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords), tls)
        assert b"<html" in browser.open(server.url, timeout=20).read()
        assert b'"study":"toy"' in browser.open(f"{server.url}status.json", timeout=20).read()
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.mark.parametrize("check", ["web-config web-config.yml", "config prometheus-tls.yml"])
def test_promtool_finds_nothing_wrong_with_the_examples(folder, check):
    for name in ("prometheus-tls.yml", "rules.yml"):
        shutil.copy(DEPLOYED / name, folder)
    done = subprocess.run(
        ["promtool", "check", *check.split()], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
