"""Slurm and SkyPilot without either: what is asked of them, what the batch file does on signals, who is submitted again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from archipel import pipeline
from archipel.errors import ArchipelError, ConfigError, DamagedError, Stopped
from archipel.islands import claims, keys
from archipel.islands import site as sites
from archipel.islands.launch import engine, sky, slurm
from archipel.islands.objects import AwayError, Objects
from archipel.progress import StopFlag
from archipel.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return pipeline.init(tmp_path / "run", source="shapes", preset="tiny")


# --- site.toml -------------------------------------------------------------------------------------------------------


def test_site_is_read_and_options_win(tmp_path: Path) -> None:
    assert sites.read(tmp_path) == sites.SiteConfig()
    (tmp_path / "site.toml").write_text('[slurm]\npartition = "gpu"\ntime = "90m"\nsetup = ["module load x"]\n')
    site = sites.read(tmp_path, ["slurm.time=2h", "slurm.gpus=2", "sky.use_spot=false", "sky.cpus=8"])
    assert site.sky.cpus == "8"
    assert (site.slurm.partition, site.slurm.time, site.slurm.gpus) == ("gpu", "2h", 2)
    assert site.slurm.setup == ("module load x",)
    assert not site.sky.use_spot


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[slurm]\npartitoin = "gpu"', "slurm.partitoin is not a key; did you mean slurm.partition"),
        ('[slurm]\ntime = "soon"', "slurm.time = 'soon': expected a duration such as 90s"),
        ('[slurm]\ncpus = "4"', "slurm.cpus = '4': expected a number, without quotes"),
        ("[slurm]\ntries = 0", "slurm.tries = 0"),
        ('[slrum]\npartition = "gpu"', "slrum is not a key; did you mean slurm"),
        ('[sky.envs]\nAWS_SECRET_ACCESS_KEY = "hunter2"', "sky.envs: AWS_SECRET_ACCESS_KEY names a secret"),
    ],
)
def test_a_wrong_site_is_told_by_its_key(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        sites.read(tmp_path)
    assert says in str(caught.value)
    assert "site.toml" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_site_that_is_no_toml_and_options_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--site slurm.nodes=2.*slurm.nodes is not a key"):
        sites.read(tmp_path, ["slurm.nodes=2"])
    with pytest.raises(ConfigError, match="'gpu' is not of the form"):
        sites.read(tmp_path, ["gpu"])
    (tmp_path / "site.toml").write_text("[slurm\n")
    with pytest.raises(DamagedError, match=r"site.toml is not readable TOML"):
        sites.read(tmp_path)


# --- the batch file --------------------------------------------------------------------------------------------------


def test_what_slurm_is_asked() -> None:
    site = sites.SlurmSite.model_validate(
        {"partition": "p", "time": "61s", "signal": "90s", "gpus": 1, "mem": "8G", "options": {"reservation": "r"}}
    )
    asked = slurm.parameters(site, "name", 2)
    assert asked["wckey"] is None
    assert asked["time"] == 2  # whole minutes, never less than asked for
    assert asked["additional_parameters"] == {"signal": "B:USR2@90", "requeue": True, "reservation": "r"}
    assert (asked["partition"], asked["gpus_per_node"], asked["mem"]) == ("p", 1, "8G")
    assert not {"account", "qos", "cpus_per_task"} & set(asked)
    assert {"export OMP_NUM_THREADS=2", "export HF_HUB_DISABLE_TELEMETRY=1"} <= set(asked["setup"])


# Says that it runs; ends with 130 on SIGTERM, after a moment in which the shell waits.
JOB = """
import signal, sys, time
def stop(*_):
    time.sleep(0.2)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
time.sleep(60)
"""


def batch(tmp_path: Path, command: list[str]) -> subprocess.Popen[str]:
    """The job's script in a shell whose scontrol writes down what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (folder / "scontrol").chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    text = slurm.script(command)
    return subprocess.Popen(
        ["bash", "-c", text],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("number", "tell", "asked"),
    [(signal.SIGUSR2, os.kill, "requeue 17\n"), (signal.SIGTERM, os.killpg, None)],
    ids=["limit", "cancelled"],
)
def test_only_a_job_that_is_out_of_time_goes_back_to_the_queue(
    tmp_path: Path, number: signal.Signals, tell: Callable[[int, int], None], asked: str | None
) -> None:
    """Slurm sends SIGUSR2 to the batch file's shell only, SIGTERM to all of a job's processes."""
    shell = batch(tmp_path, [sys.executable, "-S", "-c", JOB])
    assert shell.stdout is not None
    assert shell.stdout.readline() == "up\n"
    tell(shell.pid, number)
    assert shell.wait(30) == 130
    note = tmp_path / "asked"
    assert (note.read_text() if note.exists() else None) == asked


def test_a_command_that_fails_as_its_time_runs_out_is_not_requeued(tmp_path: Path) -> None:
    shell = batch(tmp_path, [sys.executable, "-S", "-c", JOB.replace("130", "2")])
    assert shell.stdout is not None
    shell.stdout.readline()
    shell.send_signal(signal.SIGUSR2)
    assert shell.wait(30) == 2
    assert not (tmp_path / "asked").exists()


# --- the launcher ----------------------------------------------------------------------------------------------------


class FakeQueue:
    """Slurm as a list: ``play`` says what each submitted job does at once; "runs" leaves it in the queue."""

    def __init__(self, play: Callable[[str, int], str]) -> None:
        self.play, self.jobs, self.submitted, self.cancelled = play, {}, [], []
        self.answers = True

    def submit(self, name: str, arguments: list[str], threads: int | None) -> str:
        self.submitted.append(name)
        number = str(len(self.submitted))
        if self.play(name, self.submitted.count(name)) == "runs":
            self.jobs[name] = (number, "running")
        return number

    def look(self) -> dict[str, tuple[str, str]] | None:
        return dict(self.jobs) if self.answers else None

    def cancel(self, numbers: list[str]) -> None:
        self.cancelled += numbers
        self.jobs = {name: job for name, job in self.jobs.items() if job[0] not in numbers}

    def log(self, job_id: str) -> Path:
        return Path(f"/nowhere/{job_id}.err")


@pytest.fixture
def objects(run: Run) -> Objects:
    (run.root / "store").mkdir()
    return Objects.open(run.root / "store")


def launcher(
    run: Run, monkeypatch: pytest.MonkeyPatch, play: Callable[[str, int], str], **site: object
) -> tuple[slurm.SlurmEngine, FakeQueue]:
    monkeypatch.setattr(slurm, "_NEEDS", ())
    monkeypatch.setattr(engine, "publish", lambda *_: None)
    monkeypatch.setattr(engine, "collect", lambda *_: None)
    made = slurm.SlurmEngine(run, str(run.root / "store"))
    made.site = sites.SlurmSite.model_validate({"poll": 0.01, **site})
    made.queue = queue = FakeQueue(play)  # type: ignore[assignment]
    return made, queue


def commit(objects: Objects, name: str) -> None:
    objects.create(keys.committed(name), claims.encode({"format": 1, "name": name}))


def checkpoint(objects: Objects, name: str, step: int) -> None:
    objects.put(f"{keys.checkpoint(name, 1, step)}/manifest.json", b"{}")


def test_a_job_that_is_gone_without_a_result_is_submitted_again(
    run: Run, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(name: str, time_: int) -> str:
        if name == "1" or time_ == 3:
            commit(objects, name)
        return "gone"

    made, queue = launcher(run, monkeypatch, play)
    made.train(["0", "1"], StopFlag())
    assert sorted(queue.submitted) == ["0", "0", "0", "1"]


def test_without_a_step_gained_it_gives_up_and_cancels_the_others(
    run: Run, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, queue = launcher(run, monkeypatch, lambda name, _: "runs" if name == "1" else "gone", tries=2)
    with pytest.raises(ArchipelError, match=r"job 0 ended 2 times in Slurm without a step gained.*it left no log"):
        made.train(["0", "1"], StopFlag())
    assert queue.submitted.count("0") == 2
    assert queue.cancelled == [str(1 + queue.submitted.index("1"))]


def test_a_job_that_gains_steps_may_vanish_as_often_as_it_likes(
    run: Run, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(name: str, time_: int) -> str:
        checkpoint(objects, name, 10 * time_)
        if time_ == 9:
            commit(objects, name)
        return "gone"

    made, queue = launcher(run, monkeypatch, play, tries=1)
    made.train(["0"], StopFlag())
    assert queue.submitted == ["0"] * 9


def test_jobs_of_a_launcher_that_was_killed_are_found_again(
    run: Run, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, queue = launcher(run, monkeypatch, lambda *_: "gone")
    queue.jobs = {"0": ("7", "running")}
    looks = iter([None, None])

    def look() -> dict[str, tuple[str, str]] | None:
        if next(looks, "over") == "over":
            commit(objects, "0")
        return dict(queue.jobs)

    monkeypatch.setattr(queue, "look", look)
    made.train(["0"], StopFlag())
    assert queue.submitted == []


def test_while_slurm_does_not_answer_nothing_is_submitted_twice(
    run: Run, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, queue = launcher(run, monkeypatch, lambda *_: "gone")
    queue.answers = False
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 5:
            commit(objects, "0")

    monkeypatch.setattr(queue, "look", look)
    made.train(["0"], StopFlag())
    assert queue.submitted == []


def test_while_the_store_does_not_answer_jobs_are_left_alone(
    run: Run, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, queue = launcher(run, monkeypatch, lambda *_: "runs")
    calls = []

    def read(objects: Objects, name: str) -> claims.State:
        calls.append(name)
        if 3 <= len(calls) < 6:
            raise AwayError("the store is away")
        if len(calls) == 6:
            commit(objects, "0")
        return claims.read_state(objects, name)

    monkeypatch.setattr(slurm, "read_state", read)
    made.train(["0"], StopFlag())
    assert queue.submitted == ["0"]
    assert queue.cancelled == []


def test_a_stop_cancels_what_is_in_the_queue(run: Run, objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopFlag()

    def play(*_: object) -> str:
        stop.signal = signal.SIGINT
        return "runs"

    made, queue = launcher(run, monkeypatch, play)
    with pytest.raises(Stopped, match="everything is kept"):
        made.train(["0"], stop)
    assert queue.cancelled == ["1"]


def test_squeue_is_read_by_our_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "3|archipel-abc-0|RUNNING|None\n4|archipel-abd-1|RUNNING|None\n5|other|RUNNING|None\n"
        "6|archipel-abc-router|PENDING|Resources\n"
    )
    for name in slurm._NEEDS:
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n" if name == "squeue" else "#!/bin/sh\nexit 1\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    queue = slurm.Queue(tmp_path / "logs", sites.SlurmSite(), "abc")
    assert queue.look() == {"0": ("3", "running"), "router": ("6", "pending (Resources)")}
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert queue.look() is None


def test_where_there_is_no_slurm_it_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArchipelError, match="this machine has no sbatch"):
        slurm.SlurmEngine(run, "s3://b/p")


# --- SkyPilot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["file:///data/store", "store", "/data/store"])
def test_sky_refuses_a_store_that_no_cloud_machine_can_see(run: Run, url: str) -> None:
    with pytest.raises(ArchipelError, match="--engine sky needs a bucket that machines in a cloud can reach"):
        sky.SkyEngine(run, url)


def test_sky_refuses_credentials_in_the_store(run: Run) -> None:
    with pytest.raises(ArchipelError, match="carries credentials") as caught:
        sky.SkyEngine(run, "s3://key:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)


def test_task_files_hold_the_command_and_no_secret(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://user:hunter2@example.test")
    made = sky.SkyEngine(run, "s3://bucket/run", 4, ["sky.accelerators=L4:1", "sky.infra=aws/eu-north-1"])
    commands = list(made.write(run.job_names))
    assert len(commands) == len(run.job_names)
    for name, command in zip(run.job_names, commands, strict=True):
        path = run.root / "sky" / f"{name}.yaml"
        text = path.read_text()
        assert "hunter2" not in text + command and "AKIAEXAMPLE" not in text + command
        task = yaml.safe_load(text)
        assert task["run"] == (f"archipel join s3://bucket/run --only {name} --jobs 1 --run-id {run.id} --threads 4\n")
        assert task["resources"] == {"infra": "aws/eu-north-1", "accelerators": "L4:1", "use_spot": True}
        assert task["envs"]["AWS_REGION"] == "eu-north-1"
        assert "AWS_ENDPOINT_URL" not in task["envs"]
        assert task["envs"]["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert command.startswith("SKYPILOT_DISABLE_USAGE_COLLECTION=1 sky jobs launch ")
        assert "--secret AWS_ACCESS_KEY_ID --secret AWS_SECRET_ACCESS_KEY" in command
        assert command.endswith(str(path))


def test_machines_that_are_not_taken_away_are_given_back(run: Run) -> None:
    made = sky.SkyEngine(run, "gs://bucket/run", None, ["sky.use_spot=false"])
    assert " --down --cluster archipel-" in next(made.write(["0"]))


def test_sky_writes_what_is_not_done_and_stops_there(
    run: Run, objects: Objects, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(engine, "publish", lambda *_: calls.append("publish"))
    monkeypatch.setattr(engine, "collect", lambda *_: calls.append("collect"))
    monkeypatch.setattr(sky.Objects, "open", lambda _: objects)
    commit(objects, "0")
    made = sky.SkyEngine(run, "s3://bucket/run")
    with pytest.raises(Stopped, match="nothing was launched from here") as caught:
        made.train(["0", "1"], StopFlag())
    assert not caught.value.interrupted  # exit 0
    assert [path.name for path in (run.root / "sky").iterdir()] == ["1.yaml"]
    assert capsys.readouterr().out.count("sky jobs launch") == 1
    commit(objects, "1")
    made.train(["0", "1"], StopFlag())
    assert calls == ["publish", "publish", "collect"]


LOAD = """
import json, sys
connected = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        connected.append(repr(args[1:]))
sys.addaudithook(hook)
import sky
from sky.utils import env_options
tasks = [sky.Task.from_yaml(path) for path in sys.argv[1:]]
print(json.dumps({
    "silent": env_options.Options.DISABLE_LOGGING.get(),
    "connected": connected,
    "tasks": [{"name": t.name, "run": t.run, "envs": dict(t.envs), "spot": [r.use_spot for r in t.resources],
               "accelerators": [r.accelerators for r in t.resources]} for t in tasks],
}))
"""


@pytest.mark.slow
def test_skypilot_itself_reads_the_task_files_in_silence(run: Run, tmp_path: Path) -> None:
    python = Path(__file__).parents[2] / ".venv-sky" / "bin" / "python"
    if not python.exists():
        pytest.skip("make setup-sky")
    made = sky.SkyEngine(run, "s3://bucket/run", 2, ["sky.accelerators=H100:1", "sky.cpus=8+", "sky.memory=32+"])
    commands = list(made.write(run.job_names))
    quiet, _, value = commands[0].partition(" ")[0].partition("=")
    paths = [run.root / "sky" / f"{name}.yaml" for name in run.job_names]
    (tmp_path / "home").mkdir()
    env = os.environ | {quiet: value, "HOME": str(tmp_path / "home")}
    done = subprocess.run([python, "-c", LOAD, *paths], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["silent"] is True
    assert seen["connected"] == []
    assert [task["name"].rpartition("-")[2] for task in seen["tasks"]] == run.job_names
    for name, task in zip(run.job_names, seen["tasks"], strict=True):
        assert f"--only {name} --jobs 1 --run-id {run.id}" in task["run"]
        assert task["spot"] == [True]
        assert task["accelerators"] == [{"H100": 1}]
