"""The same random weights through refmodels and the libraries that one would pick instead, by turns, in one run.

    python accel/bench/peers.py --make-environments ENVS             # once: pip installs the peers, several gigabytes
    python accel/bench/peers.py --environments ENVS --model t5-base  # measure, and print the table
    python accel/bench/peers.py --environments ENVS --write          # ... and put it into README.md beside this file

Run it in an environment with refmodels and the accelerators to measure. Every system, in every type, is a process of its own
(worker.py) that is stopped while another is measured, so that no idle thread of it takes a core. Each measurement goes around
all systems before the next begins, from either end by turns; the first round is thrown away. Trust ratios of one run alone.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"

MODELS = {
    "opt-125m": "opt_125m_en",
    "flan-t5-small": "flan_small_multi",
    "t5-base": "t5_base_multi",
    "bloom-560m": "bloom_560m_multi",
}
"""Name -> the built-in preset whose shape it has."""

ENVIRONMENTS = {
    "peers": (
        "torch==2.13.0", "transformers==5.23.0", "ctranslate2==4.8.2",
        "keras-hub==0.32.0", "keras==3.15.1", "tensorflow-text==2.21.1", "jax==0.10.2",
    ),
    "openvino": ("optimum-intel[openvino]==2.2.0", "openvino==2026.4.1", "nncf==3.4.0", "torch==2.13.0"),
}  # fmt: skip
"""Environment -> what pip installs there. optimum-intel wants an older Transformers than the others."""

DTYPES = {
    "refmodels": ("float32", "bfloat16", "int8", "int4"),
    "transformers": ("float32", "bfloat16", "int8"),
    "kerashub": ("float32", "bfloat16"),
    "ctranslate2": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8", "int4"),
}
"""System -> the types that it runs on processors."""

LIVES_IN = {"transformers": "peers", "kerashub": "peers", "ctranslate2": "peers", "openvino": "openvino"}
DECODE_AFTER = 32
FIGURES = ("prefill", "decode 1", "decode 8")
SEED = 0


@dataclass
class Side:
    """One system in one type: its process, and what it was measured to do."""

    system: str
    dtype: str
    accelerator: str = ""
    process: "subprocess.Popen[str] | None" = None
    start_seconds: float = 0.0
    speeds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIGURES})
    tokens: list[int] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"refmodels, {self.accelerator}" if self.accelerator else self.system

    def ask(self, **request: Any) -> dict[str, Any]:
        """Wake the process, ask, and put it to sleep again. RuntimeError with what went wrong there."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGCONT)
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise RuntimeError(f"the process ended with status {process.wait()}")
        process.send_signal(signal.SIGSTOP)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# -- the table -------------------------------------------------------------------------------------------------------------


def ratio_to_best_peer(side: Side, sides: Sequence[Side], figure: str) -> float | None:
    """This side's speed over that of the fastest peer in the same type: the median of the ratios of each round."""
    peers = [s for s in sides if s.dtype == side.dtype and not s.accelerator and not s.problem and s.speeds[figure]]
    if not peers or not side.speeds[figure]:
        return None
    best = max(peers, key=lambda s: statistics.median(s.speeds[figure]))
    return statistics.median(ours / theirs for ours, theirs in zip(side.speeds[figure], best.speeds[figure], strict=False))


def leading_agreement(tokens: Sequence[int], wanted: Sequence[int]) -> str:
    """How many of the first tokens are the same."""
    count = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), min(len(tokens), len(wanted)))
    return f"{count} of {len(wanted)}"


def speed_cell(side: Side, sides: Sequence[Side], figure: str) -> str:
    """The median, and the ratio to the best peer in brackets."""
    speeds = side.speeds[figure]
    if not speeds:
        return ""
    ratio, median = ratio_to_best_peer(side, sides, figure), statistics.median(speeds)
    shown = f"{median:,.0f}" if median >= 100 else f"{median:.1f}"
    return shown if ratio is None else f"{shown} ({ratio:.2f})"


def table(sides: Sequence[Side], limits: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Markdown: the sides by type, and the limit of the machine for each type. `limits`: type -> figure -> tokens/s."""
    head = ("type", "system", "prefill", "decode, 1 row", "decode, 8 rows", "same tokens", "start", "memory", "installed")
    rows: list[Sequence[str]] = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    wanted = next((side.tokens for side in sides if side.dtype == "float32" and side.tokens), [])
    for dtype in dict.fromkeys(side.dtype for side in sides):
        for side in (side for side in sides if side.dtype == dtype and not side.problem):
            memory, installed = side.about.get("peak_memory"), side.about.get("installed")
            rows.append(
                (
                    dtype,
                    side.name,
                    *(speed_cell(side, sides, figure) for figure in FIGURES),
                    leading_agreement(side.tokens, wanted) if dtype == "float32" else "",
                    f"{side.start_seconds:.1f} s",
                    f"{memory / 1e6:,.0f} MB" if memory else "",
                    f"{installed / 1e6:,.0f} MB" if installed else "",
                )
            )
        if dtype in limits:
            speeds = [limits[dtype].get(figure) for figure in FIGURES]
            rows.append((dtype, "*the machine's limit*", *("" if s is None else f"{s:,.0f}" for s in speeds), *[""] * 4))
    return [f"| {' | '.join(row)} |" for row in rows]


def section(model: str, lines: Iterable[str], sides: Sequence[Side], facts: Mapping[str, str]) -> str:
    """A model's part of README.md."""
    left_out = [f"- {side.name}, {side.dtype}: {side.problem}" for side in sides if side.problem]
    parts = [f"## {model}", "", *lines, ""]
    if left_out:
        parts += ["Left out:", "", *left_out, ""]
    parts += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(parts)


def with_section(document: str, model: str, text: str) -> str:
    """The document with this text between the model's markers, which are put at the end if they are not there."""
    begin, end = f"<!-- begin {model}: written by peers.py -->", f"<!-- end {model} -->"
    block = f"{begin}\n\n{text}\n\n{end}"
    old = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if old.search(document):
        return old.sub(lambda _: block, document)
    return f"{document.rstrip()}\n\n{block}\n"


# -- measuring -------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def prepare_model(preset: str, work: Path) -> Any:
    """Write the random model for everybody, as Hugging Face's files and KerasHub's, unless it is there; its backbone."""
    from refmodels import Backbone

    backbone: Backbone = Backbone.from_preset(preset, load_weights=False, seed=SEED)
    for form, save in (("hf", backbone.save_to_hf), ("keras", backbone.save_to_preset)):
        if not (work / form).exists():
            say(f"writing {form} files")
            save(work / form)
    return backbone


def started(side: Side, python: str, job: Mapping[str, Any], log: Path) -> subprocess.Popen[str]:
    """The process of a side."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        environment[name] = str(job["threads"])
    if side.system == "refmodels":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    else:
        environment.pop("PYTHONPATH", None)
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with open(log, "a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [python, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps(job) + "\n")
    return process


def load(side: Side, python: str, job: Mapping[str, Any], work: Path) -> None:
    """Convert the model for this side, if that has not been done, and start it."""
    place, log = Path(job["place"]), work / f"{side.system}{side.accelerator}-{side.dtype}.log"
    done = place.with_name(place.name + ".done")
    try:
        if not done.exists():
            say(f"converting for {side.name}, {side.dtype}")
            side.process = started(side, python, job, log)
            side.ask(do="prepare")
            side.end()
            done.touch()
        say(f"starting {side.name}, {side.dtype}")
        began = time.perf_counter()
        side.process = started(side, python, job, log)
        side.ask(do="load")
        side.start_seconds = time.perf_counter() - began
    except (RuntimeError, OSError) as error:
        fail(side, str(error))


def fail(side: Side, problem: str) -> None:
    """Leave a side out from now on."""
    say(f"left out: {side.name}, {side.dtype}: {problem}")
    side.problem = problem[:300]
    side.end()


def measure_once(side: Side, figure: str, prompts: Mapping[str, Any], new_tokens: int, keep: bool) -> None:
    """One measurement of one side."""
    ids = prompts[figure]
    try:
        reply = side.ask(do="generate", ids=ids, new_tokens=1 if figure == "prefill" else new_tokens)
    except RuntimeError as error:
        fail(side, str(error))
        return
    if figure == "decode 1":
        side.tokens = reply["tokens"][0]
    if keep:
        prefilled = len(ids) * len(ids[0]) / max(reply["first"], 1e-9)
        side.speeds[figure].append(prefilled if figure == "prefill" else len(ids) * (new_tokens - 1) / max(reply["rest"], 1e-9))


def run(options: argparse.Namespace, model: str, work: Path) -> str:
    """Measure all systems on one model; its section of README.md."""
    import numpy as np

    from refmodels import machine

    work.mkdir(parents=True, exist_ok=True)
    backbone = prepare_model(MODELS[model], work)
    draw, top = np.random.default_rng(SEED).integers, backbone.config.vocabulary_size
    shapes = {"prefill": (1, options.prompt_length), "decode 1": (1, DECODE_AFTER), "decode 8": (8, DECODE_AFTER)}
    prompts = {figure: draw(10, top, shape).tolist() for figure, shape in shapes.items()}
    sides = [
        Side(system, dtype, accelerator)
        for dtype in options.dtypes
        for system in options.systems
        if dtype in DTYPES[system]
        for accelerator in (options.accelerators if system == "refmodels" else [""])
    ]
    try:
        for side in sides:
            job = {
                "system": side.system, "dtype": side.dtype, "accelerator": side.accelerator, "threads": options.threads,
                "family": backbone.family, "hf": str(work / "hf"), "keras": str(work / "keras"),
                "place": str(work / f"{side.system}-{side.dtype}"),
            }  # fmt: skip
            load(side, options.pythons[side.system], job, work)
        measured = measure_in_turns(sides, options, prompts)
    finally:
        for side in sides:
            side.end()
    best = machine.Limits(*map(max, zip(*measured, strict=True)))
    limits = {dtype: limits_of(backbone, dtype, best, options.prompt_length) for dtype in options.dtypes}
    return section(model, table(sides, limits), sides, facts(options, model, measured, sides, machine.description()))


def measure_in_turns(sides: Sequence[Side], options: argparse.Namespace, prompts: Mapping[str, Any]) -> list[Any]:
    """All rounds, and what each side says of itself at the end; the machine's limits in each round."""
    from refmodels import machine

    measured: list[machine.Limits] = []
    for i in range(options.repeats + 1):
        for figure in FIGURES:
            say(f"round {i} of {options.repeats}: {figure}")
            for side in sides if i % 2 else sides[::-1]:
                if not side.problem:
                    measure_once(side, figure, prompts, options.new_tokens, keep=i > 0)
        measured.append(machine.measured_limits(options.threads))
    for side in sides:
        if not side.problem:
            try:
                side.about = side.ask(do="describe")
            except RuntimeError as error:
                fail(side, str(error))
    return measured


def limits_of(backbone: Any, dtype: str, machine: Any, prompt_length: int) -> dict[str, float]:
    """What the machine allows in this type, in tokens a second; for prefill known in float32 alone."""
    from refmodels.bench import bytes_per_step, prefill_flops

    steps = machine.bytes_per_second / bytes_per_step(stored_as(backbone, dtype))
    prompts = machine.flops_per_second / prefill_flops(backbone, prompt_length)
    return {"decode 1": steps, "decode 8": 8 * steps} | ({"prefill": prompt_length * prompts} if dtype == "float32" else {})


def stored_as(backbone: Any, dtype: str) -> Any:
    """The same shape with weights of this type; nothing of it is allocated."""
    from refmodels.quantization import BLOCK_SIZE

    quantised = {"int8": "int8_from_float32", "int4": f"int4/{BLOCK_SIZE}_from_float32"}
    return type(backbone).from_config(backbone.get_config() | {"dtype": quantised.get(dtype, dtype)})


def facts(
    options: argparse.Namespace, model: str, limits: Sequence[Any], sides: Sequence[Side], machine: Mapping[str, Any]
) -> dict[str, str]:
    """What a reader must know to judge the table."""
    versions = {name: version for side in sides for name, version in side.about.get("versions", {}).items()}
    shown = f"--model {model} --dtypes {' '.join(options.dtypes)} --systems {' '.join(options.systems)}"
    shown += f" --accelerators {' '.join(options.accelerators)} --repeats {options.repeats}"
    shown += f" --prompt-length {options.prompt_length} --new-tokens {options.new_tokens} --threads {options.threads}"
    features = ", ".join(machine["features"]) or "none of those that matter"
    read, multiply = (span(values) for values in zip(*limits, strict=True))
    return {
        "machine": f"{machine['processor']}, {machine['cores']} cores, {features}; {machine['system']}",
        "its limits, from round to round": f"{options.threads} threads read {read} GB/s, NumPy multiplies float32 matrices at "
        f"{multiply} GFLOP/s; far apart, they say that the machine was busy with something else, and the table is worth little",
        "date": time.strftime("%Y-%m-%d"),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "command": f"`python accel/bench/peers.py {shown} --environments ENVS --write`",
    }


def span(rates: Sequence[float]) -> str:
    """The least and the most, in 10**9 a second."""
    return f"{min(rates) / 1e9:.3g} to {max(rates) / 1e9:.3g}"


# -- the command -----------------------------------------------------------------------------------------------------------


def make_environments(root: Path) -> None:
    """A virtual environment for each of `ENVIRONMENTS`. Where torch's processor build comes from is pip's to be told."""
    for name, requirements in ENVIRONMENTS.items():
        say(f"{root / name}: {' '.join(requirements)}")
        subprocess.run([sys.executable, "-m", "venv", str(root / name)], check=True)
        subprocess.run([str(root / name / "bin" / "pip"), "install", "--quiet", *requirements], check=True)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description="refmodels beside its peers: the same weights, by turns, in one run.")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["opt-125m", "t5-base"], help="default: opt-125m t5-base")
    parser.add_argument("--systems", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument(
        "--accelerators", nargs="+", default=["reference"], metavar="NAME", help="of refmodels (default: reference)"
    )
    types = ("float32", "bfloat16", "int8", "int4")
    parser.add_argument("--dtypes", nargs="+", choices=types, default=["float32", "int8"], help="default: float32 int8")
    for name, default, what in (
        ("prompt-length", 512, "tokens of the prompt that is taken in"),
        ("new-tokens", 64, f"tokens to decode after {DECODE_AFTER}"),
        ("repeats", 5, "rounds that count"),
        ("threads", min(2, os.cpu_count() or 1), "of every system"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--environments", type=Path, metavar="DIR", help="where --make-environments has put the peers")
    parser.add_argument("--python", action="append", default=[], metavar="SYSTEM=PATH", help="another Python for one system")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep converted models here (default: a temporary directory)")
    parser.add_argument("--write", action="store_true", help=f"put the table into {README.name} beside this file")
    parser.add_argument("--make-environments", type=Path, metavar="DIR", help="install the peers there, and do nothing else")
    return parser


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"wanted a positive integer, got {text!r}")
    return int(text)


def pythons(options: argparse.Namespace) -> dict[str, str]:
    """System -> the Python that runs it. ValueError if there is none."""
    found = {"refmodels": sys.executable}
    if options.environments is not None:
        found |= {system: str(options.environments / name / "bin" / "python") for system, name in LIVES_IN.items()}
    for entry in options.python:
        system, _, path = entry.partition("=")
        if system not in DTYPES or not path:
            raise ValueError(f"--python wants SYSTEM=PATH with a system of {', '.join(DTYPES)}, got {entry!r}")
        found[system] = path
    for system in options.systems:
        if system not in found:
            raise ValueError(f"{system} has no environment: see --environments and --make-environments, or leave it out")
        if not os.access(found[system], os.X_OK):
            raise ValueError(f"{found[system]}: no Python for {system}; see --make-environments")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = parser().parse_args(argv)
    try:
        if options.make_environments is not None:
            make_environments(options.make_environments)
            return 0
        if options.new_tokens < 2:
            raise ValueError(f"--new-tokens must be at least 2, got {options.new_tokens}")
        options.pythons = pythons(options)
        with tempfile.TemporaryDirectory(prefix="refmodels-peers-") as temporary:
            for model in options.model:
                text = run(options, model, (options.work or Path(temporary)).resolve() / model)
                print(text, flush=True)
                if options.write:
                    README.write_text(with_section(README.read_text(encoding="utf-8"), model, text), encoding="utf-8")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        say(f"peers: error: {' '.join(str(error).split())}")
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the workers, most of which are stopped
    sys.exit(main())
