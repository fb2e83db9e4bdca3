import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.variants import manifests, pods, rendered

FOLDERS = ("coordinator", "site")
each = pytest.mark.parametrize("folder", FOLDERS)
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, whose kustomize renders, is absent"
)


def named(folder: str, kind: str) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item for item in manifests(folder) if item["kind"] == kind}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


@needs_kubectl
@each
def test_kustomize_renders_objects_that_follow_the_schemas(folder: str, tmp_path: Path):
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate (PyPI), which carries schemas, is absent"
    )
    items = rendered(folder, tmp_path)
    assert len(items) >= 6
    for item in items:
        validator.validate(item, validator.latest_version(), strict=True)


@needs_kubectl
@each
def test_rendered_images_are_pinned_and_secrets_are_those_that_are_mounted(folder: str, tmp_path: Path):
    items = rendered(folder, tmp_path)
    secrets = {item["metadata"]["name"] for item in items if item["kind"] == "Secret"}
    used = set()
    for pod in pods(items).values():
        for container in containers(pod):
            name, _, tag = container["image"].rpartition(":")
            assert "/" in name
            assert tag[0].isdigit()
        used |= {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert used == secrets


@each
def test_every_container_meets_the_restricted_pod_security_standard(folder: str):
    for pod in pods(manifests(folder)).values():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not pod.get("hostNetwork")
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in containers(pod):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
    (namespace,) = named(folder, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@each
def test_what_no_policy_allows_is_denied(folder: str):
    deny = named(folder, "NetworkPolicy")["default-deny"]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_no_policy_allows_the_site_service_anything_and_no_container_shares_its_network():
    labels = named("site", "StatefulSet")["service"]["spec"]["template"]["metadata"]["labels"]
    for name, policy in named("site", "NetworkPolicy").items():
        if name != "default-deny":
            wanted = policy["spec"]["podSelector"]["matchLabels"]
            assert wanted
            assert not wanted.items() <= labels.items()
    assert len(containers(pods(manifests("site"))["service"])) == 1


def test_the_gate_reaches_one_address_and_the_resolver():
    spec = named("site", "NetworkPolicy")["gate-out"]["spec"]
    assert spec["policyTypes"] == ["Egress"]
    coordinator, resolver = spec["egress"]
    assert [to["ipBlock"]["cidr"].endswith("/32") for to in coordinator["to"]] == [True]
    assert {port["port"] for port in resolver["ports"]} == {53}


def test_nothing_leaves_the_coordinator_and_only_the_port_of_nginx_is_let_in():
    spec = named("coordinator", "NetworkPolicy")["fleet-in"]["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    assert [port["port"] for rule in spec["ingress"] for port in rule["ports"]] == ["fleet"]


def test_the_service_mounts_data_read_only_twice_over_and_the_gate_not_at_all():
    spec = pods(manifests("site"))
    (service,) = spec["service"]["containers"]
    volumes = {volume["name"]: volume for volume in spec["service"]["volumes"]}
    mounts = {mount["name"]: mount for mount in service["volumeMounts"]}
    assert volumes["data"]["persistentVolumeClaim"]["readOnly"] is True
    assert mounts["data"]["readOnly"] is True
    writable = {name for name, mount in mounts.items() if not mount.get("readOnly")}
    assert writable == {"cache", "state", "socket", "tmp", "shm"}
    for claim in ("data",):
        assert named("site", "PersistentVolumeClaim")[claim]["spec"]["accessModes"] == ["ReadOnlyMany"]
    assert {v["name"] for v in spec["gate"]["volumes"]} == {"secret", "kit", "flower", "socket", "tmp"}


def test_gate_and_service_share_the_socket_on_one_node_and_the_user():
    spec = pods(manifests("site"))
    claims = [
        {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        for pod in (spec["gate"], spec["service"])
    ]
    assert claims[0] & claims[1] == {"socket"}
    assert spec["gate"]["securityContext"]["runAsUser"] == spec["service"]["securityContext"]["runAsUser"]
    assert "nodeAffinity" in named("site", "PersistentVolume")["fedseg-socket"]["spec"]


@each
def test_every_process_is_probed(folder: str):
    for pod in pods(manifests(folder)).values():
        for container in pod["containers"]:
            assert "livenessProbe" in container or "readinessProbe" in container
