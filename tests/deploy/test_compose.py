import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.variants import COMPOSE_FILES, DEPLOY, PROJECT, compose, services

SITE = DEPLOY / "compose" / "site.yaml"
EVERY = services()
WITH_DATA = [(name, service) for name, service in EVERY if name.startswith("site/service")]


def mounts(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {volume["target"]: volume for volume in service["volumes"]}


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.stem)
def test_a_compose_file_follows_the_specification(path: Path):
    specification = pytest.importorskip(
        "compose_spec", reason="compose-spec (PyPI), which carries the schema, is absent"
    )
    project = compose(path)
    specification.ComposeSpecification.model_validate(project)
    models = specification.models
    for name, service in project["services"].items():
        known = {field.alias or key for key, field in models.Service.model_fields.items()}
        assert set(service) <= known, name
        if "healthcheck" in service:
            assert set(service["healthcheck"]) <= set(models.Healthcheck.model_fields), name


@pytest.mark.parametrize(("name", "service"), WITH_DATA)
def test_the_site_service_has_no_network(name: str, service: dict[str, Any]):
    assert service["network_mode"] == "none"
    assert "networks" not in service
    assert "ports" not in service


@pytest.mark.parametrize(("name", "service"), WITH_DATA)
def test_data_and_site_file_are_read_only_and_the_rest_is_cache_state_and_socket(name: str, service: dict[str, Any]):
    writable = {target for target, volume in mounts(service).items() if not volume.get("read_only")}
    assert mounts(service)["/data"]["read_only"] is True
    assert writable == {"/var/cache/fedseg", "/var/lib/fedseg", "/run/fedseg"}


def test_only_the_variant_with_a_gpu_asks_for_one_and_a_profile_chooses():
    variants = dict(WITH_DATA)
    plain = {k: v for k, v in variants["site/service"].items() if k != "profiles"}
    gpu = {k: v for k, v in variants["site/service-gpu"].items() if k not in ("profiles", "deploy")}
    assert plain == gpu
    assert [variants[f"site/{name}"]["profiles"] for name in ("service", "service-gpu")] == [["cpu"], ["gpu"]]


def test_the_gate_mounts_no_data():
    gate = compose(SITE, FEDSEG_DATA="/hospital/cases")["services"]["gate"]
    assert set(mounts(gate)) == {"/etc/fedseg/kit", "/var/lib/fedseg-gate", "/run/fedseg"}
    assert "/hospital/cases" not in str(gate)
    assert "group_add" not in gate


def test_gate_and_service_share_the_socket_and_the_user_and_nothing_else():
    project = compose(SITE)["services"]
    gate, service = project["gate"], project["service"]
    shared = {v["source"] for v in gate["volumes"]} & {v["source"] for v in service["volumes"]}
    assert shared == {"socket"}
    assert gate["user"] == service["user"] == "10001:10001"


@pytest.mark.parametrize(("name", "service"), EVERY)
def test_a_container_is_not_root_cannot_gain_rights_and_writes_only_where_told(name: str, service: dict[str, Any]):
    user, group = service["user"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize(("name", "service"), EVERY)
def test_an_image_is_pinned(name: str, service: dict[str, Any]):
    raw = {k: v for p in COMPOSE_FILES for k, v in images(p).items()}[name]
    assert "latest" not in raw
    assert raw.startswith("${FEDSEG_") or "_DIGEST:?" in raw.split("@")[1], raw


def images(path: Path) -> dict[str, str]:
    return {f"{path.stem}/{name}": s["image"] for name, s in yaml.safe_load(path.read_text())["services"].items()}


def test_only_nginx_is_reached_from_outside():
    outside = {name: service["ports"] for name, service in EVERY if "ports" in service}
    assert outside.pop("coordinator/network") == ["443:443"]
    assert all(port.startswith("127.0.0.1:") for ports in outside.values() for port in ports)
    for name in ("coordinator", "nginx"):
        assert dict(EVERY)[f"coordinator/{name}"]["network_mode"] == "service:network"


@pytest.mark.parametrize(("name", "service"), [item for item in EVERY if "build" in item[1]])
def test_a_build_finds_its_context_and_its_dockerfile(name: str, service: dict[str, Any]):
    context = (DEPLOY / "compose" / service["build"]["context"]).resolve()
    assert context == PROJECT
    assert (context / service["build"]["dockerfile"]).is_file()


def test_the_example_settings_name_every_variable_and_no_other():
    used = {name for path in COMPOSE_FILES for name in re.findall(r"\$\{(\w+)", path.read_text())}
    example = (DEPLOY / "compose" / ".env.example").read_text()
    named = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    assert named - {"COMPOSE_PROFILES"} == used
