import tomllib

import pytest

from fedseg.coordinator.texts import site_toml
from fedseg.errors import ConfigError
from fedseg.site.config import SiteConfig, load_site
from fedseg.site.policy import Policy


def test_the_site_file_is_accepted_once_it_says_where_the_data_are(tmp_path):
    template = site_toml("Aare").decode()
    (tmp_path / "site.toml").write_text(template)
    with pytest.raises(ConfigError, match=r"site\.toml: data is missing: .* Write a line data = .* `fedseg data check"):
        load_site(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text(template.replace("# data = ", "data = "))
    site = load_site(tmp_path / "site.toml")
    assert (site.name, site.data, site.policy) == ("Aare", "/data/liver", Policy())
    assert site.device == "auto"


def test_the_site_file_shows_every_key_and_is_valid_with_all_of_them(tmp_path):
    lines = [
        line.removeprefix("# ")
        if line.startswith(("# [", "# ")) and (" = " in line or line.startswith("# ["))
        else line
        for line in site_toml("Aare").decode().splitlines()
    ]
    shown = tomllib.loads("\n".join(lines))
    assert set(shown) == set(SiteConfig.model_fields) - {"shift"}  # is for simulations, a hospital has a scanner
    assert set(shown["policy"]) == set(Policy.model_fields)
    (tmp_path / "site.toml").write_text("\n".join(lines))
    load_site(tmp_path / "site.toml")
    examples = {"data", "cases", "person", "name", "cache", "state", "policy", "key"}
    for key in set(shown) - examples:
        assert shown[key] == SiteConfig.model_fields[key].default
