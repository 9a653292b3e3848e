"""The files that an operator copies: they name settings, flags and paths that exist, and do what their comments say."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from snapshotd import cli, status
from snapshotd.config import DaemonConfig, load_daemon_config, parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
UNIT = DEPLOY / "snapshotd@.service"
SETTINGS = DEPLOY / "snapshotd.toml"
DAEMON_SET = DEPLOY / "kubernetes" / "daemonset.yaml"
SCRIPTS = sorted((DEPLOY / "slurm").iterdir())
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
PUBLIC = {one.name.removesuffix("_s") for one in fields(DaemonConfig)}
NEWER_THAN_SOME_SYSTEMD = ("RestartSteps=", "RestartMaxDelaySec=")


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


# --- all of them -----------------------------------------------------------------------------------


def test_every_flag_in_a_file_for_operators_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = flags_of("serve", capsys) | flags_of("status", capsys)
    for path in FILES:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text()))
        assert used <= known, f"{path} has flags that no command has: other tools are called by short options there"


def test_every_command_in_a_file_for_operators_is_called_with_flags_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in [*FILES, REPOSITORY / "docs" / "deploy.md"]:
        for command, rest in re.findall(r"snapshotd[\"',]* +[\"']?(serve|status|stop|gc|run)\b(.*)", path.read_text()):
            used = set(re.findall(r"--[a-z][a-z-]*", rest))
            assert used <= flags_of(command, capsys), f"{path}: snapshotd {command}{rest}"


def test_every_variable_in_a_file_for_operators_is_a_setting_or_the_scripts_own() -> None:
    known = {f"SNAPSHOTD_{name.upper()}" for name in PUBLIC} | {"SNAPSHOTD_JOB", "SNAPSHOTD_MARKS"}
    for path in FILES:
        assert set(re.findall(r"SNAPSHOTD_[A-Z_]+", path.read_text())) <= known, path


def test_every_file_for_operators_has_the_same_socket() -> None:
    sockets = {re.sub(r"%i|1000|\$uid|\$\(id -u\)|<uid>", "UID", found) for path in FILES
               for found in re.findall(r"/run/snapshotd/\S*?\.sock", path.read_text())}  # fmt: skip
    assert sockets == {"/run/snapshotd/UID/snapshotd.sock"}


def test_the_documentation_names_only_files_that_exist() -> None:
    text = (REPOSITORY / "docs" / "deploy.md").read_text()
    named = set(re.findall(r"\bdeploy/[\w@./-]*\w", text))
    assert named
    assert all((REPOSITORY / one).exists() for one in named), named


# --- settings --------------------------------------------------------------------------------------


def examples() -> str:
    """The settings with every example switched on."""
    return re.sub(r"^#(?=\w+ = )", "", SETTINGS.read_text(), flags=re.MULTILINE)


def test_the_example_of_the_settings_has_every_one_of_them_and_no_other() -> None:
    assert tomllib.loads(SETTINGS.read_text()) == {}
    assert set(tomllib.loads(examples())) == PUBLIC


def test_the_example_of_the_settings_is_accepted_as_it_is_and_with_every_line_switched_on(tmp_path: Path) -> None:
    assert load_daemon_config({}, {}, SETTINGS) == load_daemon_config({}, {})
    file = tmp_path / "c.toml"
    file.write_text(examples())
    config = load_daemon_config({}, {}, file)
    assert (config.listen, config.advertise) == ("tcp://127.0.0.1:0", "127.0.0.1:0")
    assert config.peer_bandwidth == 2 * 10**9
    assert config.scrub_bandwidth == load_daemon_config({}, {}).scrub_bandwidth


def test_the_example_shows_the_true_defaults(tmp_path: Path) -> None:
    shown, defaults = tomllib.loads(examples()), load_daemon_config({}, {})
    for name in ("lease_s", "claim_wait_s", "exit_idle", "scrub_every_s", "reprotect_after_s"):
        assert shown[name.removesuffix("_s")] == getattr(defaults, name)


# --- systemd ---------------------------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    """The unit's settings, each with its values."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if match := re.fullmatch(r"([A-Z]\w*)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def test_the_unit_holds_what_the_daemon_relies_on() -> None:
    found = unit()
    assert all(len(values) == 1 for values in found.values()), "a setting that stands twice"
    settings = {name: values[0] for name, values in found.items()}
    assert settings["User"] == "%i"
    assert settings["RuntimeDirectory"] == "snapshotd/%i"
    assert settings["RuntimeDirectoryMode"] == "0700"
    assert settings["ExecStart"].endswith("--socket /run/snapshotd/%i/snapshotd.sock")
    assert settings["Restart"] == "always"
    assert settings["StartLimitIntervalSec"] == "0"
    assert settings["OOMScoreAdjust"] == "-900"
    assert {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"} == set(settings["RestrictAddressFamilies"].split())


@pytest.mark.parametrize("harmful", ["PrivateUsers", "PrivatePIDs", "PrivateNetwork", "DynamicUser", "MemoryMax"])
def test_the_unit_has_nothing_that_would_hide_trainers_or_take_memory_away(harmful: str) -> None:
    assert harmful not in unit()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    asked = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, timeout=240)
    version = re.match(r"systemd (\d+)", asked.stdout)
    too_new = NEWER_THAN_SOME_SYSTEMD if version and int(version[1]) < 254 else ()
    lines = UNIT.read_text().replace("/opt/snapshotd/bin/snapshotd", sys.executable).splitlines(keepends=True)
    (tmp_path / UNIT.name).write_text("".join(line for line in lines if not line.startswith(too_new)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)], capture_output=True, text=True, timeout=60
    )
    if "Failed to" in verified.stderr and UNIT.name not in verified.stderr:
        pytest.skip(f"systemd-analyze does not work here: {verified.stderr.strip()}")
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


# --- Slurm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_well_formed_and_executable(script: Path) -> None:
    assert script.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    checked = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, timeout=240)
    assert checked.stdout == ""


class Node:
    """A node of a Slurm cluster in a folder: `systemctl`, `logger` and `snapshotd` write down how they are called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marks = folder, folder / "marks"
        self.program("systemctl", 'echo "$@" >>"$NODE/calls"')
        self.program("logger", 'echo "$@" >>"$NODE/said"')
        self.keeps(0)

    def program(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def keeps(self, arenas_bytes: int) -> None:
        """The daemon answers `status --json`, with so much in arenas."""
        facts: dict[str, Any] = {one.name: 0 for one in fields(status.NodeFacts)} | {"used_bytes": arenas_bytes}
        document = status.document(status.NodeFacts(**facts), [], {}, {}, [], {})
        (self.folder / "document").write_text(json.dumps(document, indent=2))
        self.program("snapshotd", 'cat "$NODE/document"')

    def run(self, script: str, job: object = 7, uid: object = 1000) -> int:
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "NODE": str(self.folder),
            "SNAPSHOTD": str(self.folder / "bin" / "snapshotd"), "SNAPSHOTD_MARKS": str(self.marks),
            "SLURM_JOB_ID": str(job), "SLURM_JOB_UID": str(uid),
        }  # fmt: skip
        done = subprocess.run([str(DEPLOY / "slurm" / script)], env=environment, capture_output=True, timeout=240)
        return done.returncode

    def _lines(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines() if (self.folder / name).exists() else []

    @property
    def calls(self) -> list[str]:
        """What systemctl was asked to do."""
        return self._lines("calls")

    @property
    def said(self) -> str:
        """What the system log was told."""
        return "\n".join(self._lines("said"))


@pytest.fixture
def slurm(tmp_path: Path) -> Node:
    if shutil.which("flock") is None or shutil.which("timeout") is None:
        pytest.skip("flock and timeout are not installed")
    return Node(tmp_path)


START, STOP = "start snapshotd@1000.service", "stop snapshotd@1000.service"


def test_a_job_gets_a_daemon_which_ends_with_it(slurm: Node) -> None:
    assert (slurm.run("prolog.sh"), slurm.calls) == (0, [START])
    assert (slurm.run("epilog.sh"), slurm.calls) == (0, [START, STOP])
    assert slurm.said == ""


def test_a_prolog_that_runs_twice_does_the_same(slurm: Node) -> None:
    slurm.run("prolog.sh")
    slurm.run("prolog.sh")
    slurm.run("epilog.sh")
    assert slurm.calls == [START, START, STOP]


def test_the_daemon_stays_for_another_job_of_its_user(slurm: Node) -> None:
    for job in (7, 8):
        slurm.run("prolog.sh", job)
    slurm.run("epilog.sh", 7)
    assert STOP not in slurm.calls
    slurm.run("epilog.sh", 8)
    assert slurm.calls == [START, START, STOP]


def test_the_daemon_of_one_user_ends_without_regard_to_the_jobs_of_others(slurm: Node) -> None:
    slurm.run("prolog.sh", 7)
    slurm.run("prolog.sh", 8, uid=2000)
    slurm.run("epilog.sh", 7)
    assert slurm.calls == [START, "start snapshotd@2000.service", STOP]


def test_a_daemon_that_keeps_something_for_a_requeued_job_stays_until_that_is_over(slurm: Node) -> None:
    slurm.run("prolog.sh")
    slurm.keeps(3 << 30)
    assert (slurm.run("epilog.sh"), slurm.calls) == (0, [START])
    assert "keeps snapshots of a job that was not over" in slurm.said
    slurm.run("prolog.sh")
    slurm.keeps(0)
    slurm.run("epilog.sh")
    assert slurm.calls == [START, START, STOP]


def test_a_daemon_that_does_not_answer_is_left_as_it_is(slurm: Node) -> None:
    slurm.run("prolog.sh")
    slurm.program("snapshotd", "exit 1")
    assert (slurm.run("epilog.sh"), slurm.calls) == (0, [START])
    assert "does not answer" in slurm.said


@pytest.mark.parametrize("script", ["prolog.sh", "epilog.sh"])
@pytest.mark.parametrize(("job", "uid"), [("", ""), ("7", "../../etc"), ("7; reboot", "1000")])
def test_nothing_is_done_for_a_user_or_job_that_is_no_number(script: str, job: str, uid: str, slurm: Node) -> None:
    assert (slurm.run(script, job, uid), slurm.calls) == (0, [])


def test_scripts_never_drain_a_node(slurm: Node) -> None:
    slurm.program("systemctl", "exit 1")
    assert slurm.run("prolog.sh") == 0
    assert "trains unprotected" in slurm.said
    assert slurm.run("epilog.sh") == 0
    assert "did not stop" in slurm.said
    slurm.marks = slurm.folder / "document" / "no-directory"
    assert slurm.run("prolog.sh") == 0
    assert "cannot be made" in slurm.said
    assert slurm.run("epilog.sh") == 0


@pytest.mark.parametrize(("own", "printed"), [("", True), ("/tmp/mine.sock", False)])
def test_tasks_are_told_the_socket_unless_they_have_one(own: str, printed: bool) -> None:
    script = str(DEPLOY / "slurm" / "task-prolog.sh")
    done = subprocess.run([script], env={**os.environ, "SNAPSHOTD_SOCKET": own}, capture_output=True, text=True)
    line = f"export SNAPSHOTD_SOCKET=/run/snapshotd/{os.getuid()}/snapshotd.sock\n"
    assert done.stdout == (line if printed else "")


# --- Kubernetes ------------------------------------------------------------------------------------


@pytest.fixture
def daemon_set() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    document: dict[str, Any] = yaml.safe_load(DAEMON_SET.read_text())
    return document


def test_the_daemon_set_mounts_what_it_names_and_its_command_is_understood(
    daemon_set: dict[str, Any], parsed: Callable[[list[str]], Any]
) -> None:
    pod = daemon_set["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    (container,) = pod["containers"]
    served, asked = container["command"], container["readinessProbe"]["exec"]["command"]
    assert served[0] == asked[0] == "snapshotd"
    assert str(parsed(served[1:]).socket) == str(parsed(asked[1:]).socket)
    labels = daemon_set["spec"]["template"]["metadata"]["labels"]
    assert daemon_set["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_daemon_set_keeps_below_the_limit_that_kills() -> None:
    text = DAEMON_SET.read_text()
    own = re.search(r"SNAPSHOTD_MEMORY_LIMIT, value: (\w+)", text)
    limit = re.search(r"limits: \{ memory: (\w+) \}", text)
    assert own and limit
    assert parse_bytes(own[1]) < parse_bytes(f"{limit[1]}B")


@pytest.fixture
def parsed() -> Callable[[list[str]], Any]:
    return lambda arguments: cli._parser(arguments).parse_args(arguments)
