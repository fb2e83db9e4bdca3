from pathlib import Path

import pytest

from fedseg.site.config import load_site
from tests.deploy.variants import DEPLOY, compose, manifests, pods, unit


@pytest.fixture
def site():
    return load_site(DEPLOY / "site.example.toml")


def under(folder: str | Path, parents: set[str]) -> bool:
    return any(Path(folder).is_relative_to(parent) for parent in parents)


def test_the_example_fits_the_container(site):
    service = compose(DEPLOY / "compose" / "site.yaml")["services"]["service"]
    writable = {volume["target"] for volume in service["volumes"] if not volume.get("read_only")}
    assert site.data in {volume["target"] for volume in service["volumes"] if volume.get("read_only")}
    assert all(under(folder, writable) for folder in (site.cache, site.state_folder, site.socket))


def test_the_example_fits_the_pod(site):
    (service,) = pods(manifests("site"))["service"]["containers"]
    writable = {mount["mountPath"] for mount in service["volumeMounts"] if not mount.get("readOnly")}
    assert site.data in {mount["mountPath"] for mount in service["volumeMounts"] if mount.get("readOnly")}
    assert all(under(folder, writable) for folder in (site.cache, site.state_folder, site.socket))


def test_the_example_fits_the_unit(site):
    service = unit("fedseg-site-service")
    writable = {
        f"/var/cache/{service['CacheDirectory'][0]}",
        f"/var/lib/{service['StateDirectory'][0]}",
        *service["ReadWritePaths"],
    }
    assert service["ReadOnlyPaths"] == [site.data]
    assert all(under(folder, writable) for folder in (site.cache, site.state_folder, site.socket))


def test_the_gate_looks_for_the_socket_where_the_service_opens_it(site):
    gates = [
        compose(DEPLOY / "compose" / "site.yaml")["services"]["gate"]["command"],
        pods(manifests("site"))["gate"]["containers"][0]["args"],
        unit("fedseg-gate")["ExecStart"][0].split(),
    ]
    for words in gates:
        assert words[words.index("--socket") + 1] == site.socket
