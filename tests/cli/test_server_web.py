import stat
from base64 import b64encode

import pytest
import yaml
from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.errors import ConfigError
from fedseg.web_auth import Credentials
from fedseg.web_config import load_web_config


def run(*words, typed=None):
    return CliRunner().invoke(app, ["server", *map(str, words)], input=typed)


def basic(user, password):
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


def test_the_printed_line_lets_in_whoever_knows_the_password(tmp_path):
    done = run("web-password", typed="änne\nsecret\nsecret\n")
    assert done.exit_code == 0, done.output
    assert "secret" not in done.stdout
    (tmp_path / "web.yml").write_text(f"basic_auth_users:\n{done.stdout}")
    credentials = Credentials(load_web_config(tmp_path / "web.yml"))
    assert credentials.accept(basic("änne", "secret"))
    assert not credentials.accept(basic("änne", "secret "))


@pytest.mark.parametrize(("typed", "told"), [("a:b\nx\nx\n", "no colon"), (f"a\n{'x' * 73}\n{'x' * 73}\n", "72 bytes")])
def test_a_name_or_a_password_that_could_not_be_used_is_refused(typed, told):
    done = run("web-password", typed=typed)
    assert done.exit_code == 2
    assert told in done.stderr


def test_a_token_lies_in_a_closed_file_and_only_its_hash_is_printed(tmp_path):
    file = tmp_path / "grafana.token"
    done = run("web-token", file)
    assert done.exit_code == 0, done.output
    token = file.read_text().strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(yaml.safe_load(done.stdout)) == ["grafana"]
    assert token not in done.output
    (tmp_path / "web.yml").write_text(f"bearer_tokens:\n{done.stdout}")
    assert Credentials(load_web_config(tmp_path / "web.yml")).accept(f"Bearer {token}")
    assert isinstance(run("web-token", file).exception, ConfigError)
    assert file.read_text().strip() == token


@pytest.mark.parametrize("command", [["metrics"], ["watch", "--web"]])
def test_a_page_for_everybody_needs_a_configuration(tmp_path, command):
    name, *options = command
    done = run(name, tmp_path, *options, "--host", "0.0.0.0", "--port", "0")
    assert isinstance(done.exception, ConfigError)
    assert "there is no --web-config" in str(done.exception)
