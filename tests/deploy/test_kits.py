"""What `fedseg provision` writes is what deploy/ expects to find in a kit."""

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from fedseg.coordinator.provision import provision
from tests.deploy.variants import DEPLOY, PROJECT, compose, manifests, pods, unit

STUDY = """
name = "trial"
experiment = "{experiment}"
[coordinator]
host = "fl.example.org"
port = 8443
[[sites]]
name = "Aare"
"""


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(STUDY.format(experiment=PROJECT / "server" / "experiments" / "phantom.toml"))
    provision(folder / "study.toml", folder / "kits", now=datetime.now(UTC))
    return folder / "kits"


def secret_files(folder: str) -> set[str]:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / folder / "kustomization.yaml").read_text())
    return {Path(name).name for generator in kustomization["secretGenerator"] for name in generator["files"]}


def test_the_secrets_of_the_coordinator_are_its_whole_kit(kits: Path):
    assert secret_files("coordinator") == {path.name for path in (kits / "coordinator").iterdir()}


def test_the_secrets_of_a_site_are_its_whole_kit_and_its_approvals(kits: Path):
    assert secret_files("site") == {path.name for path in (kits / "sites" / "Aare").iterdir()} | {"approved.json"}


def test_the_site_service_does_not_get_the_private_key():
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / "site" / "kustomization.yaml").read_text())
    files = {generator["name"]: generator["files"] for generator in kustomization["secretGenerator"]}
    secrets = {v["secret"]["secretName"] for v in pods(manifests("site"))["service"]["volumes"] if "secret" in v}
    assert [files[name] for name in secrets] == [["kit/site.toml"]]
    service = compose(DEPLOY / "compose" / "site.yaml")["services"]["service"]
    assert [v["target"] for v in service["volumes"] if v["target"].startswith("/etc")] == ["/etc/fedseg/site.toml"]
    assert unit("fedseg-site-service")["InaccessiblePaths"] == ["-/etc/fedseg/kit/site.key"]


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is absent")
def test_nginx_takes_the_configuration_of_the_kit_as_the_units_call_it(kits: Path, tmp_path: Path):
    (line,) = unit("fedseg-nginx")["ExecStartPre"]
    words = line.replace("/etc/fedseg/kit", str(kits / "coordinator")).replace("/var/lib/fedseg-nginx", str(tmp_path))
    done = subprocess.run(["nginx", *words.split()[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (start,) = unit("fedseg-nginx")["ExecStart"]
    assert start.split()[1:] == line.split()[3:]
    assert "daemon off;" in (kits / "coordinator" / "nginx.conf").read_text()  # not said a second time by any variant
