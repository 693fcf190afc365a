"""The files in deploy/ start the commands that there are, with arguments that these accept."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from fedpeft.deployment import node, server
from fedpeft.deployment.keys import write_node_keys
from fedpeft.deployment.policy import ALLOW, LIMITS, Policy
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
NAMES = ("server", "node")
PARSERS = {"server": server.parse, "node": node.parse}
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.gpu")
SERVICES = {"server": "server", "node": "node", "node-gpu": "node"}
INSTALLED = "/opt/fedpeft/.venv/bin/fedpeft"


def unit(name: str) -> dict[str, list[str]]:
    """Return the values of a unit's settings in order; a setting may come more than once."""
    settings: dict[str, list[str]] = defaultdict(list)
    for line in (DEPLOY / f"fedpeft-{name}.service").read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            settings[key].append(value)
    return settings


def one(settings: dict[str, list[str]], key: str) -> str:
    """Return the value of a setting that comes once."""
    (value,) = settings[key]
    return value


def assignments(path: Path) -> dict[str, str]:
    """Return the variables of a file as systemd and compose read it."""
    return dict(
        word.split("=", 1) for word in shlex.split(path.read_text(), comments=True) if "=" in word
    )


def unit_arguments(name: str, folder: Path) -> list[str]:
    """Return the words of ExecStart, with systemd's folders and copies of the secrets below one."""
    settings = unit(name)
    line = one(settings, "ExecStart").replace("%d/", f"{folder}/").replace("%S/", f"{folder}/")
    line = line.replace("/etc/fedpeft/", f"{folder}/")
    for each in settings["LoadCredential"]:
        (folder / each.partition(":")[0]).touch()
    shutil.copy(DEPLOY / "policy.yaml.example", folder / "policy.yaml")
    file = Path(one(settings, "EnvironmentFile"))
    variables = assignments(DEPLOY / f"{file.name}.example")
    return [
        part
        for word in shlex.split(line)
        for part in (variables[word[1:]].split() if word[0] == "$" else [word])
    ]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def filled(text: str, variables: dict[str, str]) -> str:
    """Replace ${NAME:-default} as compose does."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: variables.get(m[1]) or m[2], text)


@pytest.mark.parametrize("name", NAMES)
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    copy = tmp_path / f"fedpeft-{name}.service"
    text = (DEPLOY / copy.name).read_text()
    assert text.count(INSTALLED) == 1
    copy.write_text(text.replace(INSTALLED, "/bin/true"))  # verify wants a program that is there
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert copy.name not in done.stderr  # a key that systemd does not know is only a warning


def test_the_server_unit_starts_a_server(tmp_path: Path) -> None:
    program, command, *arguments = unit_arguments("server", tmp_path)
    assert (program, command) == (INSTALLED, "server")
    assert server.parse(arguments) == Namespace(
        folder=tmp_path / "fedpeft-server",
        certificate=tmp_path / "server.pem",
        key=tmp_path / "server.key",
        host="0.0.0.0",
        port=9092,
        control_port=8000,
    )


def test_the_node_unit_starts_a_node(tmp_path: Path) -> None:
    program, command, *arguments = unit_arguments("node", tmp_path)
    assert (program, command) == (INSTALLED, "node")
    assert node.parse(arguments) == Namespace(
        superlink="fl.example:9092",
        certificate=tmp_path / "server.pem",
        key=tmp_path / "node.key",
        insecure=False,
        partition=0,
        data_path=None,
        state_folder=tmp_path / "fedpeft-node" / "client",
        policy=tmp_path / "policy.yaml",
        overrides=[],
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_service_has_not_failed(name: str) -> None:
    """The commands end with 143 at SIGTERM, see tests/test_stop.py."""
    settings = unit(name)
    assert one(settings, "SuccessExitStatus") == "143"
    assert one(settings, "Restart") == "on-failure"
    assert one(settings, "KillMode") == "mixed"


@pytest.mark.parametrize("name", NAMES)
def test_a_service_writes_in_its_state_directory_alone(name: str) -> None:
    settings = unit(name)
    state = f"%S/{one(settings, 'StateDirectory')}"
    assert state == f"%S/fedpeft-{name}"
    assert one(settings, "ProtectSystem") == "strict"
    assert not settings["ReadWritePaths"]
    written = dict(each.split("=") for each in settings["Environment"])
    assert written.keys() == {"HOME", "FEDPEFT_CACHE", "HF_HOME"}
    assert all(f"{path}/".startswith(f"{state}/") for path in written.values())
    assert one(settings, "WorkingDirectory") == state


@pytest.mark.parametrize("name", NAMES)
def test_a_service_has_a_user_without_rights(name: str) -> None:
    settings = unit(name)
    user = one(settings, "User")
    assert re.search(rf'^u {user} - ".*" /var/lib/{user}$', text_of("sysusers.conf"), re.MULTILINE)
    assert one(settings, "NoNewPrivileges") == "yes"
    assert one(settings, "CapabilityBoundingSet") == ""
    assert one(settings, "StateDirectoryMode") == "0700"


def test_only_the_node_sees_a_gpu() -> None:
    assert one(unit("node"), "DeviceAllow") == "char-nvidia* rw"
    assert not unit("node")["PrivateDevices"]  # it would hide /dev/nvidia0
    assert one(unit("server"), "PrivateDevices") == "yes"


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_waits_for_all_programs(name: str, compose: dict[str, Any]) -> None:
    """Each of a server's three programs has twice STOP_SECONDS to end, 60 s in all."""
    assert int(one(unit(name), "TimeoutStopSec")) == 90
    assert compose["services"][name]["stop_grace_period"] == "90s"


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text()


def test_the_policy_keeps_its_defaults_and_composes(tmp_path: Path) -> None:
    args = [
        "--superlink=a:1",
        "--insecure",
        "--partition=0",
        f"--policy={DEPLOY}/policy.yaml.example",
    ]
    policy = node.read_policy(node.parse([*args, "lr=0.1"]))
    assert policy.configuration[:2] == ["model=local", "model.path=/srv/fedpeft/model"]
    assert policy.configuration[-2:] == ["data.labels=[low,high]", "lr=0.1"]
    assert (policy.allow, policy.limits) == (ALLOW, LIMITS)


@pytest.mark.parametrize("example", ["compose.env.example", None])
@pytest.mark.parametrize("service", SERVICES)
def test_the_composed_command_is_accepted(
    service: str, example: str | None, compose: dict[str, Any], tmp_path: Path
) -> None:
    variables = assignments(DEPLOY / example) if example else {}
    described = compose["services"][service]
    for name in described["secrets"]:
        (tmp_path / name).touch()
    for mounted in ("policy.yaml", "rows"):  # files and folders of the volumes, checked below
        (tmp_path / mounted).mkdir() if mounted == "rows" else (tmp_path / mounted).touch()
    command, *arguments = [filled(word, variables) for word in described["command"]]
    assert command == SERVICES[service]
    for inside in ("/run/secrets/", "/etc/fedpeft/", "/srv/fedpeft/"):
        arguments = [word.replace(inside, f"{tmp_path}/") for word in arguments]
    args = PARSERS[command](arguments)
    if command == "server":
        assert (args.host, args.port) == ("0.0.0.0", 9092)
        assert args.folder == Path("/var/lib/fedpeft/superlink")
    else:
        assert (args.superlink, args.partition) == ("fl.example:9092", 0)
        assert args.data_path == tmp_path / "rows"
        assert args.state_folder == Path("/var/lib/fedpeft/client")


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_writes_in_its_volume_alone(service: str, compose: dict[str, Any]) -> None:
    described = compose["services"][service]
    mounts = [filled(volume, {}).split(":") for volume in described["volumes"]]
    writable = {at: source for source, at, *how in mounts if how != ["ro"]}
    assert writable == {"/var/lib/fedpeft": f"{SERVICES[service]}-state"}
    assert described["read_only"] is True
    assert described["tmpfs"] == ["/tmp:mode=1777,size=1g"]
    assert described["cap_drop"] == ["ALL"]
    assert described["security_opt"] == ["no-new-privileges:true"]
    assert f"{SERVICES[service]}-state" in compose["volumes"]


@pytest.mark.parametrize("service", SERVICES)
def test_each_machine_starts_its_service_alone(service: str, compose: dict[str, Any]) -> None:
    described = compose["services"][service]
    assert described["profiles"] == [service]
    build = described["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    assert described["image"] == f"fedpeft:{build['dockerfile'].rpartition('.')[2]}"
    assert ("deploy" in described) == (service == "node-gpu")


def test_the_gpu_node_asks_for_one_gpu(compose: dict[str, Any]) -> None:
    reserved = compose["services"]["node-gpu"]["deploy"]["resources"]["reservations"]
    assert reserved == {"devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}


def test_secrets_are_files_and_only_sites_reach_the_server(compose: dict[str, Any]) -> None:
    services, secrets = compose["services"], compose["secrets"]
    assert {name: services[name]["secrets"] for name in services} == {
        "server": ["server.pem", "server.key"],
        "node": ["server.pem", "node.key"],
        "node-gpu": ["server.pem", "node.key"],
    }
    variables = assignments(DEPLOY / "compose.env.example")
    assert {name: filled(each["file"], variables) for name, each in secrets.items()} == {
        name: f"/etc/fedpeft/{name}" for name in ("server.pem", "server.key", "node.key")
    }
    assert [filled(port, {}) for port in services["server"]["ports"]] == ["9092:9092"]
    assert not any("ports" in services[name] for name in ("node", "node-gpu"))


def test_every_variable_of_compose_is_in_the_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", text_of("compose.yaml")))
    assert used == assignments(DEPLOY / "compose.env.example").keys()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_has_a_python_that_the_package_allows(name: str) -> None:
    (allowed,) = re.findall(
        r'^requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M
    )
    versions = re.findall(r"^FROM python:([\d.]+)-slim", text_of(name), re.MULTILINE)
    assert len(versions) == 2
    assert all(version in SpecifierSet(allowed) for version in versions)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_runs_the_command_without_rights(name: str) -> None:
    last = text_of(name).rpartition("\nFROM ")[2]
    assert "\nUSER 10001\n" in last
    assert '\nENTRYPOINT ["fedpeft"]\n' in last
    assert " --uid 10001 " in last


def test_the_cpu_image_takes_torch_from_an_index_of_cpu_wheels() -> None:
    """Pip keeps it afterwards, because a local version such as 2.13.0+cpu meets the constraint."""
    (pinned,) = re.findall(r"^torch(==.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"{pinned[2:]}+cpu" in SpecifierSet(pinned)
    assert '--index-url "$TORCH_INDEX" torch' in text_of("Dockerfile.cpu")
    assert "INDEX" not in text_of("Dockerfile.gpu")


def copied(name: str) -> list[str]:
    """Return the sources that a Dockerfile copies from the checkout, in order."""
    lines = re.findall(r"^COPY (?!--from)(.*)$", text_of(name), re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_build_sees_what_it_copies_and_nothing_else(name: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert sorted(line[1:] for line in lines if line.startswith("!")) == sorted(copied(name))
    assert {"**/*.key", "**/*.pem", "**/*.env", "**/__pycache__"} <= set(lines)


def test_the_files_that_an_image_copies_build_the_package(tmp_path: Path) -> None:
    source = tmp_path / "checkout"
    source.mkdir()
    for each in copied("Dockerfile.cpu"):
        path = ROOT / each
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / each)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "fedpeft = fedpeft.cli:main" in archive.read(points).decode()
    assert {"fedpeft/deployment/server.py", "fedpeft/conf/config.yaml"} <= names


@pytest.mark.parametrize("name", NAMES)
def test_the_units_files_have_examples(name: str) -> None:
    settings = unit(name)
    assert one(settings, "EnvironmentFile") == f"/etc/fedpeft/{name}.env"
    assert (DEPLOY / f"{name}.env.example").is_file()
    assert one(settings, "Documentation") == "file:///opt/fedpeft/docs/deployment.md"
    assert (ROOT / "docs" / "deployment.md").is_file()


def test_the_page_names_every_file() -> None:
    page = text_of("README.md")
    files = {path.name for path in DEPLOY.iterdir() if path.name != "README.md"}
    assert {name for name in files if name not in page} == set()
    linked = re.findall(r"\]\(([^)#]+)", page)
    assert all((DEPLOY / link).exists() for link in linked), linked
    assert "(../deploy/README.md)" in (ROOT / "docs" / "deployment.md").read_text()


def mode(path: Path) -> int:
    """Return who may do what with a file, beyond its owner."""
    return path.stat().st_mode & 0o077


def local(program: Any) -> bool:
    """Tell whether a program listens on this machine alone."""
    words = [str(word) for word in program.command]
    return words[words.index("--host") + 1] == "127.0.0.1"


def test_keys_and_what_flower_keeps_are_their_owner_s_alone(tmp_path: Path) -> None:
    """Whoever reaches the SuperLink's other addresses can submit runs, so they are local."""
    before = os.umask(0o022)
    try:
        private, _ = write_node_keys(tmp_path, "ward")
        (tmp_path / "c").touch()
        folder, file = str(tmp_path / "kept"), str(tmp_path / "c")
        given = ["--folder", folder, "--certificate", file, "--key", file]
        superlink, *_ = server.programs(server.parse(given))
    finally:
        os.umask(before)
    assert mode(private) == 0 and mode(tmp_path / "kept") == 0
    assert local(superlink) and "--enable-supernode-auth" in superlink.command


def test_a_node_s_programs_talk_on_this_machine_alone(tmp_path: Path) -> None:
    (tmp_path / "c").touch()
    given = ["--superlink", "host:1", "--partition", "0", "--certificate", str(tmp_path / "c")]
    args = node.parse([*given, "--key", str(tmp_path / "c")])
    supernode, worker = node.programs(args, Policy(), tmp_path)
    assert local(supernode) and str(worker.command[3]).startswith("127.0.0.1:")
