"""Training steps beside what people use instead, in turns: python benchmarks/compare.py --workload W1 --torch PYTHON

Each peer trains a model of the workload's sizes in a process of its own; rounds go through all of them, one at a time,
so that what disturbs the machine disturbs all. The reference is a hand-written torch model, eager (peers_torch.py).
One JSON line for each peer, with how many times faster than the reference it was: medians over rounds, and the same
over rounds in which the machine had nothing else to do. A peer that does not start is left out, and told on stderr.

PYTHON is the peer's interpreter, each in an environment of its own:
--torch               Python 3.11  pip install torch==2.13.0 transformers==5.23.0
--jax jax=PYTHON      Python 3.11  pip install jax optax   (a model written by hand: plain_jax.py)
--jax nanodo=PYTHON   Python 3.11  pip install jax optax flax, and then, since it is in no registry,
                                   pip install --no-deps git+https://github.com/google-deepmind/nanodo
--jax levanter=PYTHON Python 3.12  pip install --pre marin-levanter==0.2.20.dev202606180959, and then
                                   pip install --pre marin-finelog==0.2.18.dev30664701627 marin-finelog-server==0.2.10
                                   gitpython wandb
--jax maxtext=PYTHON  Python 3.12  pip install maxtext==0.2.5, which brings no dependencies; then jinja2, sympy and what
                                   its dependencies/requirements/base_requirements/requirements.txt lists, without
                                   the linters; uv pip install resolves them in half a minute, pip hardly does

--ours may be given several times, with changes of the run after a name: --ours full:model.remat=full
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sizes import Sizes  # noqa: E402
from turns import OMP, About, Take, Turn, in_turns, ratios, spread, worker  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

from llm_jax.objective.config import MlmConfig  # noqa: E402
from llm_jax.run import Run  # noqa: E402
from llm_jax.train.flops import flops_per_token  # noqa: E402

REFERENCE = "plain"
# A name of peers_torch.py, with -compile where torch.compile makes it faster; the reference comes first.
TORCH = {
    "causal": (REFERENCE, "plain-compile", "llama", "llama-compile"),
    "mlm": (REFERENCE, "bert", "bert-compile", "modernbert", "modernbert-compile"),
    "experts": (REFERENCE, "mixtral", "mixtral-compile"),
}
# A name of peers_jax.py; what comes before a hyphen has the interpreter.
JAX = {
    "causal": ("jax", "nanodo", "levanter", "maxtext"),
    "mlm": ("jax",),
    "experts": ("jax", "jax-dense", "levanter", "maxtext", "maxtext-dense"),
}


def peers_of(run: Run, torch: str | None, jax: dict[str, str]) -> dict[str, list[str]]:
    """Those that train such a model and have an interpreter, with the beginning of their commands."""
    kind = "mlm" if isinstance(run.objective, MlmConfig) else "experts" if run.model.moe else "causal"
    spec = json.dumps(sizes(run)._asdict())
    of_torch = {name: [torch, str(HERE / "peers_torch.py"), name, spec] for name in TORCH[kind] if torch}
    with_python = {name: jax[name.partition("-")[0]] for name in JAX[kind] if name.partition("-")[0] in jax}
    return of_torch | {name: [python, str(HERE / "peers_jax.py"), name, spec] for name, python in with_python.items()}


def sizes(run: Run) -> Sizes:
    """What a peer has to know."""
    model, moe = run.model, run.model.moe
    return Sizes(
        layers=model.n_layers,
        d=model.d_model,
        heads=model.n_heads,
        ff=moe.d_ff if moe else model.d_ff,
        vocab=model.vocab_size,
        seq=run.data.seq_len,
        rows=run.train.batch_rows,
        masked=run.objective.rate if isinstance(run.objective, MlmConfig) else None,
        experts=moe.experts if moe else 0,
        dtype=model.compute_dtype,
    )


def told(about: About, turns: list[Turn], reference: list[Turn], run: Run) -> About:
    """A peer's line."""
    seconds = [each for turn in turns for each in turn.seconds]
    flops = flops_per_token(run.model, run.data.seq_len, run.objective)
    walls, cpus = ratios(reference, turns)
    quiet, _ = ratios(reference, turns, quiet=True)
    return about | {
        "steps": len(seconds),
        "step_ms": spread([1e3 * each for each in seconds], 1),
        "tokens_per_s": round(run.tokens_per_step / statistics.median(seconds), 1),
        "gflops_per_s_visible": round(run.tokens_per_step * flops.visible / statistics.median(seconds) / 1e9, 1),
        "cpu_s_per_step": round(statistics.median(turn.cpu_each for turn in turns), 3),
        "faster": spread(walls),
        "faster_when_quiet": {**spread(quiet), "rounds": len(quiet)} if quiet else None,
        "less_cpu": spread(cpus),
        "others_cores": [None if turn.others is None else round(turn.others, 2) for turn in turns],
    }


def started(stack: ExitStack, commands: dict[str, list[str]], omp: str) -> dict[str, tuple[About, Take]]:
    """The workers that gave an answer; of the others stderr tells. SystemExit where it was the reference."""
    workers = {}
    for name, command in commands.items():
        print(f"{name} begins", file=sys.stderr, flush=True)
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        try:
            workers[name] = stack.enter_context(worker(command, log.fileno(), omp))
        except SystemExit as no_answer:
            log.seek(0)
            print(f"{log.read()[-2000:]}\n{name} is left out: {no_answer}", file=sys.stderr)
            if name == REFERENCE:
                raise
    return workers


def main() -> None:
    """Prints a JSON line a peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="W1", help="which model and batch (default W1)")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has torch and transformers")
    parser.add_argument(
        "--jax", action="append", default=[], metavar="NAME=PYTHON", help="an interpreter that has NAME"
    )
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="some of the peers; the reference always runs")
    parser.add_argument("--ours", action="append", metavar="NAME[:path=value,...]", help="variants of our own run")
    parser.add_argument("--omp", choices=OMP, default="passive", help="what waiting threads of OpenMP do")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each (default 8)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn, after one that is not (default 3)")
    arguments = parser.parse_args()
    run = WORKLOADS[arguments.workload]
    known = peers_of(run, arguments.torch, dict(each.split("=", 1) for each in arguments.jax))
    unknown = [name for name in arguments.peers or () if name not in known]
    if unknown:
        sys.exit(f"--peers {unknown[0]}: with these interpreters {arguments.workload} has {', '.join(known) or 'none'}")
    commands = {name: known[name] for name in known if name == REFERENCE or name in (arguments.peers or known)}
    for variant in arguments.ours or ["llm_jax"]:
        name, _, changes = variant.partition(":")
        ours = [sys.executable, str(HERE / "train_step.py"), "--serve", "--workload", arguments.workload]
        commands[name] = [*ours, *filter(None, changes.split(","))]
    # Who is stopped between its turns is woken and sent home, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    with ExitStack() as stack:
        workers = started(stack, commands, arguments.omp)
        if not workers:
            sys.exit("nobody started")
        turns = in_turns({name: take for name, (_, take) in workers.items()}, arguments.rounds, arguments.steps, skip=1)
    reference = next(iter(turns))
    for name, (about, _) in workers.items():
        line = told(about, turns[name][: arguments.rounds], turns[reference], run)
        which = {"peer": name, "workload": arguments.workload, "omp": arguments.omp, "reference": reference}
        print(json.dumps(which | line), flush=True)


if __name__ == "__main__":
    main()
