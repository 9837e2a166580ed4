"""A run that stands still is noticed, explained and ended; one that was only asleep is not."""

import functools
import json
import signal
import time
from pathlib import Path

import pytest

from llm_jax.train import stalls
from llm_jax.train.config import WatchdogConfig
from llm_jax.train.stalls import Alarm, Beat, Look, Phase, Progress, Verdict
from llm_jax.train.watchdog import Watchdog
from tests.conftest import Running, Start, free_port
from tests.training import has_lines, steps_written, train, wait_for

CONFIG = WatchdogConfig(factor=20, floor_s=180, grace_s=30, restore_s=500, compile_s=600, checkpoint_s=700, prepare_s=9)


@pytest.mark.parametrize(
    ("phase", "first", "median", "limit"),
    [
        ("step", False, 1.0, 210),
        ("step", False, 10.0, 230),
        ("step", False, None, 210),
        ("data", False, 10.0, 230),
        ("evaluation", False, 1.0, 210),
        ("step", True, None, 630),
        ("data", True, 1.0, 630),
        ("evaluation", True, 1.0, 630),
        # A step that takes longer than a compilation may is no stall.
        ("evaluation", True, 100.0, 2030),
        ("prepare", True, None, 39),
        ("restore", False, 100.0, 530),
        ("compile", False, 100.0, 630),
        ("checkpoint", False, 100.0, 730),
    ],
)
def test_each_phase_has_its_limit(phase: Phase, first: bool, median: float | None, limit: float) -> None:
    assert stalls.limit_s(CONFIG, Progress(7, phase, 3, first), median) == limit


def test_what_comes_first_may_compile(tmp_path: Path) -> None:
    """The first look at held-out rows, all its batches; and steps until one is done, which is seen two later."""
    watch = Watchdog(tmp_path, CONFIG)

    def firsts(*phases: Phase) -> list[bool]:
        told: list[bool] = []
        for phase in phases:
            watch.at(phase, 0)
            told.append(watch.progress.first)
        return told

    once = ("evaluation", "evaluation", "data", "step", "data", "step", "data", "step", "checkpoint", "evaluation")
    for _ in range(2):
        watch.at("restore", 0)
        assert firsts(*once) == [True] * 7 + [False] * 3
        assert not any(firsts(*once))


def test_no_alarm_before_its_time() -> None:
    """A tick comes up to a second after a phase began: n ticks without progress after it are n seconds at least."""
    assert [stalls.overdue(waited, 4.0) for waited in (0, 3, 4, 9)] == [-4, -1, 0, 5]
    assert stalls.overdue(4, 4.2) == -1


def beat(counter: int, progress: int = 10, phase: Phase = "step", ended: stalls.Ended = "") -> Beat:
    return Beat("now", counter, progress, phase, progress // 2, "host", 100 + progress, ended)


def test_the_culprit() -> None:
    """From two looks of process 0: who it is, in words, and whom nobody waits for."""

    def judged(before: Look, after: Look, me: int = 0) -> tuple[str, tuple[int, ...]]:
        verdict = stalls.judge(before, after, 3, me)
        return verdict.culprit, verdict.absent

    live = {0: beat(1), 1: beat(5), 2: beat(9)}
    later = {0: beat(4), 1: beat(8), 2: beat(12)}
    who = "(host host, pid 110, last seen in phase step after 5 updates)"
    assert judged(live, later) == (
        "nobody is behind (in phase step after 5 updates): a collective or a device hangs",
        (),
    )
    assert judged(live, later | {1: beat(5)}) == (f"process 1 {who} stands still", (1,))
    # A lower counter has moved too, and progress says nothing about who does not live.
    assert judged(live, later | {1: beat(3), 2: beat(9, 20)}) == (
        "process 2 (host host, pid 120, last seen in phase step after 10 updates) stands still",
        (2,),
    )
    behind = later | {2: beat(12, 9, "data")}
    assert judged(live, behind) == (
        "process 2 (host host, pid 109, last seen in phase data after 4 updates) is behind the others",
        (),
    )
    two = later | {1: beat(8, 8), 2: beat(12, 8)}
    assert judged(live, two)[0].count("pid 108") == 2
    # The others' heartbeats are missing: one has only just come, one never did.
    assert judged({0: beat(1), 1: beat(5)}, {0: beat(4), 2: beat(1)}) == ("process 1 has no heartbeat", (1,))
    # Who has finished is no culprit; who has failed is.
    done = later | {1: beat(5, 11, ended="done")}
    assert judged(live, done)[0].startswith("nobody is behind")
    failed = later | {1: beat(5, ended="failed"), 2: beat(9)}
    assert judged(live, failed) == (f"process 1 {who} ended with an error", (1, 2))
    # Where this process's own heartbeat does not move, the directory is what stands still.
    for before, after in ((live, later | {0: beat(1)}), ({}, {}), (live, {})):
        assert judged(before, after) == ("nobody can be named: heartbeats cannot be written or read", ())
    assert judged(live, later | {0: beat(1)}, me=1)[0].startswith("process 0 ")
    assert stalls.judge({}, {}, 1, 0) == Verdict("the only process makes no progress")


def test_a_thousand_culprits_are_one_line() -> None:
    before = {p: beat(1) for p in range(1000)}
    verdict = stalls.judge(before, before | {999: beat(2)}, 1000, 999)
    assert verdict.absent == tuple(range(999))
    assert "process 7 " in verdict.culprit and "process 8 " not in verdict.culprit and "991 more" in verdict.culprit


def test_what_is_not_a_heartbeat_or_an_alarm_is_nothing() -> None:
    assert stalls.beat_from_json(json.dumps(vars(beat(3)))) == beat(3)
    for alarm in (Alarm("now", None), Alarm("now", Verdict("process 1 stands still", (1, 5)))):
        assert stalls.alarm_from_json(stalls.alarm_to_json(alarm)) == alarm
    for text in ("", "{", "[]", "null", "{}", '{"attempt": "now"}', '{"attempt": "now", "verdict": {"culprit": 1}}'):
        assert stalls.beat_from_json(text) is None
        assert stalls.alarm_from_json(text) is None


# A process that is watched and does nothing: a stall is a matter of time alone. Argument 2 says what goes wrong.
WATCHED = """
import json, os, shutil, sys, time
from pathlib import Path
from llm_jax.train.config import WatchdogConfig
from llm_jax.train.watchdog import Watchdog

run_dir, fault, floor_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def stuck_here():
    time.sleep(1000)

{planted}
with Watchdog(run_dir, WatchdogConfig(floor_s=floor_s, grace_s=1)) as watch:
    for step in range(3):
        watch.at("data", step)
        watch.at("step", step)
    beats = run_dir / "heartbeats"
    # Just after a heartbeat, there is a second in which the watchdog writes nothing.
    while not (beats / "0.json").exists():
        time.sleep(0.01)
    before = (beats / "0.json").read_text()
    while (beats / "0.json").read_text() == before:
        time.sleep(0.01)
    match fault:
        case "gone":
            shutil.rmtree(run_dir)
        case "full":
            stalls = run_dir / "stalls" / json.loads((beats / "alarm.json").read_text())["attempt"]
            stalls.mkdir(parents=True)
            for folder in (beats, stalls):
                (folder / ".0").unlink(missing_ok=True)
                (folder / ".0").symlink_to("/dev/full")
        case "hung":
            (beats / ".0").unlink(missing_ok=True)
            os.mkfifo(beats / ".0")
    watch.at("data", 3)
    print("begun", flush=True)
    if fault == "asleep":
        for _ in range(60):
            time.sleep(0.1)
        watch.at("step", 3)
    elif fault != "no stall":
        stuck_here()
print("finished", flush=True)
"""


def watched(start: Start, run_dir: Path, fault: str, *, floor_s: float = 3, planted: str = "") -> Running:
    run_dir.mkdir(exist_ok=True)
    running = start("-c", WATCHED.replace("{planted}", planted), str(run_dir), fault, str(floor_s))
    wait_for(lambda: "begun" in running.done().stdout, running)
    return running


def stacks(run_dir: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in run_dir.glob("stalls/*/*.txt")}


def test_a_stall_leaves_stacks_and_a_line(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    running = watched(start, run_dir, "stall")
    begun = time.monotonic()
    done = running.wait(30)
    assert done.returncode == 76, done
    assert 4 <= time.monotonic() - begun < 14
    assert "finished" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("stalled: the only process makes no progress; process 0 waited ")
    assert f" s in phase data after 3 updates; stacks in {run_dir}/stalls/" in line
    told = stacks(run_dir)
    assert list(told) == ["0"]
    assert line.startswith(told["0"].splitlines()[0])
    assert "in stuck_here" in told["0"] and "threads: MainThread 0x" in told["0"]
    last = json.loads((run_dir / "heartbeats" / "0.json").read_text())
    assert (last["phase"], last["step"], last["progress"]) == ("data", 3, 7)
    assert last["pid"] == running.process.pid and last["counter"] >= 4
    # The alarm was that attempt's: the next one ends when it is done, and says so.
    next_one = watched(start, run_dir, "no stall").wait(30)
    assert next_one.returncode == 0 and "finished" in next_one.stdout and not next_one.stderr
    assert json.loads((run_dir / "heartbeats" / "0.json").read_text())["ended"] == "done"


@pytest.mark.slow
def test_a_failing_disk_ends_nothing_but_a_stall(start: Start, tmp_path: Path) -> None:
    """The stacks are on stderr then, and the exit code is the same."""
    reasons = {"gone": "No such file", "full": "No space left"}
    several = {fault: watched(start, tmp_path / fault, fault) for fault in reasons}
    for fault, running in several.items():
        done = running.wait(30)
        assert done.returncode == 76, done
        assert "in stuck_here" in done.stderr
        assert done.stderr.count("training goes on") == 1
        last = done.stderr.splitlines()[-1]
        assert "stacks above" in last and reasons[fault] in last


@pytest.mark.slow
def test_a_hanging_disk_ends_it_a_little_later(start: Start, tmp_path: Path) -> None:
    """Whatever writes to the run directory waits for ever, and the watchdog with it."""
    running = watched(start, tmp_path / "run", "hung")
    begun = time.monotonic()
    done = running.wait(30)
    assert done.returncode == 76, done
    assert time.monotonic() - begun < 14
    assert "nobody was named: the disk hangs" in done.stderr and "in stuck_here" in done.stderr


BY_THE_CLOCK = """
from llm_jax.train import stalls

class ByTheClock(Watchdog):
    def at(self, phase, step):
        super().at(phase, step)
        self.since = time.monotonic()
        stalls.overdue = lambda waited, limit: int(time.monotonic() - self.since - limit)

Watchdog = ByTheClock
"""


@pytest.mark.slow
def test_time_asleep_is_no_stall(start: Start, tmp_path: Path) -> None:
    """A phase of 6 s, a limit of 9, and 9 s asleep in the middle; the proof is that a watchdog with a clock fails."""
    two = [watched(start, tmp_path / "ticks", "asleep", floor_s=8)]
    two += [watched(start, tmp_path / "clock", "asleep", floor_s=8, planted=BY_THE_CLOCK)]
    for running in two:
        running.process.send_signal(signal.SIGSTOP)
    time.sleep(9)
    for running in two:
        running.process.send_signal(signal.SIGCONT)
    ticks, clock = (running.wait(30) for running in two)
    assert ticks.returncode == 0 and not ticks.stderr, ticks
    assert clock.returncode == 76 and "stalled" in clock.stderr, clock


@pytest.mark.slow
def test_what_is_left_of_an_attempt_ends_when_it_wakes(start: Start, tmp_path: Path) -> None:
    """Stopped, and forgotten by whatever restarted the job: it must not go on beside the next attempt."""
    run_dir = tmp_path / "run"
    old = watched(start, run_dir, "stall", floor_s=100)
    time.sleep(1.5)
    old.process.send_signal(signal.SIGSTOP)
    new = watched(start, run_dir, "stall", floor_s=100)
    time.sleep(1.5)
    old.process.send_signal(signal.SIGCONT)
    done = old.wait(20)
    assert done.returncode == 76, done
    assert "left over from an earlier attempt" in done.stderr
    time.sleep(1.5)
    assert new.process.poll() is None, new.done()
    assert not new.done().stderr


# Two processes of `llm-jax train`. Steps take milliseconds, so the limit is floor and grace.
LONG = ("train.steps=100000", "optim.schedule=constant", "checkpoint.every=100000", "watchdog.heartbeat_s=100")
QUICK = (*LONG, "watchdog.floor_s=3", "watchdog.grace_s=1")
DEADLINE_S = 4


def train_two(
    start: Start, run_dir: Path, *overrides: str, program: tuple[str, ...] = ("-m", "llm_jax")
) -> list[Running]:
    """Both processes, in training."""
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    command = (*program, *train(run_dir, *overrides)[2:])
    both = [start(*command, env=job | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    wait_for(functools.partial(has_lines, run_dir, 8), both[0])
    return both


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_process_is_named_and_the_others_end(start: Start, tmp_path: Path, stopped: int) -> None:
    run_dir = tmp_path / "run"
    both = train_two(start, run_dir, *QUICK)
    both[stopped].process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    done = both[1 - stopped].wait(60)
    assert time.monotonic() - begun < DEADLINE_S + 10
    assert done.returncode == 76, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("stalled")]
    pid = both[stopped].process.pid
    assert f"stalled: process {stopped} (host " in line and f"pid {pid}, last seen in phase " in line
    assert " stands still; process " in line
    told = stacks(run_dir)
    assert list(told) == [str(1 - stopped)]
    assert told[str(1 - stopped)].startswith(line.split("; stacks")[0])
    assert "train/loop.py" in told[str(1 - stopped)] and "train/attempt.py" in told[str(1 - stopped)]
    # It does not go on when it wakes, and nothing that it was about to write comes later.
    both[stopped].process.send_signal(signal.SIGCONT)
    made = len(steps_written(run_dir))
    assert both[stopped].wait(10).returncode in (76, -signal.SIGABRT)
    assert len(steps_written(run_dir)) <= made + 1


HUNG_LOADER = """
import os, sys, time
from llm_jax.train import loop

real = loop.stream

def stream(*arguments, **named):
    for t, fetched in enumerate(real(*arguments, **named)):
        while t == 20 and os.environ["JAX_PROCESS_ID"] == "1":
            time.sleep(1)
        yield fetched

loop.stream = stream
from llm_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_hung_loader_is_named_with_its_phase(start: Start, tmp_path: Path) -> None:
    """Both processes live; the one that is behind, and in which phase, is told by both, and both leave their stacks."""
    run_dir = tmp_path / "run"
    both = train_two(start, run_dir, *QUICK, program=("-c", HUNG_LOADER))
    for running in both:
        done = running.wait(60)
        assert done.returncode == 76, done
        assert "stalled: process 1 (host " in done.stderr
        assert "last seen in phase data after 20 updates) is behind the others" in done.stderr
    told = stacks(run_dir)
    assert sorted(told) == ["0", "1"]
    assert "in stream" in told["1"] and "train/loop.py" in told["0"]


@pytest.mark.slow
def test_who_wakes_in_time_raises_no_alarm(start: Start, tmp_path: Path) -> None:
    """One process for less than the limit, then the other; and the whole job for longer, as `scontrol suspend` does."""
    run_dir = tmp_path / "run"
    both = train_two(start, run_dir, *LONG, "train.steps=160", "watchdog.floor_s=5", "watchdog.grace_s=1")
    for made, stopped, seconds in ((10, both[:1], 2), (50, both[1:], 2), (90, both, 9)):
        wait_for(functools.partial(has_lines, run_dir, made), both[0])
        for running in stopped:
            running.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        for running in stopped:
            running.process.send_signal(signal.SIGCONT)
    for running in both:
        done = running.wait(120)
        assert done.returncode == 0, done
        assert "stalled" not in done.stderr
    assert len(steps_written(run_dir)) == 160
    assert not stacks(run_dir)
