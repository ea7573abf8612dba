"""accel/bench/peers.py without any peer: its options, its table, its document, and the conversation with a worker."""

import importlib.util
import sys
from pathlib import Path

import pytest

from refmodels.opt import OPTBackbone, OPTCausalLM

BENCH = Path(__file__).parents[1] / "accel" / "bench"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers", BENCH / "peers.py")
    module = sys.modules["peers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["peers"]


@pytest.fixture
def sides(peers):
    def side(system, dtype, accelerator, prefill, decode):
        made = peers.Side(system, dtype, accelerator)
        made.speeds = {"prefill": prefill, "decode 1": decode, "decode 8": []}
        made.tokens, made.start_seconds = [5, 6, 7], 1.25
        made.about = {"peak_memory": 500_000_000, "installed": 150_000_000, "versions": {system: "1.0"}}
        return made

    found = [
        side("refmodels", "float32", "reference", [300.0, 100.0, 200.0], [30.0]),
        side("slow", "float32", "", [100.0, 100.0, 100.0], [20.0]),
        side("fast", "float32", "", [400.0, 200.0, 100.0], [10.0]),
        side("refmodels", "int8", "reference", [50.0], [1234.0]),
    ]
    found[2].tokens = [5, 9, 7]
    return found


def test_the_ratio_is_to_the_fastest_peer_of_the_type_round_by_round(peers, sides):
    ours, slow, fast, alone = sides
    assert peers.ratio_to_best_peer(ours, sides, "prefill") == 0.75  # of 0.75, 0.5 and 2
    assert peers.ratio_to_best_peer(slow, sides, "prefill") == 0.5
    assert peers.ratio_to_best_peer(fast, sides, "prefill") == 1.0
    assert peers.ratio_to_best_peer(ours, sides, "decode 1") == 1.5
    assert peers.ratio_to_best_peer(ours, sides, "decode 8") is None
    assert peers.ratio_to_best_peer(alone, sides, "prefill") is None
    fast.problem = "it ended"
    assert peers.ratio_to_best_peer(ours, sides, "prefill") == 2.0  # of 3, 1 and 2


@pytest.mark.parametrize(
    ("tokens", "wanted", "said"), [([1, 2], [1, 2], "2 of 2"), ([1, 3, 3], [1, 2, 3], "1 of 3"), ([], [1], "0 of 1")]
)
def test_agreement_counts_what_comes_before_the_first_difference(peers, tokens, wanted, said):
    assert peers.leading_agreement(tokens, wanted) == said


def test_the_table(peers, sides):
    sides[1].problem = "no bfloat16 here"
    limits = {"float32": {"prefill": 1000.0, "decode 1": 44.0, "decode 8": 352.0}}
    assert peers.table(sides, limits) == [
        "| type | system | prefill | decode, 1 row | decode, 8 rows | same tokens | start | memory | installed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| float32 | refmodels, reference | 200 (0.75) | 30.0 (3.00) |  | 3 of 3 | 1.2 s | 500 MB | 150 MB |",
        "| float32 | fast | 200 (1.00) | 10.0 (1.00) |  | 1 of 3 | 1.2 s | 500 MB | 150 MB |",
        "| float32 | *the machine's limit* | 1,000 | 44 | 352 |  |  |  |  |",
        "| int8 | refmodels, reference | 50.0 | 1,234 |  |  | 1.2 s | 500 MB | 150 MB |",
    ]
    text = peers.section("opt-125m", ["| table |"], sides, {"date": "2026-01-02"})
    assert text == "## opt-125m\n\n| table |\n\nLeft out:\n\n- slow, float32: no bfloat16 here\n\n- date: 2026-01-02"


def test_a_section_takes_the_place_of_the_old_one(peers):
    document = peers.with_section("# Title\n", "opt-125m", "first \\1")
    document = peers.with_section(document, "t5-base", "other")
    assert document.startswith("# Title\n\n<!-- begin opt-125m")
    again = peers.with_section(document, "opt-125m", "second \\1")
    assert again == document.replace("first", "second")


def test_options(peers, tmp_path):
    options = peers.parser().parse_args([])
    assert (options.model, options.dtypes) == (["opt-125m", "t5-base"], ["float32", "int8"])
    assert set(options.systems) == set(peers.DTYPES) == {"refmodels", *peers.LIVES_IN}
    assert set(peers.LIVES_IN.values()) == set(peers.ENVIRONMENTS)
    options = peers.parser().parse_args(["--systems", "refmodels", "openvino", "--python", f"openvino={sys.executable}"])
    assert peers.pythons(options) == {"refmodels": sys.executable, "openvino": sys.executable}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--systems", "transformers"], "transformers has no environment"),
        (["--systems", "openvino", "--environments", "nowhere"], "nowhere/openvino/bin/python: no Python for openvino"),
        (["--python", "abacus=python"], "'abacus=python'"),
        (["--python", "openvino"], "SYSTEM=PATH"),
        (["--systems", "refmodels", "--new-tokens", "1"], "--new-tokens must be at least 2"),
    ],
)
def test_bad_requests(peers, capsys, arguments, said):
    assert peers.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("peers: error: ")
    assert said in err


def test_the_models_are_presets(peers):
    from refmodels.presets import preset_names

    assert set(peers.MODELS.values()) <= set(preset_names())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_limit_counts_what_a_type_reads(peers, dtype):
    from refmodels.bench import bytes_per_step

    plain = OPTBackbone(40, 2, 2, 8, 12, seed=1)
    stored = peers.stored_as(plain, dtype)
    if dtype == "int8":
        plain.quantize("int8")
    assert bytes_per_step(stored) == bytes_per_step(plain)


@pytest.mark.skipif(sys.platform == "win32", reason="workers are stopped by signals")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_worker_generates(peers, tmp_path, dtype):
    pytest.importorskip("h5py")
    pytest.importorskip("safetensors")
    backbone = OPTBackbone(40, 2, 2, 8, 12, max_sequence_length=32, seed=1)
    backbone.save_to_hf(tmp_path / "hf")
    side = peers.Side("refmodels", dtype, "reference")
    job = {"system": "refmodels", "dtype": dtype, "accelerator": "reference", "threads": 1, "family": "opt"}
    job |= {"hf": str(tmp_path / "hf"), "keras": "", "place": str(tmp_path / "place")}
    try:
        peers.load(side, sys.executable, job, tmp_path)
        assert side.problem == ""
        for figure in peers.FIGURES:
            peers.measure_once(side, figure, {figure: [[9, 8, 7, 6]]}, 5, keep=True)
        with pytest.raises(RuntimeError, match="ValueError: sequence length 34 "):
            side.ask(do="generate", ids=[[9] * 33], new_tokens=2)
        about = side.ask(do="describe")
    finally:
        side.end()
    if dtype == "int8":
        backbone.quantize("int8")
    wanted = OPTCausalLM(backbone, None).generate({"token_ids": [[9, 8, 7, 6]]}, max_new_tokens=5, stop_token_ids=None)
    assert side.tokens == wanted["token_ids"][0, 4:].tolist()
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in side.speeds.values())
    assert about["versions"].keys() == {"refmodels"}
    assert about["installed"] > 0


def test_a_worker_that_cannot_start_is_left_out(peers, tmp_path, capsys):
    side = peers.Side("openvino", "float32")
    job = {"system": "openvino", "threads": 1, "family": "opt", "dtype": "float32", "place": str(tmp_path / "place")}
    peers.load(side, "/bin/false", job, tmp_path)
    assert side.problem
    assert "left out: openvino, float32" in capsys.readouterr().err
